// The workers, worst first: a table, cards on a phone, cells where there are hundreds.

import { age, count, duration, number, percent, short } from "../format.js";
import { html, useRef, useState } from "../lib.js";
import { fleet, now } from "../store.js";
import { wastedTokens } from "../tally.js";
import { factWords, needsLook, orderRows, taskProgress } from "../workers.js";
import { Icon } from "./icons.js";
import { Rich, WorkBar } from "./parts.js";

/** With more workers than this, each is a cell and the table lists the bad ones. */
const MANY = 40;
const HEAD = [
  "Verdict",
  "Worker",
  "Evidence",
  "CPU",
  "Tokens/s, calibrated",
  "Task: done, elapsed of forecast",
  "Tasks done",
  "Tokens accepted",
  "Heartbeat",
];
const NUMERIC = new Set([4, 6, 7, 8]);

/** Draw the panel. */
export function WorkersPanel() {
  const { workers, gone } = fleet.value.view;
  if (workers.length === 0) {
    return html`
      <section class="panel empty">
        <h2>No worker has connected</h2>
        <p>Start one on any box with 2 GB free: point${" "}
          <code>BITNET_COORDINATOR_URL</code> at this coordinator, put its key into${" "}
          <code>BITNET_WORKER_API_KEY</code>, and run <code>bitnet-worker run</code>.</p>
      </section>
    `;
  }
  return html`<${Table} workers=${workers} gone=${gone} />`;
}

function Table({ workers, gone }) {
  const order = useRef(null);
  const [isHeld, setHeld] = useState(false);
  order.current = orderRows(order.current, workers, now.value, isHeld);
  const byId = new Map(workers.map((worker) => [worker.worker_id, worker]));
  const rows = order.current.ids.map((id) => byId.get(id));
  const isMany = rows.length > MANY;
  const listed = isMany ? rows.filter((row) => needsLook(row, now.value)) : rows;
  const showOrder = () => {
    order.current = null;
    setHeld(false);
  };
  const leave = (event) => {
    if (!event.currentTarget.contains(event.relatedTarget)) setHeld(false);
  };
  return html`
    <section class="panel workers" onPointerEnter=${() => setHeld(true)}
      onPointerLeave=${() => setHeld(false)} onFocusIn=${() => setHeld(true)}
      onFocusOut=${leave}>
      <header>
        <h2>Workers <span>${rows.length}, worst first</span></h2>
        ${
          order.current.waits &&
          html`
          <button type="button" onClick=${showOrder}>Order changed, show</button>`
        }
        <div class="tools"><${Tally} workers=${workers} gone=${gone} /></div>
      </header>
      ${isMany && html`<${Cells} rows=${rows} />`}
      ${
        listed.length > 0 &&
        html`
        <div class="scroll">
          <table>
            <thead><tr>${HEAD.map(
              (words, i) => html`
              <th class=${NUMERIC.has(i) ? "num" : ""}>${words}</th>`,
            )}</tr></thead>
            <tbody>${listed.map(
              (worker) => html`
              <${Row} key=${worker.worker_id} worker=${worker} />`,
            )}</tbody>
          </table>
        </div>`
      }
    </section>
  `;
}

function Tally({ workers, gone }) {
  const names = new Map();
  for (const { verdict, name } of [...workers, ...gone])
    names.set(verdict, [...(names.get(verdict) ?? []), name]);
  return [...names].sort().map(
    ([verdict, those]) => html`
    <span key=${verdict} class="tally ${verdict}" title=${those.join(", ")}>
      <${Icon} name=${verdict} /> <b>${those.length}</b> ${verdict}
    </span>`,
  );
}

function Cells({ rows }) {
  return html`
    <div class="cells">
      ${rows.map(
        (worker) => html`
        <span key=${worker.worker_id} class=${worker.verdict} role="img"
          aria-label="${worker.name}: ${worker.verdict}"
          title="${worker.name}: ${worker.verdict}. ${worker.evidence}">
          <${Icon} name=${worker.verdict} />
        </span>`,
      )}
    </div>
  `;
}

function Row({ worker }) {
  const { verdict } = worker;
  const wasted = wastedTokens(worker.books.tally);
  return html`
    <tr>
      <td class="verdict ${verdict}">
        <${Icon} name=${verdict} /> ${verdict[0].toUpperCase() + verdict.slice(1)}
      </td>
      <td class="name" title=${worker.worker_id}>${worker.name}</td>
      <td class="why" title=${factWords(worker, now.value)}>
        ${worker.evidence}
        ${worker.books.duration_alarm !== null && ` ${worker.books.duration_alarm}`}
      </td>
      <td class="cpu" title=${worker.cpu_model}>
        ${worker.isa}<span>${count(worker.threads, "thread")}</span>
      </td>
      <${Speed} worker=${worker} />
      <td class="task"><${Task} worker=${worker} /></td>
      <td class="num" data-name="tasks">
        ${number(worker.tasks_done)}
        ${
          worker.tasks_failed > 0 &&
          html`<span class="bad">
          ${number(worker.tasks_failed)} failed</span>`
        }
      </td>
      <td class="num accepted">
        ${short(worker.tokens_accepted)}
        ${wasted > 0 && html`<span class="bad">${short(wasted)} wasted</span>`}
      </td>
      <${Heartbeat} worker=${worker} />
    </tr>
  `;
}

function Speed({ worker }) {
  const { tokens_per_s: measured, calibrated_tokens_per_s: calibrated } = worker;
  const { spread } = worker.books;
  return html`
    <td class="num" data-name="tok/s"
      title=${spread === null ? "" : `spread ${percent(spread)}`}>
      ${measured === null ? "–" : number(measured)}
      ${calibrated !== null && html`<span>of ${number(calibrated)}</span>`}
    </td>
  `;
}

function Heartbeat({ worker }) {
  const isLost = worker.verdict === "lost";
  return html`
    <td class="num beat ${isLost ? "lost" : ""}" data-name="heartbeat"
      title="every ${worker.heartbeat_s} s">${age(now.value - worker.heartbeat_at)}</td>
  `;
}

function Task({ worker }) {
  const progress = taskProgress(worker, now.value);
  if (progress === null) return html`<p class="no">no task</p>`;
  const { done, expected, elapsedS, predictedS, lateS } = progress;
  const forecast = predictedS ? ` of ${duration(predictedS)}` : "";
  const words = [{ b: percent(done) }, `, ${duration(elapsedS)}${forecast}`];
  const tone = worker.verdict === "computing" && lateS >= 1 ? "slow" : worker.verdict;
  return html`
    <p>
      <span title="phase: ${worker.phase}">${worker.task_id}</span>
      <span><${Rich} parts=${words} /></span>
    </p>
    <${WorkBar} done=${done} expected=${expected} tone=${tone} />
  `;
}
