// The four questions of the first strip, answered in words from the view. Pure.
//
// An answer is {tone, icon, answer, small, lines}; a line is a list of texts, where
// {b: text} is emphasised.

import { age, count, dayTime, duration, number, percent, short } from "./format.js";
import { lateWorkers, standingStill } from "./workers.js";

/** Evaluations without a new best after which the run no longer counts as learning. */
const PATIENCE = 5;
/** Evaluations back to which "down by" compares. */
const LOOK_BACK = 10;
const HOUR_S = 3600;

function answer(tone, icon, words, small, lines) {
  return { tone, icon, answer: words, small, lines };
}

/** Say whether the held-out loss falls, and how far gzip is. */
export function isItLearning({ run, versions, evaluations }, now) {
  if (run === null) return answer("", null, "Not yet", "", [["There is no run."]]);
  if (evaluations.length === 0) {
    const why =
      versions.length > 1
        ? `v${run.newest_version} waits for its evaluation.`
        : `v${run.newest_version} is ready. Loss appears after the first round.`;
    return answer("", null, "Not yet", "", [[why]]);
  }
  const last = evaluations.at(-1);
  const gzip = [...againstGzip(last, run), " ", ...merged(run, now)];
  const score = `${number(last.bits_per_byte, 3)} bits per byte`;
  if (evaluations.length === 1) {
    const wait = [`Only v${last.version} is evaluated. Needs a second one.`];
    return answer("", null, "Not yet", score, [wait, gzip]);
  }
  return { ...trend(evaluations, score), lines: [change(evaluations), gzip] };
}

function trend(evaluations, score) {
  const last = evaluations.at(-1);
  const best = evaluations.reduce((a, b) =>
    b.bits_per_byte < a.bits_per_byte ? b : a,
  );
  const since = evaluations.length - 1 - evaluations.indexOf(best);
  if (since === 0) return answer("ok", "ok", "Yes", `${score}, best so far`);
  if (best === evaluations[0]) {
    return answer("slow", "warn", "No", `${score}, worse than v${best.version}`);
  }
  const bestScore = `best ${number(best.bits_per_byte, 3)} at v${best.version}`;
  if (since < PATIENCE) return answer("ok", "ok", "Yes", `${score}, ${bestScore}`);
  const words = `No gain in ${count(since, "evaluation")}`;
  return answer(
    "slow",
    "warn",
    words,
    `${number(last.bits_per_byte, 3)}, ${bestScore}`,
  );
}

function change(evaluations) {
  const last = evaluations.at(-1);
  const from = evaluations.at(-1 - Math.min(LOOK_BACK, evaluations.length - 1));
  const fall = from.bits_per_byte - last.bits_per_byte;
  const word = fall >= 0 ? "Down " : "Up ";
  return [word, { b: number(Math.abs(fall), 3) }, ` since v${from.version}.`];
}

function againstGzip({ bits_per_byte: score }, { gzip_bits_per_byte: gzip }) {
  const gap = { b: number(Math.abs(score - gzip), 3) };
  return score < gzip
    ? [gap, ` under gzip -9 (${number(gzip, 3)}).`]
    : [gap, ` above gzip -9 (${number(gzip, 3)}).`];
}

function merged({ newest_version: version, newest_version_at: at }, now) {
  return [`v${version} is ${age(now - at)} old.`];
}

/** Say who computes past its forecast, and who is slowest by measured speed. */
export function whoIsSlow({ workers }, now) {
  if (workers.length === 0) {
    const wait = ["A worker shows up here once it has registered."];
    return answer("", null, "No workers", "", [wait]);
  }
  const late = lateWorkers(workers, now);
  const holding = workers.filter((w) => w.task_id !== null && w.predicted_s);
  const speeds = [compareSpeeds(workers)];
  if (late.length === 0) {
    const small = holding.length > 0 ? "all within their forecast" : "no forecast yet";
    return answer("", null, "Nobody", small, speeds);
  }
  const lines = late
    .slice(0, 1)
    .map(({ worker, lateS }) => [
      { b: worker.name },
      ` is ${duration(lateS)} past its forecast of ${duration(worker.predicted_s)}.`,
    ]);
  const names = late.map(({ worker }) => worker.name).join(", ");
  const words = `${late.length} of ${workers.length}`;
  return answer("slow", "slow", words, names, [...lines, ...speeds]);
}

