// What is written onto the loss chart: gzip, marks, the values at the line ends.

import { number } from "../format.js";
import { markWords } from "../rollback.js";

export const FONT_PX = 11;
const GZIP_WORDS_PX = 90;

/** Draw what gzip needs, as a dashed line with its value; nothing where out of view. */
export function drawGzip(plot, { gzip, series }, colours) {
  if (gzip === null || gzip > plot.scales.y.max || gzip < plot.scales.y.min) return;
  const { ctx, bbox } = plot;
  const y = Math.round(plot.valToPos(gzip, "y", true));
  ctx.save();
  ctx.strokeStyle = colours.slow;
  ctx.lineWidth = devicePixelRatio;
  ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
  ctx.beginPath();
  ctx.moveTo(bbox.left, y);
  ctx.lineTo(bbox.left + bbox.width, y);
  ctx.stroke();
  ctx.font = canvasFont(400);
  ctx.fillStyle = colours.slow;
  const isLeft = clearance(plot, gzip, "left") > clearance(plot, gzip, "right");
  ctx.textAlign = isLeft ? "left" : "right";
  const words = `gzip -9: ${number(gzip / series.natsPerBit, 3)}`;
  const x = bbox.left + (isLeft ? 0 : bbox.width);
  write(ctx, words, x, y - 5 * devicePixelRatio, colours);
  ctx.restore();
}

/**
 * Draw a dotted line where the run went back, and where the second stage begins.
 *
 * With its title; right of it if it fits.
 */
export function drawMarks(plot, { series }, colours) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.font = canvasFont(400);
  ctx.textBaseline = "top";
  for (const [version, words] of marks(series)) {
    const x = Math.round(plot.valToPos(version, "x", true));
    ctx.strokeStyle = colours["text-3"];
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([devicePixelRatio, 3 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    const gap = 4 * devicePixelRatio;
    const fits = x + gap + ctx.measureText(words).width < bbox.left + bbox.width;
    ctx.textAlign = fits ? "left" : "right";
    ctx.fillStyle = colours["text-3"];
    write(ctx, words, fits ? x + gap : x - gap, bbox.top, colours);
  }
  ctx.restore();
}

function marks({ rollbacks, secondStage }) {
  const backs = rollbacks.map((mark) => [mark.version, markWords(mark)]);
  return secondStage === null ? backs : [[secondStage, "second stage"], ...backs];
}

// How far the curves stay from the words, if these stand at that end of the line.
function clearance(plot, gzip, side) {
  const reach = (GZIP_WORDS_PX * devicePixelRatio) / plot.bbox.width;
  const { min, max } = plot.scales.x;
  const [xs, ...columns] = plot.data;
  const isNear = (x) => {
    const share = (x - min) / (max - min);
    return side === "left" ? share < reach : share > 1 - reach;
  };
  const values = columns.flatMap((column) => [
    column.findLast((value) => value !== null && side === "right"),
    ...column.filter((_, i) => isNear(xs[i])),
  ]);
  const gaps = values.map((value) =>
    value == null ? Infinity : Math.abs(value - gzip),
  );
  return Math.min(...gaps);
}

// With a rim, so that a curve behind the words doesn't hide them.
function write(ctx, words, x, y, { surface }) {
  ctx.setLineDash([]);
  ctx.lineWidth = 3 * devicePixelRatio;
  ctx.lineJoin = "round";
  ctx.strokeStyle = surface;
  ctx.strokeText(words, x, y);
  ctx.fillText(words, x, y);
}

function canvasFont(weight) {
  const { fontFamily } = getComputedStyle(document.body);
  return `${weight} ${FONT_PX * devicePixelRatio}px ${fontFamily}`;
}

/** Write the final values at the line ends, so that nobody has to look them up. */
export function drawEnds(plot, { series }, colours) {
  const held = series.held.findLast((value) => value !== null);
  const train = series.smooth.findLast((value) => value !== null);
  const ends = [];
  if (held !== undefined) {
    const words = number(held / series.natsPerBit, 3);
    ends.push({ value: held, words, colour: colours.accent, weight: 600 });
  }
  if (train !== undefined) {
    const words = number(train, 3);
    ends.push({ value: train, words, colour: colours["text-3"], weight: 400 });
  }
  const places = ends.map(({ value }) => plot.valToPos(value, "y", true));
  const { ctx } = plot;
  ctx.save();
  ctx.textAlign = "left";
  ctx.textBaseline = "middle";
  const x = plot.valToPos(series.x.at(-1), "x", true) + 8 * devicePixelRatio;
  spread(places, 1.2 * FONT_PX * devicePixelRatio).forEach((y, i) => {
    ctx.font = canvasFont(ends[i].weight);
    ctx.fillStyle = ends[i].colour;
    write(ctx, ends[i].words, x, y, colours);
  });
  ctx.restore();
}

// Moves two labels apart that would lie on each other.
function spread(places, least) {
  if (places.length < 2) return places;
  const [a, b] = places;
  if (Math.abs(a - b) >= least) return places;
  const middle = (a + b) / 2;
  return a < b
    ? [middle - least / 2, middle + least / 2]
    : [middle + least / 2, middle - least / 2];
}
