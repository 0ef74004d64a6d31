// Workers in words and in order: who is late, and which row stands above which. Pure.

import { age, duration, number } from "./format.js";

/** Worst first: verdicts, and `late` for who computes past its forecast. */
const WORST_FIRST = [
  "quarantined",
  "lost",
  "stuck",
  "late",
  "slow",
  "draining",
  "idle",
  "waiting",
  "computing",
];

/** Return whether a verdict means that nothing gets on. */
export function isStandingStill(verdict) {
  return verdict === "lost" || verdict === "stuck";
}

/** Return whether somebody should look after a worker. */
export function needsLook(worker, now) {
  if (isStandingStill(worker.verdict)) return true;
  if (worker.verdict === "quarantined") return true;
  return lateWorkers([worker], now).length > 0;
}

/** Return {lost, stuck}: the workers that stand still. */
export function standingStill(workers) {
  const of = (word) => workers.filter(({ verdict }) => verdict === word);
  return { lost: of("lost"), stuck: of("stuck") };
}

/** Return the numbers behind a verdict, in the order in which they are looked at. */
export function factWords(worker, now) {
  const { facts } = worker;
  const words = [`heartbeat ${age(now - worker.heartbeat_at)} old`];
  if (facts.num_tokens === null) return words.join(", ");
  const forecast = facts.predicted_s === null ? "" : ` of ${duration(facts.predicted_s)}`;
  words.push(
    `${number(facts.tokens_done)} of ${number(facts.num_tokens)} tokens`,
    `no progress for ${age(facts.no_progress_s)}`,
  );
  if (facts.cpu_s_since_progress !== null) {
    const cpu = number(facts.cpu_s_since_progress, 1);
    words.push(`${cpu} CPU s since the last token or byte`);
  }
  words.push(`${duration(taskProgress(worker, now)?.elapsedS ?? 0)}${forecast} elapsed`);
  return words.join(", ");
}

/** Return how far a held task is, or null when the worker holds none. */
export function taskProgress(worker, now) {
  if (worker.task_id === null || !worker.num_tokens) return null;
  const elapsedS = Math.max(0, now - (worker.claimed_at ?? now));
  const { predicted_s: predictedS } = worker;
  return {
    done: Math.min(1, (worker.tokens_done ?? 0) / worker.num_tokens),
    expected: predictedS ? Math.min(1, elapsedS / predictedS) : null,
    elapsedS,
    predictedS,
    lateS: predictedS ? Math.max(0, elapsedS - predictedS) : 0,
  };
}

/** Return the workers that compute past their forecast, latest first. */
export function lateWorkers(workers, now) {
  return workers
    .filter(({ verdict }) => !isStandingStill(verdict))
    .map((worker) => ({ worker, lateS: taskProgress(worker, now)?.lateS ?? 0 }))
    .filter(({ lateS }) => lateS >= 1)
    .sort((a, b) => b.lateS - a.lateS);
}

/**
 * Return {ids, ranks, waits}: the rows in order, and whether a better order waits.
 *
 * Rows move only when a verdict has changed or somebody became late, and never while
 * `hold` is set, because somebody points at one; new workers then go to the end.
 *
 * `shown` is the last return value, or null.
 */
export function orderRows(shown, workers, now, hold) {
  const ranks = new Map(workers.map((w) => [w.worker_id, rank(w, now)]));
  const best = workers
    .toSorted((a, b) => a.name.localeCompare(b.name))
    .map((worker) => worker.worker_id)
    .sort((a, b) => ranks.get(a) - ranks.get(b));
  const isBest = shown !== null && sameRanks(shown.ranks, ranks);
  if (shown === null || (!hold && !isBest)) return { ids: best, ranks, waits: false };
  const kept = shown.ids.filter((id) => ranks.has(id));
  const added = best.filter((id) => !shown.ids.includes(id));
  return { ids: [...kept, ...added], ranks: shown.ranks, waits: !isBest };
}

// A verdict that this page doesn't know is sorted as the worst rather than hidden.
function rank(worker, now) {
  const isLate = lateWorkers([worker], now).length > 0;
  return WORST_FIRST.indexOf(isLate ? "late" : worker.verdict);
}

function sameRanks(a, b) {
  return a.size === b.size && [...a].every(([id, place]) => b.get(id) === place);
}
