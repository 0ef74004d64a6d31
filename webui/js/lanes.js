// The open round as lanes on one time axis. Pure.

import { duration } from "./format.js";
import { isStandingStill } from "./workers.js";

/** With more lanes than this, only those that need a look are drawn one by one. */
const MANY = 40;
/** How a claim ends that was an attempt lost. */
const TAKEN = new Set(["failed", "expired", "kicked"]);
const AIR = 1.06;

/**
 * Return {lanes, hidden, spanS, elapsedS, numBack, leftS} for drawing a `RoundView`.
 *
 * Times of lanes are seconds since the first claim. `leftS` is how long the forecasts
 * give the last open lane, or null where one of them has none or its worker stands still.
 */
export function layOutRound(round, workers, now) {
  const origin = round.first_claim_at ?? round.opened_at;
  const elapsedS = Math.max(0, now - origin);
  const byId = new Map(workers.map((worker) => [worker.worker_id, worker]));
  const all = round.lanes.map((lane) =>
    layOutLane(lane, byId.get(lane.worker_id), origin, elapsedS),
  );
  const needLook = all.filter(({ tone }) => tone !== "ok");
  const lanes = all.length > MANY ? needLook.slice(0, MANY) : all;
  const ends = all.map(({ endS, dueS }) => Math.max(endS, dueS ?? 0));
  const out = all.filter(({ state }) => state === "out");
  const isStill = all.some(({ state }) => isStandingStill(state));
  const hasForecast = out.length > 0 && out.every(({ dueS }) => dueS !== null);
  return {
    lanes,
    hidden: sumUp(all, lanes),
    spanS: AIR * Math.max(round.round_s, elapsedS, ...ends),
    elapsedS,
    numBack: all.filter(({ state }) => state === "back").length,
    leftS:
      hasForecast && !isStill
        ? Math.max(0, ...out.map(({ dueS }) => dueS - elapsedS))
        : null,
  };
}

function layOutLane(lane, worker, origin, elapsedS) {
  const startS = Math.max(0, lane.claimed_at - origin);
  const isOut = lane.outcome === null;
  const state = isOut ? "out" : lane.outcome;
  const endS =
    lane.ended_at === null ? elapsedS : Math.max(startS, lane.ended_at - origin);
  const dueS = lane.predicted_s === null ? null : startS + lane.predicted_s;
  const isStill = isOut && isStandingStill(worker?.verdict);
  const lateS = dueS === null || !isOut ? 0 : Math.max(0, elapsedS - dueS);
  return {
    id: lane.task_id + lane.worker_id + lane.claimed_at,
    name: worker?.name ?? lane.worker_id,
    title: `${lane.task_id}: ${lane.tokens_done} of ${lane.num_tokens} tokens`,
    state: isStill ? worker.verdict : state,
    tone: laneTone(state, isStill, lateS),
    note: isStill
      ? worker.verdict
      : laneNote(state, { dueS, lateS, elapsedS, startS, endS }),
    startS,
    endS,
    dueS: isOut && !isStill ? dueS : null,
    lateS: isStill ? 0 : lateS,
  };
}

function laneTone(state, isStill, lateS) {
  if (isStill || TAKEN.has(state)) return "lost";
  if (state === "released") return "idle";
  return lateS >= 1 ? "slow" : "ok";
}

function laneNote(state, { dueS, lateS, elapsedS, startS, endS }) {
  if (state === "back") return `back, ${duration(endS - startS)}`;
  if (state !== "out") return state;
  if (dueS === null) return duration(elapsedS - startS);
  return lateS >= 1 ? `${duration(lateS)} late` : `due in ${duration(dueS - elapsedS)}`;
}

function sumUp(all, lanes) {
  const rest = all.filter((lane) => !lanes.includes(lane));
  if (rest.length === 0) return "";
  const back = rest.filter(({ state }) => state === "back").length;
  return `${back} back, ${rest.length - back} on forecast`;
}
