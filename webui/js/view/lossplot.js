// The loss chart itself: uPlot with one height and two scales.
//
// Everything is plotted in nats a token. The left scale reads the same heights in bits
// per byte, by the ratio of the held-out text; the right one in nats.

import { readColours } from "../colours.js";
import { number } from "../format.js";
import { uPlot } from "../lib.js";
import { niceTicks, yRange } from "../lossdata.js";
import { FONT_PX, drawEnds, drawGzip, drawMarks } from "./lossdraw.js";

const HEIGHT_PX = 236;
const NARROW_PX = 520;
const TOKENS = ["text", "text-3", "line", "accent", "train-line", "slow", "surface"];
/** Room right of the last version, for the values at the ends of the lines. */
const END_ROOM_PX = 50;

/**
 * Put a chart into an element.
 *
 * `data()` returns {series, gzip}: the columns of `lossSeries`, and the line of gzip in
 * nats or null. `onPoint(i, left)` is called with the version under the pointer, or
 * with null. Returns {update, resize, recolour, pointAt, destroy}.
 */
export function makeLossPlot(element, width, data, onPoint) {
  let colours = readColours(TOKENS);
  const plot = new uPlot(
    options(width, data, () => colours, onPoint),
    columns(data()),
    element,
  );
  return {
    update: () => plot.setData(columns(data())),
    resize: (newWidth) => plot.setSize({ width: newWidth, height: HEIGHT_PX }),
    recolour: () => {
      colours = readColours(TOKENS);
      plot.redraw(false);
    },
    pointAt: (i) => {
      const left = plot.valToPos(plot.data[0][i], "x");
      plot.setCursor({ left, top: 0 });
    },
    destroy: () => plot.destroy(),
  };
}

function columns({ series }) {
  return [series.x, series.train, series.smooth, series.held];
}

function options(width, data, colours, onPoint) {
  const colour = (name) => () => colours()[name];
  return {
    width,
    height: HEIGHT_PX,
    legend: { show: false },
    padding: [8, 4, 0, 4],
    scales: {
      x: { time: false, range: (plot, low, high) => xRange(low, high, plot.width) },
      y: { range: () => heights(data()) },
    },
    axes: axes(data, colour, width),
    series: [
      {},
      {
        stroke: colour("train-line"),
        paths: () => null,
        points: { show: true, size: 3, width: 0, fill: colour("train-line") },
      },
      {
        stroke: colour("train-line"),
        width: 1.4,
        spanGaps: true,
        points: { show: false },
      },
      {
        stroke: colour("accent"),
        width: 2.4,
        spanGaps: true,
        points: {
          show: ({ data: [x] }) => x.length < 40,
          size: 5,
          width: 0,
          fill: colour("accent"),
        },
      },
    ],
    cursor: {
      y: false,
      drag: { x: false, y: false },
      points: { size: 7 },
      move: (plot, left, top) => [snap(plot, left), top],
    },
    hooks: {
      drawClear: [
        (plot) => drawGzip(plot, data(), colours()),
        (plot) => drawMarks(plot, data(), colours()),
      ],
      draw: [(plot) => drawEnds(plot, data(), colours())],
      setCursor: [({ cursor }) => onPoint(cursor.idx ?? null, cursor.left)],
    },
  };
}

function snap(plot, left) {
  return left < 0 ? left : plot.valToPos(plot.data[0][plot.posToIdx(left)], "x");
}

function xRange(low, high, width) {
  const span = Math.max(1, high - low);
  return [low - 0.01 * span, high + (END_ROOM_PX / (width - 2 * END_ROOM_PX)) * span];
}

function heights({ series, gzip }) {
  return yRange([series.train, series.smooth, series.held], gzip);
}

function axes(data, colour, width) {
  const common = {
    stroke: colour("text-3"),
    font: `${FONT_PX}px ${getComputedStyle(document.body).fontFamily}`,
    ticks: { show: false },
    grid: { show: false },
    gap: 6,
  };
  const hasHeld = data().series.held.some((value) => value !== null);
  const ratio = () => data().series.natsPerBit;
  return [
    {
      ...common,
      size: 26,
      space: 60,
      incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000],
      values: ({ data: [x] }, ticks) =>
        ticks.map((version) =>
          version < x[0] || version > x.at(-1) ? "" : `v${version}`,
        ),
    },
    {
      ...common,
      show: hasHeld,
      scale: "y",
      size: 44,
      grid: { show: true, stroke: colour("line"), width: 1 },
      splits: (_, __, low, high) =>
        niceTicks(low / ratio(), high / ratio(), 5).map((bits) => bits * ratio()),
      values: (_, ticks) => inDecimals(ticks.map((nats) => nats / ratio())),
    },
    {
      ...common,
      show: !hasHeld || width >= NARROW_PX,
      scale: "y",
      side: 1,
      size: 44,
      grid: { show: !hasHeld, stroke: colour("line"), width: 1 },
      splits: (_, __, low, high) => niceTicks(low, high, 5),
      values: (_, ticks) => inDecimals(ticks),
    },
  ];
}

function inDecimals(ticks) {
  const step = ticks.length > 1 ? ticks[1] - ticks[0] : 1;
  return ticks.map((value) => number(value, step < 0.095 ? 2 : 1));
}
