// The rows of the workers, the lanes of the round, the columns of the loss chart.

import assert from "node:assert/strict";
import test from "node:test";
import { layOutRound } from "../../webui/js/lanes.js";
import { lossSeries, niceTicks, yRange } from "../../webui/js/lossdata.js";
import {
  factWords,
  lateWorkers,
  needsLook,
  orderRows,
  taskProgress,
} from "../../webui/js/workers.js";
import {
  NOW,
  computing,
  evaluation,
  facts,
  lane,
  round,
  version,
  worker,
} from "./fleet.mjs";

test("progress compares what is done with what was forecast by now", () => {
  const progress = taskProgress(computing("birch", 80), NOW);

  assert.deepEqual([progress.done, progress.expected, progress.lateS], [0.5, 0.8, 0]);
});

test("progress without a forecast has nothing to compare with", () => {
  const bare = computing("birch", 80, { predicted_s: null });

  assert.equal(taskProgress(bare, NOW).expected, null);
  assert.equal(taskProgress(worker("alder"), NOW), null);
});

test("expected work never goes beyond the task", () => {
  const progress = taskProgress(computing("birch", 250), NOW);

  assert.deepEqual([progress.expected, progress.lateS], [1, 150]);
});

test("late ones come latest first", () => {
  const workers = [computing("a", 120), computing("b", 200), computing("c", 90)];

  assert.deepEqual(
    lateWorkers(workers, NOW).map(({ worker: { name } }) => name),
    ["b", "a"],
  );
});

test("who is stuck is not late as well", () => {
  const stuck = computing("a", 200, { verdict: "stuck" });

  assert.deepEqual(lateWorkers([stuck], NOW), []);
  assert.equal(needsLook(stuck, NOW), true);
});

test("only who stands still, is late or gets no work needs a look", () => {
  const words = ["computing", "slow", "stuck", "draining", "idle", "lost", "quarantined"];

  const found = words.filter((verdict) => needsLook(worker("a", { verdict }), NOW));

  assert.deepEqual(found, ["stuck", "lost", "quarantined"]);
  assert.equal(needsLook(computing("b", 150, { verdict: "slow" }), NOW), true);
});

test("the numbers behind a verdict are told in the order of the rules", () => {
  const stuck = computing("birch", 72, {
    facts: facts({
      tokens_done: 500,
      num_tokens: 900,
      no_progress_s: 16,
      predicted_s: 100,
      cpu_s_since_progress: 0.44,
    }),
  });

  // The spaces of figures are hard ones.
  const words = (row) => factWords(row, NOW).replaceAll(/\s/g, " ");
  assert.equal(
    words(stuck),
    "heartbeat 2 s old, 500 of 900 tokens, no progress for 16 s, " +
      "0.4 CPU s since the last token or byte, 1:12 of 1:40 elapsed",
  );
  assert.equal(words(worker("alder")), "heartbeat 2 s old");
});

const lost = worker("alder", { verdict: "lost" });
const ids = ({ ids: order }) => order.map((id) => id.slice(2));

test("rows stand worst first, then by name", () => {
  const workers = [
    computing("cedar", 9),
    computing("birch", 150),
    worker("hazel"),
    worker("aspen"),
    lost,
  ];

  const order = orderRows(null, workers, NOW, false);

  assert.deepEqual(ids(order), ["alder", "birch", "aspen", "hazel", "cedar"]);
});

test("rows move when a verdict changes, and only then", () => {
  const before = orderRows(null, [worker("alder"), worker("birch")], NOW, false);

  const same = orderRows(before, [worker("birch"), worker("alder")], NOW, false);
  const worse = [worker("alder"), worker("birch", { verdict: "lost" })];

  assert.deepEqual(ids(same), ["alder", "birch"]);
  assert.deepEqual(ids(orderRows(same, worse, NOW, false)), ["birch", "alder"]);
});

test("no row moves under the pointer; a better order waits until it has gone", () => {
  const before = orderRows(null, [worker("alder"), worker("birch")], NOW, false);
  const worse = [
    worker("birch", { verdict: "lost" }),
    worker("alder"),
    worker("aspen"),
  ];

  const held = orderRows(before, worse, NOW, true);
  assert.deepEqual([ids(held), held.waits], [["alder", "birch", "aspen"], true]);

  const let_go = orderRows(held, worse, NOW, false);
  assert.deepEqual([ids(let_go), let_go.waits], [["birch", "alder", "aspen"], false]);
});

