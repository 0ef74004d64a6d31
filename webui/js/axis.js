// Labels along a line that must not overlap. Pure.

const CHAR_PX = 6;
const GAP_PX = 8;

/**
 * Return the labels that fit, the important ones first served.
 *
 * A label is {at, text, rank}: `at` from 0 to 1 along `widthPx`, rank 0 the most
 * important. The answer adds `px`, the left edge after keeping it inside the line.
 */
export function placeLabels(labels, widthPx) {
  const placed = [];
  for (const label of [...labels].sort((a, b) => a.rank - b.rank)) {
    const own = label.text.length * CHAR_PX;
    const left = label.at * widthPx - own / 2;
    const px = Math.max(0, Math.min(widthPx - own, left));
    const isFree = placed.every(
      (other) =>
        px + own + GAP_PX <= other.px ||
        other.px + other.text.length * CHAR_PX + GAP_PX <= px,
    );
    if (isFree) placed.push({ ...label, px });
  }
  return placed;
}
