// How the run trains, in words.

import assert from "node:assert/strict";
import test from "node:test";
import { trainingWords } from "../../webui/js/training.js";
import { training } from "./fleet.mjs";

const said = (given, changes = []) =>
  trainingWords(training(given), changes)
    .map((part) => part.b ?? part)
    .join("")
    .replaceAll(/[\u2009\u00a0]/g, " ");

test("it says rate, stage, decay, local steps, codecs and the last round", () => {
  assert.equal(
    said(),
    "Learning rate 0.00147 (peak 0.002), first stage until 2.0 M tokens. " +
      "Weight decay 0.1. Local steps by Muon. " +
      "Sent up: weight differences, int8; down: whole versions. " +
      "Last round: 20.5 k tokens, 40 local steps of its middle worker, 2.6 MB up.",
  );
  assert.deepEqual(trainingWords(training(), [])[1], { b: "0.00147" });
});

test("one local step is one", () => {
  const last_round = { tokens: 1024, payload_bytes: 2_600_000, num_steps: 1 };

  assert.match(said({ last_round }), /tokens, 1 local step of its middle worker,/);
});

test("what changes with the next version is said at the end", () => {
  const changes = [
    { name: "learning_rate", before: 0.002, after: 0.001 },
    { name: "codec", before: "int8", after: "ternary" },
  ];

  assert.match(
    said({}, changes),
    /up\. From the next version on: learning_rate 0\.002 → 0\.001, codec int8 → ternary\.$/,
  );
});

test("rates are in three digits, however small", () => {
  assert.match(said({ learning_rate: 1.23456e-9 }), /^Learning rate 1.23e-9 \(peak 0.002\),/);
  assert.match(
    said({ learning_rate: 0, stage: "over", stage_end_tokens: null }),
    /^Learning rate 0 \(peak 0.002\), its schedule is over\. Weight/,
  );
});

test("a rate that stays at its peak says so with the reason", () => {
  const constant_reason = "No token budget is set.";
  const warming = { stage: "warm-up", stage_end_tokens: 100_000, constant_reason };
  const constant = { stage: "constant", stage_end_tokens: null, constant_reason };

  assert.match(
    said(warming),
    /, warm-up until 100.0 k tokens, then constant\. No token budget is set\. Weight/,
  );
  assert.match(said(constant), /, constant\. No token budget is set\. Weight/);
});

test("a gradient round has neither local steps nor an optimiser of them", () => {
  const words = said({
    round_kind: "gradient",
    local_optimiser: null,
    broadcast: "ternary",
    last_round: { tokens: 640, payload_bytes: 512, num_steps: null },
  });

  assert.ok(!words.includes("ocal steps"));
  assert.ok(words.includes("Sent up: mean gradients, int8; down: ternary links."));
  assert.ok(words.endsWith("Last round: 640 tokens, 512 B up."));
});

test("before the first round is closed nothing is said of a last one", () => {
  assert.ok(said({ last_round: null }).endsWith("down: whole versions."));
});
