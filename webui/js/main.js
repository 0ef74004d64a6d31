// Starts the dashboard: the feed into the store, the store into the page.

import { worstNews } from "./answers.js";
import { duration } from "./format.js";
import { effect, html, render } from "./lib.js";
import { Live } from "./live.js";
import { beat, downForS, fleet, link, offline, takeMessage } from "./store.js";
import { Banners } from "./view/banners.js";
import { Dashboard } from "./view/dashboard.js";
import { startKeys } from "./view/help.js";
import { Brand, Status, StillNews } from "./view/topbar.js";

const LOGIN = `/login?next=${encodeURIComponent(location.pathname)}`;

const live = new Live({
  open: () => new WebSocket(`${location.origin.replace(/^http/, "ws")}/ws`),
  onMessage: takeMessage,
  onLink: (value) => {
    link.value = value;
  },
  onEnded: () => location.assign(LOGIN),
  isSessionOver,
  now: () => Date.now() / 1000,
  timers: {
    setTimeout: (act, ms) => setTimeout(act, ms),
    clearTimeout: (timer) => clearTimeout(timer),
  },
});

/** Resolve to whether the coordinator sends us to the login. */
async function isSessionOver() {
  try {
    const answer = await fetch(location.pathname, { redirect: "manual" });
    return answer.type === "opaqueredirect";
  } catch {
    return false; // nobody answers, so nobody says no
  }
}

function mount(id, part) {
  render(part, document.getElementById(id));
}

mount("brand", html`<${Brand} />`);
mount("status", html`<${Status} />`);
mount("banners", html`<${Banners} tryNow=${() => live.tryNow()} />`);
mount("main", html`<${Dashboard} />`);
mount("news", html`<${StillNews} />`);
startKeys();

effect(() => {
  document.body.classList.toggle("is-offline", offline.value);
});
effect(() => {
  const { view } = fleet.value;
  const news = offline.value
    ? `Offline ${duration(downForS.value)}`
    : view && worstNews(view);
  const name = view?.run?.preset ?? "Fleet";
  document.title = news ? `${news}: ${name}` : name;
});

setInterval(beat, 1000);
addEventListener("online", () => live.tryNow());
live.start();
