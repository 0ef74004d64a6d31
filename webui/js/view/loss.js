// The panel of the loss: what is shown of it, the chart, the version pointed at, and how
// the run trains.

import { dayTime, number, short } from "../format.js";
import { html, useEffect, useMemo, useRef, useState } from "../lib.js";
import { lossSeries } from "../lossdata.js";
import { markWords } from "../rollback.js";
import { now, themeTurn } from "../store.js";
import { trainingWords } from "../training.js";
import { makeLossPlot } from "./lossplot.js";
import { Rich, useWidth } from "./parts.js";

const RANGES = [
  ["All", null],
  ["Last 200", 200],
  ["Last 50", 50],
];
const TIP_PX = 190;

/** Draw the panel; `view` is the whole view. */
export function LossPanel({ view }) {
  const [numLast, setNumLast] = useState(200);
  const [smoothing, setSmoothing] = useState(0.6);
  const { versions, evaluations, run, training } = view;
  const { second_stage_tokens: secondStageTokens } = training;
  const series = useMemo(
    () => lossSeries(versions, evaluations, { numLast, smoothing, secondStageTokens }),
    [versions, evaluations, numLast, smoothing, secondStageTokens],
  );
  const isEmpty = [...series.train, ...series.held].every((value) => value === null);
  return html`
    <section class="panel loss">
      <header>
        <h2>Loss by weight version</h2>
        <div class="tools">
          <${Legend} />
          <label class="range">Smoothing
            <input type="range" min="0" max="0.95" step="0.05" value=${smoothing}
              onInput=${(event) => setSmoothing(Number(event.target.value))} />
          </label>
          <span class="switch">
            ${RANGES.map(
              ([words, value]) => html`
              <button type="button" aria-pressed=${value === numLast}
                onClick=${() => setNumLast(value)}>${words}</button>`,
            )}
          </span>
        </div>
      </header>
      ${
        isEmpty
          ? html`<p class="none"><b>Not yet.</b> v${run.newest_version} is ready. Loss
            appears after the first round.</p>`
          : html`<${Chart} view=${view} series=${series} />`
      }
      <p class="key"><${Rich} parts=${trainingWords(training, run.plan_changes)} /></p>
    </section>
  `;
}

function Legend() {
  return html`
    <span class="legend">
      <span><i class="held"></i>held-out</span>
      <span><i class="train"></i>training, smoothed</span>
      <span><i class="one"></i>one version</span>
    </span>
  `;
}

function Chart({ view, series }) {
  const [box, width] = useWidth();
  const plot = useRef(null);
  const latest = useRef(null);
  const [point, setPoint] = useState(null);
  const hasHeld = view.evaluations.length > 0;
  const gzip = hasHeld ? view.run.gzip_bits_per_byte * series.natsPerBit : null;
  latest.current = { series, gzip };
  const isWide = width >= 520;

  // Which axes there are is fixed when a chart is made, so these make a new one.
  useEffect(() => {
    if (width === 0) return undefined;
    plot.current = makeLossPlot(
      box.current,
      width,
      () => latest.current,
      (i, left) => setPoint(i === null || left < 0 ? null : { i, left }),
    );
    return () => plot.current.destroy();
  }, [isWide, width === 0, hasHeld]);
  useEffect(() => plot.current?.resize(width), [width]);
  useEffect(() => plot.current?.update(), [series, gzip]);
  useEffect(() => plot.current?.recolour(), [themeTurn.value]);

  const move = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !plot.current) return;
    event.preventDefault();
    const last = series.x.length - 1;
    const from = point?.i ?? last;
    const to = from + step * (event.shiftKey ? 10 : 1);
    plot.current.pointAt(Math.max(0, Math.min(last, to)));
  };
  return html`
    <div class="chart" tabindex="0" role="img" aria-label=${inWords(view, series)} onKeyDown=${move}>
      <div class="scales">
        <span>${hasHeld ? "bits per byte" : ""}</span>
        <span>${isWide || !hasHeld ? "nats per token" : ""}</span>
      </div>
      <div ref=${box}></div>
      ${
        point !== null &&
        series.x[point.i] !== undefined &&
        html`
        <${Tip} view=${view} series=${series} point=${point} width=${width} />`
      }
    </div>
  `;
}

function inWords({ evaluations, run }, { rollbacks, secondStage }) {
  const backs = rollbacks.map((mark) => ` The run went ${markWords(mark)}.`);
  const stage = secondStage === null ? "" : ` Second stage from v${secondStage} on.`;
  const marks = stage + backs.join("");
  if (evaluations.length === 0) return `Training loss by weight version.${marks}`;
  const last = evaluations.at(-1);
  const best = run.best_version === null ? "" : ` Best is v${run.best_version}.`;
  return (
    "Held-out and training loss by weight version. Held-out is " +
    `${number(last.bits_per_byte, 3)} bits per byte at v${last.version}.${best}${marks}`
  );
}

function Tip({ view, series, point, width }) {
  const id = series.x[point.i];
  const version = view.versions.find((each) => each.version === id);
  const score = view.evaluations.find((each) => each.version === id);
  const back = series.rollbacks.find((each) => each.version === id);
  const rows = [
    ["Held-out, bits per byte", score?.bits_per_byte],
    ["Held-out, nats per token", score?.loss],
    ["Training, smoothed", series.smooth[point.i]],
    ["Training, this version", series.train[point.i]],
  ].filter(([, value]) => value !== undefined && value !== null);
  const left = Math.max(0, Math.min(width - TIP_PX, point.left + 58));
  const tokens = (version ?? score).tokens_total;
  return html`
    <div class="tip" style=${{ left: `${left}px` }}>
      <b>v${id}</b> <span>${short(tokens)} tokens${
        version && `, ${dayTime(version.at, now.value, { seconds: true })}`
      }${back ? `, ${markWords(back)}` : ""}</span>
      <dl>
        ${rows.map(([name, value]) => html`<dt>${name}</dt><dd>${number(value, 3)}</dd>`)}
      </dl>
    </div>
  `;
}
