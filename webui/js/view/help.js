// The keys of the page, and the list of them.

import { switchTheme } from "../colours.js";

/** Open the list of keys. */
export function openHelp() {
  document.getElementById("help").showModal();
}

/** Listen to the keys; off while somebody types or a modifier is held. */
export function startKeys() {
  addEventListener("keydown", (event) => {
    const isTyping = event.target.matches?.(
      "input:not([type=range]), textarea, select",
    );
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "t") switchTheme();
    if (event.key === "?") openHelp();
  });
}