test("lanes say what became of each claim", () => {
  const lanes = [
    lane("back", { outcome: "back", ended_at: NOW - 10 }),
    lane("due"),
    lane("late", { predicted_s: 20 }),
    lane("bare", { predicted_s: null }),
    lane("released", { outcome: "released", ended_at: NOW - 5 }),
    lane("kicked", { outcome: "kicked", ended_at: NOW - 5 }),
    lane("stuck"),
    lane("lost"),
  ];
  const names = lanes.map(({ worker_id: id }) => worker(id.slice(2)));
  for (const still of names.slice(-2)) still.verdict = still.name;

  const laid = layOutRound(round(lanes), names, NOW);

  assert.deepEqual(
    laid.lanes.map(({ name, tone, note }) => [name, tone, note]),
    [
      ["back", "ok", "back, 0:40"],
      ["due", "ok", "due in 0:30"],
      ["late", "slow", "0:30 late"],
      ["bare", "ok", "0:50"],
      ["released", "idle", "released"],
      ["kicked", "lost", "kicked"],
      ["stuck", "lost", "stuck"],
      ["lost", "lost", "lost"],
    ],
  );
  assert.deepEqual([laid.numBack, laid.leftS], [1, null]);
});

test("the time left is that of the last forecast", () => {
  const lanes = [lane("birch"), lane("alder", { predicted_s: 95 })];

  assert.equal(layOutRound(round(lanes), [], NOW).leftS, 45);
  const stuck = [worker("birch", { verdict: "stuck" })];
  assert.equal(layOutRound(round(lanes), stuck, NOW).leftS, null);
});

test("with very many lanes only those that need a look are listed", () => {
  const lanes = Array.from({ length: 60 }, (_, i) =>
    lane(`box${i}`, i < 3 ? { predicted_s: 20 } : i < 20 ? { outcome: "back" } : {}),
  );

  const laid = layOutRound(round(lanes), [], NOW);

  assert.equal(laid.lanes.length, 3);
  assert.equal(laid.hidden, "17 back, 40 on forecast");
});

test("the columns of the chart share their versions", () => {
  const versions = [version(1, { train_loss: null }), version(2), version(3)];

  const series = lossSeries(versions, [evaluation(1, 4), evaluation(3, 2)], {
    numLast: null,
    smoothing: 0,
    secondStageTokens: null,
  });

  assert.deepEqual(series, {
    x: [1, 2, 3],
    train: [null, 3, 3],
    smooth: [null, 3, 3],
    held: [8, null, 4],
    rollbacks: [],
    secondStage: null,
    natsPerBit: 2,
  });
});

test("the chart marks where the run went back, among the versions that it shows", () => {
  const versions = [1, 2, 3, 5, 6, 7, 8].map((number) =>
    version(number, { rolled_back_to: { 3: 1, 7: 2 }[number] ?? null }),
  );
  const shown = (numLast) =>
    lossSeries(versions, [], { numLast, smoothing: 0, secondStageTokens: null })
      .rollbacks;

  assert.deepEqual(shown(null), [
    { version: 3, from: 2, to: 1 },
    { version: 7, from: 6, to: 2 },
  ]);
  assert.deepEqual(shown(2), [{ version: 7, from: 6, to: 2 }]);
});

test("the chart marks the first version of which all that follows is second stage", () => {
  const versions = [1, 2, 3, 5].map((number) => version(number)); // 1,000 tokens each
  const marked = (secondStageTokens, numLast = null) =>
    lossSeries(versions, [], { numLast, smoothing: 0, secondStageTokens }).secondStage;

  assert.equal(marked(2000), 2);
  assert.equal(marked(2001), 3);
  assert.equal(marked(2000, 2), null); // to the left of what is shown
  assert.equal(marked(5001), null); // yet to come
  assert.equal(marked(null), null);
});

test("smoothing starts without a bias towards zero, and over all history", () => {
  const losses = [null, 4, 2, 2];
  const versions = losses.map((train_loss, i) => version(i + 1, { train_loss }));

  const { x, smooth } = lossSeries(versions, [], {
    numLast: 3,
    smoothing: 0.5,
    secondStageTokens: null,
  });

  assert.deepEqual(x, [2, 3, 4]);
  assert.equal(smooth[0], 4);
  assert.ok(Math.abs(smooth[1] - 8 / 3) < 1e-9);
  assert.ok(smooth[2] > 2 && smooth[2] < smooth[1]);
});

test("the height keeps the line of gzip in view unless it squeezes the curves", () => {
  const near = yRange([[3, 2, null]], 1.5);
  const far = yRange([[3, 2, null]], 9);

  assert.ok(near[0] < 1.5 && near[1] > 3);
  assert.ok(far[1] < 4);
});

test("ticks are round numbers", () => {
  const ticks = niceTicks(1.93, 4.1, 5).map((value) => value.toFixed(2));

  assert.deepEqual(ticks, ["2.00", "2.50", "3.00", "3.50", "4.00"]);
});
