// The open round: who has a task of it, since when, and when it should be back.

import { duration } from "../format.js";
import { html } from "../lib.js";
import { layOutRound } from "../lanes.js";
import { fleet, now } from "../store.js";
import { share } from "./parts.js";

/** Draw the panel. */
export function RoundPanel() {
  const { round, training, workers } = fleet.value.view;
  if (round === null) {
    return html`
      <section class="panel"><header><h2>Round</h2></header>
        <p class="none"><b>None is open.</b> A round opens with the run.</p></section>
    `;
  }
  const laid = layOutRound(round, workers, now.value);
  return html`
    <section class="panel round">
      <header>
        <h2>Round ${round.round_id} <span>on v${round.base_version}</span></h2>
        <div class="tools">${standing(round, training, laid)}</div>
      </header>
      ${
        round.lanes.length === 0
          ? html`<p class="none"><b>Nobody has claimed yet.</b> The round is open for${" "}
            ${duration(now.value - round.opened_at)}.</p>`
          : html`<${Lanes} round=${round} laid=${laid} />`
      }
    </section>
  `;
}

function standing(round, { aggregation }, { numBack, leftS }) {
  if (aggregation === "per-arrival") return "each submission makes a version";
  if (round.state === "closing") return "all back, the step is computed";
  if (round.lanes.length === 0) return "";
  return html`
    <span>
      <b>${numBack} of ${round.lanes.length}</b> back${
        leftS !== null && html`, about <b>${duration(leftS)}</b> left`
      }
    </span>
  `;
}

function Lanes({ round, laid }) {
  const { lanes, hidden, spanS, elapsedS } = laid;
  const place = (seconds) => share(Math.min(1, seconds / spanS));
  const isFar = Math.abs(elapsedS - round.round_s) / spanS > 0.22;
  return html`
    <div class="lanes">
      ${lanes.map((lane) => html`<${Lane} key=${lane.id} lane=${lane} place=${place} />`)}
      <div class="lines" aria-hidden="true">
        <i class="should" style=${{ left: place(round.round_s) }}></i>
        <i class="now" style=${{ left: place(elapsedS) }}></i>
      </div>
      <div class="lane scale" aria-hidden="true">
        <span></span>
        <div class="track">
          <span class="now" style=${{ left: place(elapsedS) }}>${duration(elapsedS)}</span>
          ${
            isFar &&
            html`<span style=${{ left: place(round.round_s) }}>
            ${duration(round.round_s)}</span>`
          }
        </div>
        <span></span>
      </div>
    </div>
    <p class="key">
      ${hidden && html`Not listed: ${hidden}. `}Solid: back. Outline: computing. Tick:
      forecast. Hatch: late. Dotted: ${duration(round.round_s)}, what a task should take. ${round.round_reason}
    </p>
  `;
}

function Lane({ lane, place }) {
  const { name, title, state, tone, note, startS, endS, dueS, lateS } = lane;
  const until = lateS > 0 ? dueS : endS;
  const bar = {
    left: place(startS),
    width: `calc(${place(until)} - ${place(startS)})`,
  };
  return html`
    <div class="lane ${tone}" title=${title}>
      <span class="who">${name}</span>
      <div class="track">
        <i class=${state} style=${bar}></i>
        ${
          lateS > 0 &&
          html`<u style=${{
            left: place(dueS),
            width: `calc(${place(endS)} - ${place(dueS)})`,
          }}></u>`
        }
        ${dueS !== null && html`<s style=${{ left: place(dueS) }}></s>`}
      </div>
      <span class="note">${note}</span>
    </div>
  `;
}
