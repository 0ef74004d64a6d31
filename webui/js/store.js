// The signals that the page is drawn from, and the clock that it goes by.

import { computed, signal } from "./lib.js";
import { EMPTY, reduce } from "./state.js";

/** A connection lost for less than this is not worth a word. */
const OFFLINE_S = 5;

export const fleet = signal(EMPTY);
export const link = signal({
  state: "connecting",
  downSince: null,
  attempt: 0,
  retryAt: null,
});
/** Seconds by the browser's clock; changes once a second. */
export const tick = signal(Date.now() / 1000);
/** Seconds that the coordinator's clock is ahead of the browser's. */
const ahead = signal(0);
/** Seconds by the coordinator's clock, for ages; stands still while offline. */
export const now = signal(tick.value);
/** Changes when the colours do. */
export const themeTurn = signal(0);

export const serverTime = computed(() => tick.value + ahead.value);
export const downForS = computed(() => {
  const { downSince } = link.value;
  return downSince === null ? 0 : tick.value - downSince;
});
export const offline = computed(() => downForS.value >= OFFLINE_S);

/** Take one message; return whether a snapshot is wanted. */
export function takeMessage(message) {
  fleet.value = reduce(fleet.value, message);
  if (message.at !== undefined) ahead.value = message.at - Date.now() / 1000;
  if (message.kind === "snapshot") beat(); // ages must not be shown by the old clock
  return fleet.value.stale;
}

/** Move the clock on; called once a second. */
export function beat() {
  tick.value = Date.now() / 1000;
  if (!offline.value) now.value = serverTime.value;
}
