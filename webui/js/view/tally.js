// What became of all trained tokens: merged, waiting, or wasted, and by what.

import { short } from "../format.js";
import { html } from "../lib.js";
import { tallyTiles, wasteCauses } from "../tally.js";

/** Draw one tile per fate; pointing at it names every cause of waste. */
export function TokenTally({ tally }) {
  const causes = wasteCauses(tally)
    .map(({ words, tokens }) => `${words}: ${short(tokens)}`)
    .join("\n");
  return html`
    <section class="panel counts tokens" aria-label="Trained tokens by what became of them"
      title=${causes}>
      ${tallyTiles(tally).map(
        ([name, value, side]) => html`
        <div key=${name}>
          <h2>${name}</h2>
          <p class="big">${value}</p>
          <p class="side">${side}</p>
        </div>`,
      )}
    </section>
  `;
}
