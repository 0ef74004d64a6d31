// The series of the loss chart: one x of versions, three y in nats a token. Pure.

const LN2 = Math.log(2);

/**
 * Return aligned columns for the chart.
 *
 * `numLast` keeps that many versions, null all. `smoothing` is the weight of the past
 * in a bias-corrected moving average of the training loss; 0 follows every version.
 * `natsPerBit` turns bits per byte of the held-out text into its nats a token, so that
 * one height has two scales; without an evaluation it is a guess used for nothing.
 * `secondStageTokens` are those at which the second stage begins, or null.
 */
export function lossSeries(
  versions,
  evaluations,
  { numLast, smoothing, secondStageTokens },
) {
  const held = new Map(evaluations.map((point) => [point.version, point.loss]));
  const train = new Map(versions.map((point) => [point.version, point.train_loss]));
  const smooth = smoothed(versions, smoothing);
  const all = [...new Set([...train.keys(), ...held.keys()])].sort((a, b) => a - b);
  const x = numLast === null ? all : all.slice(-numLast);
  return {
    x,
    train: x.map((version) => train.get(version) ?? null),
    smooth: x.map((version) => smooth.get(version) ?? null),
    held: x.map((version) => held.get(version) ?? null),
    rollbacks: rollbacksIn(versions, x),
    secondStage: secondStageIn(versions, x, secondStageTokens),
    natsPerBit: natsPerBit(evaluations.at(-1)),
  };
}

// Of the versions in `x` those that are earlier ones again, and what was left for them.
function rollbacksIn(versions, x) {
  const shown = new Set(x);
  return versions.flatMap(({ version, rolled_back_to: to }, i) =>
    to !== null && i > 0 && shown.has(version)
      ? [{ version, from: versions[i - 1].version, to }]
      : [],
  );
}

// The version in `x` from which on all is trained in the second stage; null: none.
function secondStageIn(versions, x, begins) {
  if (begins === null) return null;
  const first = versions.find(({ tokens_total: tokens }) => tokens >= begins);
  return first && x.includes(first.version) ? first.version : null;
}

function smoothed(versions, weight) {
  const values = new Map();
  let sum = 0;
  let seen = 0;
  for (const { version, train_loss: loss } of versions) {
    if (loss === null) continue;
    sum = weight * sum + (1 - weight) * loss;
    seen = weight * seen + (1 - weight);
    values.set(version, sum / seen);
  }
  return values;
}

function natsPerBit(last) {
  return last ? last.loss / last.bits_per_byte : LN2;
}

/**
 * Return [low, high] of the y axis, with some air.
 *
 * `line` is a value that is kept in view unless that would squeeze the curves.
 */
export function yRange(columns, line) {
  const values = columns.flat().filter((value) => value !== null);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const span = Math.max(high - low, 0.02);
  if (line !== null && line > low - span && line < high + span) {
    [low, high] = [Math.min(low, line), Math.max(high, line)];
  }
  const air = 0.06 * Math.max(high - low, 0.02);
  return [low - air, high + air];
}

/** Return round values between two bounds, about `wanted` of them. */
export function niceTicks(low, high, wanted) {
  const raw = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) ticks.push(i * step);
  return ticks;
}
