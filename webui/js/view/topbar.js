// The top bar: name of the run, live mark, clock, theme, help; and the spoken news.

import { switchTheme } from "../colours.js";
import { clockTime, duration } from "../format.js";
import { html } from "../lib.js";
import { downForS, fleet, link, offline, serverTime } from "../store.js";
import { standingStill } from "../workers.js";
import { openHelp } from "./help.js";
import { Icon } from "./icons.js";

/** Draw what is trained here. */
export function Brand() {
  const run = fleet.value.view?.run;
  return html`BitNet fleet${run && html` <span class="of">${run.preset}</span>`}`;
}

/** Draw the right end of the bar. */
export function Status() {
  const at = serverTime.value;
  return html`
    <${LiveMark} />
    <span class="clock">${clockTime(at, { seconds: true })}</span>
    <button type="button" class="plain" onClick=${switchTheme}
      aria-label="Switch theme" title="Switch theme (t)">
      <${ThemeIcon} />
    </button>
    <button type="button" class="plain" onClick=${openHelp}
      aria-label="Keyboard shortcuts" title="Keyboard shortcuts (?)">?</button>
  `;
}

function LiveMark() {
  if (offline.value) {
    const words = `Offline ${duration(downForS.value)}`;
    return html`<span class="live lost"><${Icon} name="lost" /> ${words}</span>`;
  }
  const isLive = link.value.state === "live";
  return html`
    <span class="live ${isLive ? "ok" : "idle"}">
      <${Icon} name=${isLive ? "dot" : "idle"} /> ${isLive ? "Live" : "Connecting"}
    </span>
  `;
}

function ThemeIcon() {
  return html`
    <svg class="icon" viewBox="0 0 16 16" aria-hidden="true">
      <circle cx="8" cy="8" r="5.5" /><path class="solid" d="M8 2.5a5.5 5.5 0 0 1 0 11z" />
    </svg>
  `;
}

/** Say who stands still, in a place that screen readers read out when it changes. */
export function StillNews() {
  const { lost, stuck } = standingStill(fleet.value.view?.workers ?? []);
  return [...lost, ...stuck].map(
    ({ name, verdict }) => html`<p key=${name}>Worker ${name} is ${verdict}.</p>`,
  );
}
