// The panel of ternary health: zeros, flips and drift of the scale, by layer and matrix.

import { html } from "../lib.js";
import { heatMaps } from "../ternary.js";

/** Draw three small heat maps of the newest scored version. */
export function TernaryPanel({ ternary }) {
  const { version, before } = ternary;
  return html`
    <section class="panel ternary" aria-label="Ternary health">
      <header>
        <h2>Ternary health <span>v${version}${before !== null && `, since v${before}`}</span></h2>
      </header>
      <div class="maps">
        ${heatMaps(ternary).map((map) => html`<${HeatMap} key=${map.title} map=${map} />`)}
      </div>
    </section>
  `;
}

function HeatMap({ map: { title, range, most, rows } }) {
  if (rows.length === 0) {
    return html`<div><h3>${title}</h3><p class="side">Needs two versions to compare.</p></div>`;
  }
  return html`
    <div>
      <h3>${title} <b>${range}</b></h3>
      <p class="side">${most}</p>
      <div role="img" aria-label=${`${title} by layer and matrix: ${range}, ${most}`}>
        ${rows.map(
          ({ name, cells }) => html`
          <div class="heat" key=${name}>
            <span>${name}</span>
            ${cells.map(
              (cell) => html`
              <i key=${cell.title} title=${cell.title}
                style=${{ "--heat": `${8 + 92 * cell.heat}%` }}></i>`,
            )}
          </div>`,
        )}
      </div>
    </div>
  `;
}
