// Which exports the page offers: of the best version and of the newest one. Pure.

import { number } from "./format.js";

/** What is offered of each version: the words, the format, the variant. */
const OFFERED = [
  ["llama.cpp TQ2_0", "gguf", "TQ2_0"],
  ["llama.cpp TQ1_0", "gguf", "TQ1_0"],
  ["transformers", "hf", "packed"],
  ["master weights", "safetensors", "master"],
];

/** Return {title, score, links}: one for the best version, one for the newest. */
export function exportRows({ run, evaluations }) {
  const wished = [];
  if (run.best_version !== null) wished.push(["Best", run.best_version]);
  if (run.newest_version !== run.best_version) {
    wished.push(["Latest", run.newest_version]);
  } else {
    wished[0][0] = "Best and latest";
  }
  return wished.map(([word, version]) => ({
    title: `${word}: v${version}`,
    score: scoreOf(version, evaluations),
    links: OFFERED.map(([words, ...form]) => ({ words, href: address(version, ...form) })),
  }));
}

function scoreOf(version, evaluations) {
  const found = evaluations.find((evaluation) => evaluation.version === version);
  return found ? `${number(found.bits_per_byte, 3)} bits per byte` : "not scored";
}

// By its number: what is downloaded is what was shown, whatever came meanwhile.
function address(version, format, variant) {
  const asked = new URLSearchParams({ version, format, variant });
  return `/api/admin/export?${asked}`;
}
