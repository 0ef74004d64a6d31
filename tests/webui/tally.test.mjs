// What became of trained tokens, in words.

import assert from "node:assert/strict";
import test from "node:test";
import { tallyTiles, wasteCauses, wastedTokens } from "../../webui/js/tally.js";
import { tally } from "./fleet.mjs";

const some = tally({
  trained: 2000,
  accepted: 100,
  applied: 1500,
  wasted: { silent: 100, filtered: 300, late: 0 },
});

test("waste adds up and comes by its cause, the largest first", () => {
  assert.equal(wastedTokens(some), 400);
  assert.deepEqual(
    wasteCauses(some).map(({ cause, tokens }) => [cause, tokens]),
    [
      ["filtered", 300],
      ["silent", 100],
      ["late", 0],
    ],
  );
});

test("tiles say how much was merged and wasted, and by what most", () => {
  const tiles = tallyTiles(some).map(([name, value, side]) => `${name} ${value} ${side}`);

  assert.match(tiles[0], /^Tokens trained 2\u2009000 /);
  assert.match(tiles[1], /^Merged 1\u2009500 75.0.%, /);
  assert.match(tiles[2], /^Waiting 100 /);
  assert.match(tiles[3], /^Wasted 400 20.0.%$/);
  assert.equal(tiles[4], "Most waste 300 left out by a guard or a reset");
});

test("before anything is trained nothing is divided by zero", () => {
  const tiles = tallyTiles(tally());

  assert.deepEqual(
    tiles.map(([, value]) => value),
    ["0", "0", "0", "0", "–"],
  );
  assert.equal(tiles[3][2], "–");
});

test("a cause that this page does not know is named as it is", () => {
  const { words } = wasteCauses(tally({ wasted: { moths: 1 } }))[0];

  assert.equal(words, "moths");
});
