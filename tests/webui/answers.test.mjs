// The four answers: what is said for which view.

import assert from "node:assert/strict";
import test from "node:test";
import {
  isItLearning,
  progressWords,
  roundMoment,
  whatIsStuck,
  whenIsItDone,
  whoIsSlow,
  worstNews,
} from "../../webui/js/answers.js";
import {
  NOW,
  computing,
  evaluations,
  fleet,
  run,
  tasks,
  version,
  worker,
} from "./fleet.mjs";

process.env.TZ = "UTC";
const HOUR = 3600;

function plain(parts) {
  return parts
    .map((part) => part.b ?? part)
    .join("")
    .replace(/[\u2009\u00a0]/g, " ");
}

const lines = (answer) => answer.lines.map(plain);
const learning = (...scores) =>
  isItLearning(fleet({ evaluations: evaluations(...scores) }), NOW);

test("before the first round nobody knows whether it learns", () => {
  const answer = isItLearning(fleet({ run: run({ newest_version: 1 }) }), NOW);

  assert.equal(answer.answer, "Not yet");
  assert.deepEqual(lines(answer), ["v1 is ready. Loss appears after the first round."]);
});

test("versions without a score wait for their evaluation", () => {
  const view = fleet({ versions: [version(1), version(2)] });

  assert.deepEqual(lines(isItLearning(view, NOW)), ["v5 waits for its evaluation."]);
});

test("one score is no trend", () => {
  assert.equal(learning(4).answer, "Not yet");
});

test("it learns while the newest score is the best", () => {
  const answer = learning(4, 3, 2);

  assert.equal(answer.answer, "Yes");
  assert.equal(answer.small, "2.000 bits per byte, best so far");
  assert.deepEqual(lines(answer), [
    "Down 2.000 since v1.",
    "0.500 under gzip -9 (2.500). v5 is 47 s old.",
  ]);
});

test("a small step back is still learning", () => {
  const answer = learning(4, 3, 2.9, 3);

  assert.equal(answer.answer, "Yes");
  assert.match(answer.small, /best 2.900 at v3/);
});

test("five evaluations without a new best are not", () => {
  assert.equal(learning(4, 2, 3, 3, 3, 3).answer, "Yes");

  const answer = learning(4, 2, 3, 3, 3, 3, 3);

  assert.deepEqual([answer.answer, answer.tone], ["No gain in 5 evaluations", "slow"]);
});

test("a score that has only grown is a no", () => {
  const answer = learning(2, 3, 4);

  assert.equal(answer.answer, "No");
  assert.deepEqual(lines(answer), [
    "Up 2.000 since v1.",
    "1.500 above gzip -9 (2.500). v5 is 47 s old.",
  ]);
});

test("the slow one is who computes past its forecast", () => {
  const workers = [computing("birch", 150), computing("alder", 99), worker("cedar")];

  const answer = whoIsSlow(fleet({ workers }), NOW);

  assert.deepEqual([answer.answer, answer.small], ["1 of 3", "birch"]);
  assert.equal(lines(answer)[0], "birch is 0:50 past its forecast of 1:40.");
});

test("a lost worker is not called slow as well", () => {
  const workers = [computing("birch", 150, { verdict: "lost" })];

  assert.equal(whoIsSlow(fleet({ workers }), NOW).answer, "Nobody");
});

test("without late ones the measured speeds are compared", () => {
  const workers = [
    worker("birch", { tokens_per_s: 400 }),
    worker("alder", { tokens_per_s: 160 }),
    worker("cedar"),
  ];

  const answer = whoIsSlow(fleet({ workers }), NOW);

  assert.deepEqual([answer.answer, answer.small], ["Nobody", "no forecast yet"]);
  assert.deepEqual(lines(answer), [
    "Slowest: alder, 160 tokens/s; birch 2.5 times that.",
  ]);
});

test("nothing is compared before there is something to compare", () => {
  const one = fleet({ workers: [worker("birch", { tokens_per_s: 400 })] });
  const none = fleet({ workers: [worker("birch")] });

  assert.deepEqual(lines(whoIsSlow(one, NOW)), ["birch does 400 tokens/s."]);
  assert.deepEqual(lines(whoIsSlow(none, NOW)), ["Speed needs one accepted task."]);
  assert.equal(whoIsSlow(fleet(), NOW).answer, "No workers");
});

