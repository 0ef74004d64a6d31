// The theme that is shown, and its colours for what is painted on a canvas.

import { themeTurn } from "./store.js";

const darkQuery = matchMedia("(prefers-color-scheme: dark)");
darkQuery.addEventListener("change", turn);

function turn() {
  themeTurn.value += 1;
}

/** Switch between dark and light, and remember it in this browser. */
export function switchTheme() {
  const { dataset } = document.documentElement;
  const shown = dataset.theme ?? (darkQuery.matches ? "dark" : "light");
  dataset.theme = shown === "dark" ? "light" : "dark";
  localStorage.setItem("theme", dataset.theme);
  turn();
}

/** Return what the named tokens are in the shown theme, as colours for a canvas. */
export function readColours(names) {
  const probe = document.body.appendChild(document.createElement("i"));
  const colours = {};
  for (const name of names) {
    probe.style.color = `var(--${name})`;
    colours[name] = getComputedStyle(probe).color;
  }
  probe.remove();
  return colours;
}
