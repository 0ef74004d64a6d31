// What an operator must know before anything else: at most three lines, worst first.

import { age, clockTime } from "../format.js";
import { html, signal } from "../lib.js";
import { rollbackWords } from "../rollback.js";
import { downForS, fleet, link, offline, tick } from "../store.js";
import { Icon } from "./icons.js";

/** The run whose hard reset this browser need not hear of again. */
const dismissedRun = signal(localStorage.getItem("dismissed-reset"));

/** Draw the banners; `tryNow` connects at once. */
export function Banners({ tryNow }) {
  const { view } = fleet.value;
  return html`
    ${offline.value && html`<${Offline} tryNow=${tryNow} />`}
    ${view?.insecure_http && html`<${InsecureHttp} />`}
    ${view?.run?.loss_alarm && html`<${LossAlarm} reason=${view.run.loss_alarm} />`}
    ${view?.run?.rollback && html`<${Rollback} rollback=${view.run.rollback} />`}
    ${view?.run?.reset_from_version != null && html`<${HardReset} run=${view.run} />`}
  `;
}

function Banner({ tone, icon, wide, children, button }) {
  return html`
    <div class="banner ${tone} ${wide ? "wide" : ""}">
      <${Icon} name=${icon} /><p>${children}</p>${button}
    </div>
  `;
}

function Offline({ tryNow }) {
  const { attempt, retryAt } = link.value;
  const { at } = fleet.value;
  const wait = Math.max(0, Math.ceil((retryAt ?? tick.value) - tick.value));
  const button = html`<button type="button" onClick=${tryNow}>Try now</button>`;
  const from =
    at !== null &&
    html`What you see is from ${clockTime(at, { seconds: true })},
      ${" "}${age(downForS.value)} ago. Workers go on by themselves.${" "}`;
  return html`
    <${Banner} tone="lost" icon="lost" wide button=${button}>
      <b>Connection to the coordinator is lost.</b>${" "}${from}
      ${retryAt === null ? "Trying now" : `Next try in ${wait} s`}, attempt ${attempt + 1}.
    <//>
  `;
}

function InsecureHttp() {
  return html`
    <${Banner} tone="slow" icon="warn">
      <b>This page comes over plain HTTP.</b> Who can read the network can read the
      password and take over the session. Put TLS in front, or use a tunnel.
    <//>
  `;
}

function LossAlarm({ reason }) {
  return html`
    <${Banner} tone="slow" icon="warn"><b>Held-out loss has risen.</b>${" "}${reason}<//>
  `;
}

function Rollback({ rollback }) {
  const { head, rest } = rollbackWords(rollback);
  return html`<${Banner} tone="slow" icon="reset"><b>${head}</b>${" "}${rest}<//>`;
}

function HardReset({ run }) {
  if (dismissedRun.value === run.run_id) return null;
  const dismiss = () => {
    dismissedRun.value = run.run_id;
    localStorage.setItem("dismissed-reset", run.run_id);
  };
  const button = html`
    <button type="button" class="plain" onClick=${dismiss}>Dismiss</button>
  `;
  return html`
    <${Banner} tone="slow" icon="reset" button=${button}>
      <b>Hard reset.</b> v${run.reset_from_version} does not fit this model, so training
      began anew in run ${run.run_id}. The old weights are kept.
    <//>
  `;
}
