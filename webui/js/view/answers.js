// The first strip: four questions, answered in words, and the line of the run.

import {
  isItLearning,
  progressWords,
  roundMoment,
  whatIsStuck,
  whenIsItDone,
  whoIsSlow,
} from "../answers.js";
import { placeLabels } from "../axis.js";
import { dayTime, duration } from "../format.js";
import { html } from "../lib.js";
import { fleet, now } from "../store.js";
import { Icon } from "./icons.js";
import { Rich, Time, share, useWidth } from "./parts.js";

/** Draw the strip. */
export function Answers() {
  const { view, at } = fleet.value;
  const moment = now.value;
  const asked = [
    ["Is it learning?", isItLearning(view, moment)],
    ["Who is slow?", whoIsSlow(view, moment)],
    ["What is stuck?", whatIsStuck(view, moment, at)],
    ["When is it done?", whenIsItDone(view, moment)],
  ];
  return html`
    <section class="panel answers" aria-label="Answers">
      <div class="row">
        ${asked.map(
          ([question, given]) => html`
          <${Answer} key=${question} question=${question} given=${given} />`,
        )}
      </div>
      ${view.run && html`<${RunLine} run=${view.run} moment=${moment} />`}
    </section>
  `;
}

function Answer({ question, given }) {
  const { tone, icon, answer, small, lines } = given;
  return html`
    <div class="answer ${tone}">
      <h2>${question}</h2>
      <p class="said">
        ${icon && html`<${Icon} name=${icon} />`}
        <strong>${answer}</strong>${small && html`<span title=${small}>${small}</span>`}
      </p>
      ${lines.map((parts) => html`<p><${Rich} parts=${parts} /></p>`)}
    </div>
  `;
}

// A time axis, not percent: start, now, and the window in which the run may end.
function RunLine({ run, moment }) {
  const [box, width] = useWidth();
  const isOver = run.state === "finished";
  const { at, earliest_at: earliest, latest_at: latest } = run.eta;
  const isKnown = at !== null && !isOver;
  const end = isKnown ? Math.max(latest, at, moment) : moment;
  // Without a known end nothing is filled: half a bar would look like half the work.
  const span = Math.max(1, end - run.started_at) * (isKnown ? 1.04 : isOver ? 1 : 2);
  const place = (time) => Math.max(0, Math.min(1, (time - run.started_at) / span));
  const seconds = span < 1800;
  const say = (time) => dayTime(time, moment, { seconds });
  const labels = [
    { at: 0, text: say(run.started_at), rank: 2 },
    { at: place(moment), text: isOver ? "finished" : "now", rank: 1 },
  ];
  const due = isKnown && say(roundMoment(at, run.eta));
  if (isKnown) labels.push({ at: place(at), text: due, rank: 0, strong: true });
  else if (!isOver) labels.push({ at: 1, text: "end unknown", rank: 3 });
  return html`
    <div class="run">
      <span><${Rich} parts=${progressWords(run)} /></span>
      <div class="line" ref=${box}>
        <div class="rail">
          ${(isKnown || isOver) && html`<i style=${{ width: share(place(moment)) }}></i>`}
          ${
            isKnown &&
            latest > earliest &&
            html`<u style=${{
              left: share(place(Math.max(earliest, moment))),
              width: share(place(latest) - place(Math.max(earliest, moment))),
            }}></u>`
          }
          <s style=${{ left: share(place(moment)) }}></s>
          ${isKnown && html`<s style=${{ left: share(place(at)) }}></s>`}
        </div>
        ${placeLabels(labels, width).map(
          ({ text, px, strong }) => html`
          <span class=${strong ? "mark strong" : "mark"} style=${{ left: `${px}px` }}>
            ${text}
          </span>`,
        )}
      </div>
      <span>
        ${isOver ? "ran" : "running"} <${Time} at=${run.started_at}>
          ${duration((isOver ? run.newest_version_at : moment) - run.started_at)}
        <//>
      </span>
    </div>
  `;
}
