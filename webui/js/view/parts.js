// Small parts that several panels share: rich text, times, work bars, commands.

import { html, useLayoutEffect, useRef, useState } from "../lib.js";
import { percent, utc } from "../format.js";

/** Draw a list of texts, where {b: text} is emphasised. */
export function Rich({ parts }) {
  return parts.map((part) => (part.b === undefined ? part : html`<b>${part.b}</b>`));
}

/** Draw a moment as words, with the moment itself for machines and for the pointer. */
export function Time({ at, children }) {
  const stamp = new Date(at * 1000).toISOString();
  return html`<time datetime=${stamp} title=${utc(at)}>${children}</time>`;
}

/**
 * Draw work against forecast: fill = done, tick = expected by now, hatch = shortfall.
 *
 * `expected` is null where there is no forecast.
 */
export function WorkBar({ done, expected, tone }) {
  const short = expected === null ? 0 : expected - done;
  const label =
    `${percent(done)} done` +
    (expected === null ? "" : `, ${percent(expected)} expected by now`);
  return html`
    <div class="workbar ${tone}" role="img" aria-label=${label}>
      <i style=${{ width: share(done) }}></i>
      ${
        short > 0.02 &&
        html`<u style=${{ left: share(done), width: share(short) }}></u>`
      }
      ${expected !== null && html`<s style=${{ left: share(expected) }}></s>`}
    </div>
  `;
}

/** Return a share of one as a length of CSS. */
export function share(value) {
  return `${(100 * value).toFixed(2)}%`;
}

/** Draw a command with a button that copies it. */
export function Command({ text }) {
  const block = useRef(null);
  const [said, setSaid] = useState("Copy");
  const copy = () => {
    getSelection().selectAllChildren(block.current);
    // navigator.clipboard exists only where the page came over https or loopback.
    setSaid(document.execCommand("copy") ? "Copied" : "Selected");
  };
  return html`
    <div class="command">
      <pre ref=${block}>${text}</pre>
      <button type="button" onClick=${copy}>${said}</button>
    </div>
  `;
}

/** Return a ref and the width in pixels of what it is put on. */
export function useWidth() {
  const box = useRef(null);
  const [width, setWidth] = useState(0);
  useLayoutEffect(() => {
    const observer = new ResizeObserver(([entry]) => {
      setWidth(Math.floor(entry.contentRect.width));
    });
    observer.observe(box.current);
    return () => observer.disconnect();
  }, []);
  return [box, width];
}
