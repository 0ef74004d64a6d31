// What the page says of a run that goes back to an earlier version. Pure.

import { number } from "./format.js";

/** Return {head, rest}: what happens or has happened, and the losses behind it. */
export function rollbackWords({ version, from_version, from_loss, to_version, to_loss }) {
  const losses = `Held-out loss: ${loss(from_loss)} at v${from_version}, ${loss(to_loss)} at v${to_version}`;
  if (version === null) {
    return {
      head: `The run goes back to v${to_version}.`,
      rest: `${losses}. No training is given out until the round is closed.`,
    };
  }
  return {
    head: `The run went back to v${to_version}.`,
    rest: `${losses}, which is v${version} now.`,
  };
}

/** Return what a mark of a rollback on the loss chart says. */
export function markWords({ from, to }) {
  return `from v${from} back to v${to}`;
}

function loss(value) {
  return value === null ? "not scored" : number(value, 3);
}
