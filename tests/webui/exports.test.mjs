// Which versions the page offers to download, and by which addresses.

import assert from "node:assert/strict";
import test from "node:test";
import { exportRows } from "../../webui/js/exports.js";
import { run } from "./fleet.mjs";

const score = (version, bits) => ({ version, tokens_total: 1, loss: bits, bits_per_byte: bits });

test("the best and the newest version are offered by their numbers", () => {
  const rows = exportRows({
    run: run({ best_version: 3, newest_version: 5 }),
    evaluations: [score(1, 4), score(3, 2.5)],
  });

  assert.deepEqual(
    rows.map(({ title, score }) => [title, score]),
    [["Best: v3", "2.500 bits per byte"], ["Latest: v5", "not scored"]],
  );
  assert.equal(
    rows[0].links[1].href,
    "/api/admin/export?version=3&format=gguf&variant=TQ1_0",
  );
  assert.equal(rows[1].links.length, 4);
});

test("one row is enough where the best version is the newest", () => {
  const rows = exportRows({
    run: run({ best_version: 5, newest_version: 5 }),
    evaluations: [score(5, 2.5)],
  });

  assert.deepEqual(rows.map(({ title }) => title), ["Best and latest: v5"]);
});

test("before any score there is only the newest", () => {
  const rows = exportRows({
    run: run({ best_version: null, newest_version: 1 }),
    evaluations: [],
  });

  assert.deepEqual(rows.map(({ title }) => title), ["Latest: v1"]);
});