function compareSpeeds(workers) {
  const measured = workers
    .filter((w) => w.tokens_per_s !== null && w.verdict !== "lost")
    .sort((a, b) => a.tokens_per_s - b.tokens_per_s);
  if (measured.length === 0) return ["Speed needs one accepted task."];
  const [slowest] = measured;
  const fastest = measured.at(-1);
  const speed = { b: `${number(slowest.tokens_per_s)} tokens/s` };
  if (measured.length === 1) return [slowest.name, " does ", speed, "."];
  const times = number(fastest.tokens_per_s / slowest.tokens_per_s, 1);
  return [
    "Slowest: ",
    { b: slowest.name },
    ", ",
    speed,
    `; ${fastest.name} ${times} times that.`,
  ];
}

/** Say which workers are lost or stuck, and which tasks were given up. */
export function whatIsStuck({ workers, tasks }, now, checkedAt) {
  const { lost, stuck } = standingStill(workers);
  const numFailed = tasks?.failed ?? 0;
  const lines = [
    ...lost.map((worker) => lostLine(worker, now)),
    ...stuck.map(({ name, evidence }) => [{ b: name }, ` ${evidence}`]),
  ].slice(0, 2);
  if (numFailed > 0) lines.push(failedLine(tasks));
  if (lines.length === 0) {
    lines.push([`Checked ${age(now - checkedAt)} ago.`]);
    if (tasks) lines.push([`${count(tasks.pending, "task")} pending.`]);
    return answer("", null, "Nothing", "", lines);
  }
  const failed = `${count(numFailed, "task")} failed`;
  if (lost.length + stuck.length === 0) {
    return answer("lost", "lost", failed, "", lines);
  }
  const small = numFailed > 0 ? `and ${failed}` : "";
  return answer("lost", "lost", stillWords(lost, stuck), small, lines.slice(0, 2));
}

function stillWords(lost, stuck) {
  if (stuck.length === 0) return `${count(lost.length, "worker")} lost`;
  const words = `${count(stuck.length, "worker")} stuck`;
  return lost.length === 0 ? words : `${words}, ${lost.length} lost`;
}

function lostLine(worker, now) {
  const task =
    worker.task_id === null ? "It holds no task." : `Holds ${worker.task_id}.`;
  return [{ b: worker.name }, ` silent for ${age(now - worker.heartbeat_at)}. ${task}`];
}

function failedLine({ failed, latest_failed: latest }) {
  if (latest.length === 0) return [`${count(failed, "task")} failed.`];
  const [task] = latest;
  return [{ b: task.task_id }, ` failed: ${task.reason}`];
}

/** Say when the run ends, or why that is not known. */
export function whenIsItDone({ run }, now) {
  if (run === null) return answer("", null, "Unknown", "", [["There is no run."]]);
  if (run.state === "finished") {
    const all = [
      `${short(run.tokens_accepted)} tokens in ${run.newest_version} versions.`,
    ];
    return answer("ok", "ok", "Done", "", [all]);
  }
  const { at, earliest_at: earliest, latest_at: latest, reason } = run.eta;
  const prefix = run.state === "running" ? "" : `The run is ${run.state}. `;
  if (at === null) return answer("", null, "Unknown", "", [[prefix + reason]]);
  const say = (moment, today) => dayTime(roundMoment(moment, run.eta), today);
  const lines = [[prefix + reason]];
  if (latest - earliest > 60) {
    lines.unshift([
      "Likely between ",
      { b: say(earliest, at) },
      " and ",
      { b: say(latest, at) },
      ".",
    ]);
  }
  return answer("", null, say(at, now), `in ${duration(at - now)}`, lines);
}

/** Round to 5 min while the window is wide: minutes would only pretend to be known. */
export function roundMoment(moment, { earliest_at: earliest, latest_at: latest }) {
  const step = latest - earliest > 2 * HOUR_S ? 300 : 1;
  return Math.round(moment / step) * step;
}

/** Return the worst news for the title of the tab; empty when there is none. */
export function worstNews({ workers, tasks }) {
  const { lost, stuck } = standingStill(workers);
  const news = [];
  if (stuck.length > 0) news.push(`${stuck.length} stuck`);
  if (lost.length > 0) news.push(`${lost.length} lost`);
  if (tasks?.failed) news.push(`${tasks.failed} failed`);
  return news.join(", ");
}

/** Say how far the run is, for the left end of the run line. */
export function progressWords(run) {
  if (run.token_budget !== null) {
    const share = percent(run.tokens_accepted / run.token_budget, 1);
    return [
      { b: share },
      ` ${short(run.tokens_accepted)} of ${short(run.token_budget)} tokens`,
    ];
  }
  const epoch = percent(run.epoch_tokens_accepted / Math.max(1, run.epoch_tokens));
  return [{ b: short(run.tokens_accepted) }, ` tokens, ${epoch} of epoch ${run.epoch}`];
}
