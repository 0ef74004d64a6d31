// How the run trains, in words: its rate, its local steps, and what is sent. Pure.

import { bytes, number, short } from "./format.js";

/** What workers send, by the kind of the round. */
const SENT = { delta: "weight differences", gradient: "mean gradients" };
const OPTIMISERS = { muon: "Muon", adamw: "AdamW" };

/**
 * Return the parts of some sentences on a `TrainingView`; {b: text} is emphasised.
 *
 * `changes` are those of the plan that wait for the next version.
 */
export function trainingWords(training, changes) {
  const { learning_rate: rate, peak_rate: peak, weight_decay: decay } = training;
  const rest = [
    ` (peak ${inShort(peak)}), ${stageWords(training)}`,
    `Weight decay ${inShort(decay)}.`,
    stepWords(training),
    `Sent up: ${SENT[training.round_kind]}, ${training.codec}; down: ${downWords(training)}.`,
    lastRoundWords(training.last_round),
    changeWords(changes),
  ];
  return ["Learning rate ", { b: inShort(rate) }, rest.filter(Boolean).join(" ")];
}

function stageWords({ stage, stage_end_tokens: end, constant_reason: reason }) {
  if (stage === "over") return "its schedule is over.";
  const until = end === null ? "" : ` until ${short(end)} tokens`;
  if (reason === null) return `${stage}${until}.`;
  return `${stage}${until}${end === null ? "" : ", then constant"}. ${reason}`;
}

function stepWords({ local_optimiser: optimiser }) {
  return optimiser === null ? "" : `Local steps by ${OPTIMISERS[optimiser] ?? optimiser}.`;
}

function downWords({ broadcast }) {
  return broadcast === "exact" ? "whole versions" : `${broadcast} links`;
}

function lastRoundWords(last) {
  if (last === null) return "";
  const steps =
    last.num_steps === null
      ? ""
      : `, ${stepsWords(last.num_steps)} of its middle worker`;
  return `Last round: ${short(last.tokens)} tokens${steps}, ${bytes(last.payload_bytes)} up.`;
}

function stepsWords(count) {
  return `${number(count)} local ${count === 1 ? "step" : "steps"}`;
}

function changeWords(changes) {
  if (changes.length === 0) return "";
  const each = changes.map(({ name, before, after }) => `${name} ${before} → ${after}`);
  return `From the next version on: ${each.join(", ")}.`;
}

function inShort(value) {
  return String(Number(value.toPrecision(3)));
}
