// Tokens per second, the tasks by state, and the tasks that were given up.

import { number, percent, short } from "../format.js";
import { html } from "../lib.js";
import { Icon } from "./icons.js";

/** Versions of which the speed is drawn and compared with. */
const NUM_SPEEDS = 60;
/** States that are coloured only where a task is in one. */
const BAD = new Set(["slow", "stuck", "failed"]);

/** Draw the speed of the fleet, now and over the last versions. */
export function Speed({ view }) {
  const speeds = view.versions
    .map(({ tokens_per_s: speed }) => speed)
    .filter((speed) => speed !== null)
    .slice(-NUM_SPEEDS);
  const current = view.run.tokens_per_s;
  return html`
    <section class="panel speed">
      <div>
        <h2>Tokens per second</h2>
        <p class="big">${current === null ? "–" : number(current)}</p>
        <p class="side">${compared(current, speeds, view.run.state)}</p>
      </div>
      ${speeds.length > 1 && html`<${Sparkline} values=${speeds} />`}
    </section>
  `;
}

function compared(current, speeds, state) {
  if (state === "finished") return "the run is finished";
  if (current === null || speeds.length === 0) return "needs one closed round";
  const difference = current / median(speeds) - 1;
  const side = difference < 0 ? "under" : "over";
  return `${percent(Math.abs(difference))} ${side} the median of ${speeds.length} rounds`;
}

function median(values) {
  return [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];
}

function Sparkline({ values }) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const height = (value) => (46 - (42 * (value - low)) / (high - low || 1)).toFixed(2);
  const points = values.map((value, i) => {
    const x = (100 * i) / (values.length - 1);
    return `${x.toFixed(2)},${height(value)}`;
  });
  const label =
    `Tokens per second of the last ${values.length} rounds, ` +
    `from ${number(low)} to ${number(high)}`;
  return html`
    <svg viewBox="0 0 100 50" preserveAspectRatio="none" role="img" aria-label=${label}>
      <line x1="0" x2="100" y1=${height(median(values))} y2=${height(median(values))} />
      <polyline points=${points.join(" ")} />
    </svg>
  `;
}

/** Draw one tile per state. */
export function TaskCounts({ tasks }) {
  if (tasks === null) return null;
  const { pending, leased, stuck, done, failed, range_tokens: uncut } = tasks;
  const late = tasks.soft_expired;
  const tiles = [
    ["pending", "Pending", number(pending), "cut, or given back"],
    ["leased", "Leased", number(leased), "held by a worker"],
    ["slow", "Soft-expired", number(late), "alive, past forecast"],
    ["stuck", "Stuck", number(stuck), "standing still"],
    ["done", "Done", number(done), "accepted"],
    ["failed", "Failed", number(failed), "given up"],
    ["rest", "Not cut yet", short(uncut), "tokens of this epoch"],
  ];
  return html`
    <section class="panel counts" aria-label="Tasks by state">
      ${tiles.map(
        ([state, name, value, side]) => html`
        <div key=${state} class=${BAD.has(state) && value === "0" ? "" : state}>
          <h2><${Icon} name=${state} /> ${name}</h2>
          <p class="big">${value}</p>
          <p class="side">${side}</p>
        </div>`,
      )}
    </section>
  `;
}

/** Draw the latest tasks that were given up, with their reasons; nothing if none. */
export function FailedTasks({ tasks }) {
  if (!tasks || tasks.latest_failed.length === 0) return null;
  return html`
    <section class="panel failures">
      <header><h2>Failed tasks <span>latest ${tasks.latest_failed.length}</span></h2></header>
      <div class="scroll">
        <table>
          <thead>
            <tr><th>Task</th><th>Kind</th><th class="num">Attempt</th><th>Reason</th></tr>
          </thead>
          <tbody>
            ${tasks.latest_failed.map(
              (task) => html`
              <tr key=${task.task_id}>
                <td class="failed verdict"><${Icon} name="failed" /> ${task.task_id}</td>
                <td>${task.kind}</td>
                <td class="num">${task.attempt}</td>
                <td class="reason">${task.reason}</td>
              </tr>`,
            )}
          </tbody>
        </table>
      </div>
    </section>
  `;
}
