// Ternary health as heat maps.

import assert from "node:assert/strict";
import test from "node:test";
import { heatMaps } from "../../webui/js/ternary.js";
import { ternary } from "./fleet.mjs";

test("a map has a row a matrix and a cell a layer, and names its range and its most", () => {
  const [, flips] = heatMaps(ternary(0.01, 0.03));

  assert.equal(flips.title, "Flips");
  assert.equal(flips.range, "0.50\u00a0% to 3.00\u00a0%");
  assert.equal(flips.most, "most in layer 2, q");
  assert.deepEqual(
    flips.rows.map(({ name, cells }) => [name, cells.map(({ title }) => title)]),
    [
      ["q", ["layer 1, q: 1.00\u00a0%", "layer 2, q: 3.00\u00a0%"]],
      ["down", ["layer 1, down: 0.50\u00a0%", "layer 2, down: 1.50\u00a0%"]],
    ],
  );
  assert.deepEqual(
    flips.rows.flatMap(({ cells }) => cells.map(({ heat }) => heat.toFixed(2))),
    ["0.20", "1.00", "0.00", "0.40"],
  );
});

test("a drift is as hot downwards as upwards, and has a sign", () => {
  const [, , drift] = heatMaps(ternary(-0.01, 0.03));

  assert.equal(drift.most, "most in layer 2, q");
  assert.equal(drift.rows[0].cells[0].title, "layer 1, q: +1.00\u00a0%");
  assert.equal(drift.rows[0].cells[1].title, "layer 2, q: −3.00\u00a0%");
});

test("without a version before there are zeros alone", () => {
  const alone = ternary(0.01);
  const matrices = alone.matrices.map((m) => ({ ...m, flips: null, drift: null }));

  const maps = heatMaps({ ...alone, before: null, matrices });

  assert.deepEqual(
    maps.map(({ rows }) => rows.length),
    [2, 0, 0],
  );
});

test("where all are alike nothing is hot", () => {
  const [zeros] = heatMaps(ternary(0, 0));

  assert.deepEqual(
    zeros.rows.flatMap(({ cells }) => cells.map(({ heat }) => heat)),
    [0, 0, 0, 0],
  );
});
