// Numbers, durations and moments in words; pure, and in one style for the whole page.

const THIN_SPACE = "\u2009";
const HARD_SPACE = "\u00a0";

const MINUTE_S = 60;
const HOUR_S = 3600;
const DAY_S = 86400;

/** Return a number with thin spaces between thousands: `4 417`. */
export function number(value, digits = 0) {
  const [whole, part] = Math.abs(value).toFixed(digits).split(".");
  const grouped = whole.replace(/\B(?=(\d{3})+$)/g, THIN_SPACE);
  const isZero = Number(value.toFixed(digits)) === 0;
  return (value < 0 && !isZero ? "−" : "") + grouped + (part ? `.${part}` : "");
}

/** Return a large count in three or four digits and a letter: `734.2 M`. */
export function short(value) {
  if (value < 1e4) return number(value);
  if (value < 1e6) return number(value / 1e3, 1) + HARD_SPACE + "k";
  if (value < 1e9) return number(value / 1e6, 1) + HARD_SPACE + "M";
  return number(value / 1e9, 2) + HARD_SPACE + "G";
}

/** Return a size in bytes as `734.2 MB`. */
export function bytes(value) {
  return short(value) + (value < 1e4 ? HARD_SPACE : "") + "B";
}

/** Return a share of one as `37 %`. */
export function percent(share, digits = 0) {
  return number(100 * share, digits) + HARD_SPACE + "%";
}

/** Return seconds as `m:ss` under an hour, then `h min`, then `d h`. */
export function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < HOUR_S) return `${Math.floor(s / MINUTE_S)}:${twoDigits(s % MINUTE_S)}`;
  if (s < DAY_S) {
    const minutes = Math.floor((s % HOUR_S) / MINUTE_S);
    return `${Math.floor(s / HOUR_S)} h ${twoDigits(minutes)} min`;
  }
  return `${Math.floor(s / DAY_S)} d ${Math.floor((s % DAY_S) / HOUR_S)} h`;
}

/** Return how long ago: `12 s` under a minute, then as `duration`. */
export function age(seconds) {
  const s = Math.max(0, Math.round(seconds));
  return s < MINUTE_S ? `${s}${HARD_SPACE}s` : duration(s);
}

/** Return a moment (Unix seconds) as local `18:42`, or `18:42:07`. */
export function clockTime(at, { seconds = false } = {}) {
  const date = new Date(at * 1000);
  const parts = [date.getHours(), date.getMinutes()];
  if (seconds) parts.push(date.getSeconds());
  return parts.map(twoDigits).join(":");
}

/** Return a moment as `18:42`, with the day before it when that is not today. */
export function dayTime(at, now, { seconds = false } = {}) {
  const time = clockTime(at, { seconds });
  const date = new Date(at * 1000);
  if (date.toDateString() === new Date(now * 1000).toDateString()) return time;
  const weekday = date.toLocaleDateString("en-GB", { weekday: "short" });
  const month = date.toLocaleDateString("en-GB", { month: "short" });
  return `${weekday} ${date.getDate()} ${month}, ${time}`;
}

/** Return the moment in UTC, for the title of a time. */
export function utc(at) {
  return new Date(at * 1000).toISOString().slice(0, 19).replace("T", " ") + " UTC";
}

/** Return "1 task", "2 tasks". */
export function count(amount, noun) {
  return `${number(amount)} ${noun}${amount === 1 ? "" : "s"}`;
}

function twoDigits(value) {
  return String(value).padStart(2, "0");
}
