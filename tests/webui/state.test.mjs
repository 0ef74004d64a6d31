// The reducer: snapshots, events, gaps.

import assert from "node:assert/strict";
import test from "node:test";
import { EMPTY, reduce } from "../../webui/js/state.js";
import {
  evaluation,
  evaluations,
  fleet,
  lane,
  round,
  run,
  version,
  worker,
} from "./fleet.mjs";

const snapshot = (body, seq = 7, at = 100) => ({ kind: "snapshot", seq, at, body });
const event = (kind, body, seq = 8, at = 101) => ({ kind, seq, at, body });
const started = (given) => reduce(EMPTY, snapshot(fleet(given)));

test("a snapshot is taken as it is", () => {
  const state = started({ package_version: "9" });

  assert.equal(state.view.package_version, "9");
  assert.deepEqual([state.seq, state.at, state.stale], [7, 100, false]);
});

test("an update replaces what it names, null included, and keeps the rest", () => {
  const before = started({ missing: "Seed." });

  const state = reduce(
    before,
    event("fleet.updated", {
      missing: null,
      round: null,
      server: { loop_lag_ms: 90 },
    }),
  );

  assert.equal(state.view.server.loop_lag_ms, 90);
  assert.deepEqual([state.view.missing, state.view.round], [null, null]);
  assert.equal(state.view.run, before.view.run);
  assert.equal(state.view.tasks, before.view.tasks);
  assert.deepEqual([state.seq, state.at], [8, 101]);
});

test("workers are replaced by id, new ones come last", () => {
  const before = started({ workers: [worker("birch"), worker("alder")] });
  const changed = [worker("birch", { verdict: "lost" }), worker("cedar")];

  const { view } = reduce(before, event("fleet.updated", { workers: changed }));

  assert.deepEqual(
    view.workers.map(({ name, verdict }) => [name, verdict]),
    [
      ["birch", "lost"],
      ["alder", "idle"],
      ["cedar", "idle"],
    ],
  );
  assert.equal(view.workers[1], before.view.workers[1]);
});

test("lanes are replaced by claim, new ones come last, and the round stays", () => {
  const before = started({ round: round([lane("birch"), lane("alder")]) });
  const changed = [lane("birch", { tokens_done: 900 }), lane("cedar")];

  const { view } = reduce(before, event("fleet.updated", { lanes: changed }));

  assert.deepEqual(
    view.round.lanes.map(({ worker_id, tokens_done }) => [worker_id, tokens_done]),
    [
      ["w-birch", 900],
      ["w-alder", 500],
      ["w-cedar", 500],
    ],
  );
  assert.equal(view.round.lanes[1], before.view.round.lanes[1]);
  assert.equal(view.round.round_id, 5);
  assert.equal("lanes" in view, false);
});

test("who is put away leaves the rows, and stands there again once it is back", () => {
  const names = (view) => [view.workers, view.gone].map((rows) => rows.map((w) => w.name));
  const before = started({ workers: [worker("birch"), worker("alder")] });

  const gone = [worker("birch", { verdict: "gone" })];
  const away = reduce(before, event("fleet.updated", { workers: gone }));
  assert.deepEqual(names(away.view), [["alder"], ["birch"]]);

  const back = [worker("birch", { verdict: "draining" })];
  const again = reduce(away, event("fleet.updated", { workers: back }, 9));
  assert.deepEqual(names(again.view), [["alder", "birch"], []]);

  assert.deepEqual(names(started({ workers: gone }).view), [[], ["birch"]]);
});

test("an update without workers keeps the rows", () => {
  const before = started({ workers: [worker("birch")] });

  const { view } = reduce(before, event("fleet.updated", {}));

  assert.equal(view.workers, before.view.workers);
});

test("a published version is appended", () => {
  const { view } = reduce(started(), event("version.published", version(2)));

  assert.deepEqual(
    view.versions.map((point) => point.version),
    [1, 2],
  );
});

test("an event that the snapshot already held changes nothing twice", () => {
  const { view } = reduce(started(), event("version.published", version(1)));

  assert.deepEqual(view.versions, [version(1)]);
});

test("an evaluation is put in by version, or replaces the one of its version", () => {
  const scored = started({ evaluations: [evaluation(1, 4), evaluation(3, 2)] });

  const added = reduce(scored, event("version.evaluated", evaluation(2, 3)));
  const replaced = reduce(added, event("version.evaluated", evaluation(2, 2.5), 9));

  assert.deepEqual(added.view.evaluations, evaluations(4, 3, 2));
  assert.deepEqual(replaced.view.evaluations, evaluations(4, 2.5, 2));
});

test("a gap makes the state stale and changes nothing else", () => {
  const before = started();

  const state = reduce(before, event("version.published", version(2), 9));

  assert.equal(state.stale, true);
  assert.equal(state.view, before.view);
  assert.equal(state.seq, 7);
});

test("a stale state ignores events until a snapshot comes", () => {
  const stale = reduce(started(), { kind: "resync" });
  assert.equal(stale.stale, true);

  const still = reduce(stale, event("version.published", version(2)));
  assert.equal(still, stale);

  const again = reduce(still, snapshot(fleet(), 40));
  assert.deepEqual([again.stale, again.seq], [false, 40]);
});

test("an event that is known already is ignored", () => {
  const before = started();

  assert.equal(reduce(before, event("version.published", version(2), 7)), before);
});

test("an event before any snapshot asks for one", () => {
  const state = reduce(EMPTY, event("fleet.updated", {}, 1));

  assert.deepEqual([state.view, state.stale], [null, true]);
});

test("a coordinator that has started anew counts from zero again", () => {
  const state = reduce(started(), snapshot(fleet(), 0));

  assert.deepEqual([state.seq, state.stale], [0, false]);
});

test("another run asks for a snapshot, because its versions come only there", () => {
  const other = event("fleet.updated", { run: run({ run_id: "r2" }) });

  assert.equal(reduce(started(), other).stale, true);
  assert.equal(reduce(started({ run: null, missing: "Prepare." }), other).stale, true);
});

test("an unknown kind of event only counts", () => {
  const before = started();

  const state = reduce(before, event("lease.granted", {}));

  assert.equal(state.view, before.view);
  assert.equal(state.seq, 8);
});

test("the state before is never changed", () => {
  const before = started({ workers: [worker("birch")] });
  const copy = structuredClone(before);

  reduce(
    before,
    event("fleet.updated", { workers: [worker("birch", { threads: 1 })] }),
  );
  reduce(before, event("version.published", version(2)));

  assert.deepEqual(before, copy);
});
