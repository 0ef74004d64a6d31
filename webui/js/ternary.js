// Ternary health as three heat maps: a column a layer, a row a matrix. Pure.

import { number, percent } from "./format.js";

/** What is drawn of each matrix: its name, how it is written, what its hue goes by. */
const SHOWN = [
  ["Zeros", "zeros", (share) => percent(share, 1), (share) => share],
  ["Flips", "flips", (share) => percent(share, 2), (share) => share],
  ["Scale drift", "drift", signed, Math.abs],
];

/**
 * Return {title, range, most, rows} of each map; `rows` are {name, cells}, from the
 * first layer to the last. The `heat` of a cell goes from 0, the least of its map, to 1.
 * Without a version before there is no flip and no drift: `rows` is empty there.
 */
export function heatMaps({ matrices }) {
  return SHOWN.map(([title, field, write, weigh]) => {
    const known = matrices.filter((matrix) => matrix[field] !== null);
    if (known.length === 0) return { title, range: "", most: "", rows: [] };
    const byHeat = [...known].sort((a, b) => weigh(a[field]) - weigh(b[field]));
    const [least, most] = [byHeat[0], byHeat.at(-1)];
    const span = weigh(most[field]) - weigh(least[field]);
    const heat = (value) => (span > 0 ? (weigh(value) - weigh(least[field])) / span : 0);
    const cell = (matrix) => ({
      title: `${place(matrix.name)}: ${write(matrix[field])}`,
      heat: heat(matrix[field]),
    });
    return {
      title,
      range: `${write(least[field])} to ${write(most[field])}`,
      most: `most in ${place(most.name)}`,
      rows: byPart(known).map(([name, row]) => ({ name, cells: row.map(cell) })),
    };
  });
}

function byPart(matrices) {
  const rows = new Map();
  for (const matrix of matrices) {
    const part = matrix.name.split(".").at(-1);
    rows.set(part, [...(rows.get(part) ?? []), matrix]);
  }
  return [...rows];
}

// Layers count from 1 for a reader.
function place(name) {
  const [, layer, part] = name.split(".");
  return `layer ${Number(layer) + 1}, ${part}`;
}

function signed(share) {
  return `${share > 0 ? "+" : ""}${number(100 * share, 2)}\u00a0%`;
}
