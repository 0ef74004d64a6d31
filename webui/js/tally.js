// What became of trained tokens, in words. Pure.

import { percent, short } from "./format.js";

/** What each cause of waste is called on the page. */
const CAUSES = {
  filtered: "left out by a guard or a reset",
  silent: "worker not heard of",
  stuck: "worker without progress",
  overdue: "over the time limit",
  late: "round went on without it",
  kicked: "taken away by an operator",
  released: "given back",
  failed: "reported as failed",
  reset: "out at a hard reset",
};

/** Return the tokens that were trained for nothing. */
export function wastedTokens(tally) {
  return Object.values(tally.wasted).reduce((sum, tokens) => sum + tokens, 0);
}

/** Return {cause, words, tokens} of each cause of waste, the largest first. */
export function wasteCauses(tally) {
  return Object.entries(tally.wasted)
    .map(([cause, tokens]) => ({ cause, words: CAUSES[cause] ?? cause, tokens }))
    .sort((a, b) => b.tokens - a.tokens || a.cause.localeCompare(b.cause));
}

/** Return [name, value, side] of each tile. */
export function tallyTiles(tally) {
  const wasted = wastedTokens(tally);
  const share = (tokens) => (tally.trained ? percent(tokens / tally.trained, 1) : "–");
  const [worst] = wasteCauses(tally);
  return [
    ["Tokens trained", short(tally.trained), "by all workers, in this run"],
    ["Merged", short(tally.applied), `${share(tally.applied)}, part of a version`],
    ["Waiting", short(tally.accepted), "accepted, round still open"],
    ["Wasted", short(wasted), share(wasted)],
    ["Most waste", worst ? short(worst.tokens) : "–", worst ? worst.words : "none"],
  ];
}
