// What the page says of a run that goes back.

import assert from "node:assert/strict";
import test from "node:test";
import { markWords, rollbackWords } from "../../webui/js/rollback.js";

const due = {
  version: null,
  at: null,
  from_version: 70,
  from_loss: 5.5,
  to_version: 40,
  to_loss: 5.1,
};

test("before the version is made it says what holds training up", () => {
  assert.deepEqual(rollbackWords(due), {
    head: "The run goes back to v40.",
    rest:
      "Held-out loss: 5.500 at v70, 5.100 at v40. " +
      "No training is given out until the round is closed.",
  });
});

test("afterwards it names the version, and no loss that nobody knows", () => {
  const { head, rest } = rollbackWords({ ...due, version: 72, at: 1, to_loss: null });

  assert.equal(head, "The run went back to v40.");
  assert.equal(rest, "Held-out loss: 5.500 at v70, not scored at v40, which is v72 now.");
});

test("a mark on the chart says from which version to which", () => {
  assert.equal(markWords({ version: 72, from: 71, to: 40 }), "from v71 back to v40");
});
