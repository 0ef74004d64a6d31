// Links that download the best and the newest version for other software.

import { exportRows } from "../exports.js";
import { html } from "../lib.js";

/** Draw one row a version. */
export function ExportsPanel({ view }) {
  return html`
    <section class="panel exports" aria-label="Download">
      <header><h2>Download <span>for other software</span></h2></header>
      <table>
        <tbody>
          ${exportRows(view).map(
            ({ title, score, links }) => html`
            <tr key=${title}>
              <th scope="row">${title} <span>${score}</span></th>
              <td>
                ${links.map(
                  ({ words, href }) => html`<a key=${words} href=${href} download>${words}</a>`,
                )}
              </td>
            </tr>`,
          )}
        </tbody>
      </table>
    </section>
  `;
}
