// The icons: one shape per verdict and state, so that none depends on colour.

import { html } from "../lib.js";

const ring = (extra) => html`<circle cx="8" cy="8" r="6.2" ...${extra} />`;
const line = (d, width = 1.6) => html`<path d=${d} stroke-width=${width} />`;

const SHAPES = {
  computing: () => html`${ring()}<path class="solid" d="M6.5 5.2v5.6L11 8z" />`,
  slow: () => html`${ring()}${line("M8 4.4V8l2.6 1.7")}`,
  lost: () =>
    html`${ring({ "stroke-dasharray": "3 2" })}${line("M5.6 5.6l4.8 4.8m0-4.8l-4.8 4.8")}`,
  idle: () => html`<circle cx="8" cy="8" r="5.6" />`,
  waiting: () =>
    html`${ring()}${[5, 8, 11].map((x) => html`<circle class="solid" cx=${x} cy="8" r="1" />`)}`,
  draining: () => line("M2 8h7.5M6.4 4.6L9.8 8l-3.4 3.4M13 2.6v10.8"),
  gone: () => html`${ring({ "stroke-dasharray": "3 2" })}${line("M5.2 8h5.6")}`,
  stuck: () =>
    html`${line("M5.4 1.8h5.2l3.6 3.6v5.2l-3.6 3.6H5.4l-3.6-3.6V5.4z")}${line("M6.3 5.6v4.8m3.4-4.8v4.8")}`,
  ok: () => line("M2.8 8.6l3.4 3.4 7-7.6", 2),
  warn: () => html`${line("M8 1.9l6.6 11.9H1.4z")}${line("M8 6v4M8 11.2v1.4")}`,
  leased: () => line("M2.5 8h8.5M7.6 4.4L11.2 8l-3.6 3.6M13.6 3v10"),
  rest: () => line("M2 4h12M2 8h8M2 12h5"),
  dot: () => html`<circle class="solid" cx="8" cy="8" r="4" />`,
  reset: () => line("M3 8a5 5 0 1 0 1.6-3.7M3 2v3.4h3.4"),
};
const NAMES = {
  pending: "idle",
  done: "ok",
  failed: "lost",
  quarantined: "warn",
};

/** Draw an icon of 16 by 16 in the colour of the text; a name without one is a ring. */
export function Icon({ name }) {
  const shape = SHAPES[NAMES[name] ?? name] ?? SHAPES.idle;
  return html`<svg class="icon" viewBox="0 0 16 16" aria-hidden="true">${shape()}</svg>`;
}
