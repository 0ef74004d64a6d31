// The page from top to bottom: answers, loss and round, speed and counts, workers.

import { splitCommands } from "../command.js";
import { number } from "../format.js";
import { html } from "../lib.js";
import { fleet } from "../store.js";
import { Answers } from "./answers.js";
import { FailedTasks, Speed, TaskCounts } from "./counts.js";
import { ExportsPanel } from "./exports.js";
import { LossPanel } from "./loss.js";
import { Command } from "./parts.js";
import { RoundPanel } from "./round.js";
import { TokenTally } from "./tally.js";
import { TernaryPanel } from "./ternary.js";
import { WorkersPanel } from "./workers.js";

/** Draw all there is to see. */
export function Dashboard() {
  const { view } = fleet.value;
  if (view === null) {
    return html`<section class="panel empty"><p>Waiting for the first snapshot.</p></section>`;
  }
  return html`
    <h1 class="unseen">Dashboard</h1>
    <${Answers} />
    ${view.missing !== null && html`<${Missing} view=${view} />`}
    ${view.run !== null && html`<${Proof} view=${view} />`}
    ${
      view.workers.length > 0 || view.missing === null
        ? html`<${WorkersPanel} />`
        : null
    }
    <${FailedTasks} tasks=${view.tasks} />
    ${view.ternary && html`<${TernaryPanel} ternary=${view.ternary} />`}
    ${view.run !== null && html`<${ExportsPanel} view=${view} />`}
    <p class="foot">
      bitnet-fleet ${view.package_version}. Event loop of the coordinator: at most
      ${" "}${number(view.server.loop_lag_ms)} ms late in the last 10 s.
    </p>
  `;
}

function Proof({ view }) {
  return html`
    <div class="grid">
      <div class="span8"><${LossPanel} view=${view} /></div>
      <div class="span4"><${RoundPanel} /></div>
      <div class="span3"><${Speed} view=${view} /></div>
      <div class="span9"><${TaskCounts} tasks=${view.tasks} /></div>
      <div class="span12"><${TokenTally} tally=${view.run.tally} /></div>
    </div>
  `;
}

function Missing({ view }) {
  const begun = view.run !== null && view.run.epoch > 0;
  return html`
    <section class="panel empty">
      <h2>${begun ? "Training has stopped" : "Training can't begin yet"}</h2>
      ${splitCommands(view.missing).map((part) =>
        part.command
          ? html`<${Command} text=${part.command} />`
          : html`<p>${part.text}</p>`,
      )}
    </section>
  `;
}