test("nothing stuck says when that was looked at", () => {
  const answer = whatIsStuck(fleet(), NOW, NOW - 3);

  assert.equal(answer.answer, "Nothing");
  assert.deepEqual(lines(answer), ["Checked 3 s ago.", "3 tasks pending."]);
});

test("lost workers and failed tasks are named", () => {
  const failure = { task_id: "t-9", kind: "train", attempt: 5, reason: "no disk" };
  const view = fleet({
    workers: [computing("birch", 9, { verdict: "lost", heartbeat_at: NOW - 581 })],
    tasks: tasks({ failed: 2, latest_failed: [failure] }),
  });

  const answer = whatIsStuck(view, NOW, NOW);

  assert.deepEqual(
    [answer.answer, answer.small],
    ["1 worker lost", "and 2 tasks failed"],
  );
  assert.deepEqual(lines(answer), [
    "birch silent for 9:41. Holds t-birch.",
    "t-9 failed: no disk",
  ]);
  assert.equal(worstNews(view), "1 lost, 2 failed");
  assert.equal(worstNews(fleet()), "");
});

test("stuck workers are named after lost ones", () => {
  const evidence = "Heartbeats without progress for 16 s.";
  const stuck = [1, 2].map((n) => computing(`s${n}`, 9, { verdict: "stuck", evidence }));
  const lost = computing("birch", 9, { verdict: "lost", heartbeat_at: NOW - 61 });

  const alone = whatIsStuck(fleet({ workers: stuck.slice(1) }), NOW, NOW);
  const both = whatIsStuck(fleet({ workers: [...stuck, lost] }), NOW, NOW);

  assert.equal(alone.answer, "1 worker stuck");
  assert.deepEqual(lines(alone), [`s2 ${evidence}`]);
  assert.equal(both.answer, "2 workers stuck, 1 lost");
  assert.deepEqual(lines(both), [
    "birch silent for 1:01. Holds t-birch.",
    `s1 ${evidence}`,
  ]);
  assert.equal(worstNews(fleet({ workers: [...stuck, lost] })), "2 stuck, 1 lost");
});

test("the end is a moment with its window", () => {
  const eta = {
    at: NOW + 600,
    earliest_at: NOW + 500,
    latest_at: NOW + 900,
    reason: "Because.",
  };

  const answer = whenIsItDone(fleet({ run: run({ eta }) }), NOW);

  assert.deepEqual([answer.answer, answer.small], ["13:56", "in 10:00"]);
  assert.deepEqual(lines(answer), ["Likely between 13:55 and 14:01.", "Because."]);
});

test("a wide window is not given to the minute", () => {
  const eta = { earliest_at: NOW, latest_at: NOW + 3 * HOUR };

  assert.equal(roundMoment(NOW + 140, eta) % 300, 0);
  assert.equal(roundMoment(NOW + 140, { ...eta, latest_at: NOW + HOUR }), NOW + 140);
});

test("an unknown end says why", () => {
  const answer = whenIsItDone(fleet(), NOW);

  assert.equal(answer.answer, "Unknown");
  assert.deepEqual(lines(answer), ["Needs a round."]);
});

test("a paused run says so, a finished one is done", () => {
  const paused = whenIsItDone(fleet({ run: run({ state: "paused" }) }), NOW);
  const finished = whenIsItDone(fleet({ run: run({ state: "finished" }) }), NOW);

  assert.deepEqual(lines(paused), ["The run is paused. Needs a round."]);
  assert.equal(finished.answer, "Done");
});

test("without a run every answer is still an answer", () => {
  const view = fleet({ run: null, round: null, tasks: null, versions: [] });

  assert.equal(isItLearning(view, NOW).answer, "Not yet");
  assert.equal(whatIsStuck(view, NOW, NOW).answer, "Nothing");
  assert.equal(whenIsItDone(view, NOW).answer, "Unknown");
});

test("progress counts to the budget, or along the epoch", () => {
  assert.equal(plain(progressWords(run())), "25.0 % 1.0 M of 4.0 M tokens");
  assert.equal(
    plain(progressWords(run({ token_budget: null }))),
    "1.0 M tokens, 25 % of epoch 2",
  );
});
