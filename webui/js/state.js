// What the page knows, and the one pure function that changes it: `reduce`.

/** Before the first snapshot. `stale` means: ask for a snapshot, ignore events. */
export const EMPTY = Object.freeze({ view: null, seq: 0, at: null, stale: false });

/**
 * Return the state after one message of the live feed.
 *
 * A missed event makes the state stale: nothing is guessed, the next snapshot puts
 * it right. `view` has the shape of `FleetView` in coordinator/service/view.py; rows of
 * workers that are gone are not among its `workers`, but in `gone`.
 */
export function reduce(state, message) {
  if (message.kind === "resync") return { ...state, stale: true };
  const { seq, at } = message;
  if (message.kind === "snapshot") {
    const { workers } = message.body;
    return { view: withWorkers(message.body, workers), seq, at, stale: false };
  }
  if (state.stale) return state;
  if (state.view === null) return { ...state, stale: true };
  if (seq <= state.seq) return state; // we have it already
  if (seq !== state.seq + 1 || beginsAnotherRun(state.view, message)) {
    return { ...state, stale: true };
  }
  return { ...state, view: applyEvent(state.view, message), seq, at };
}

// The versions and evaluations of another run come only with a snapshot.
function beginsAnotherRun(view, { kind, body }) {
  return (
    kind === "fleet.updated" &&
    Boolean(body.run) &&
    body.run.run_id !== view.run?.run_id
  );
}

function applyEvent(view, { kind, body }) {
  switch (kind) {
    case "fleet.updated":
      return applyUpdate(view, body);
    case "version.published":
      return { ...view, versions: putByVersion(view.versions, body) };
    case "version.evaluated":
      return { ...view, evaluations: putByVersion(view.evaluations, body) };
    default:
      return view; // a kind that a newer coordinator may send
  }
}

// What an update names replaces the old, null included: "no round is open now".
function applyUpdate(view, { workers = [], lanes = [], ...parts }) {
  const merged = { ...view, ...parts };
  if (merged.round && lanes.length > 0) {
    merged.round = { ...merged.round, lanes: putByClaim(merged.round.lanes, lanes) };
  }
  if (workers.length === 0) return merged;
  return withWorkers(merged, mergeWorkers([...view.workers, ...view.gone], workers));
}

// Hundreds of workers have as many lanes, of which most stay as they are.
function putByClaim(lanes, changed) {
  const claim = (lane) => `${lane.worker_id} ${lane.task_id} ${lane.claimed_at}`;
  const byClaim = new Map(lanes.map((lane) => [claim(lane), lane]));
  for (const lane of changed) byClaim.set(claim(lane), lane);
  return [...byClaim.values()];
}

function mergeWorkers(rows, changed) {
  const byId = new Map(rows.map((row) => [row.worker_id, row]));
  for (const row of changed) byId.set(row.worker_id, row);
  return [...byId.values()];
}

// Who was put away is not of the fleet, but may come back.
function withWorkers(view, rows) {
  const isGone = ({ verdict }) => verdict === "gone";
  return {
    ...view,
    workers: rows.filter((row) => !isGone(row)),
    gone: rows.filter(isGone),
  };
}

// Replaces too: an event that fell into the taking of a snapshot is sent again.
function putByVersion(points, point) {
  const others = points.filter(({ version }) => version !== point.version);
  return [...others, point].sort((a, b) => a.version - b.version);
}
