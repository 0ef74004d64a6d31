// Invented views in the exact shape of coordinator/service/view.py, for the tests.
//
// Run as a program it prints one as JSON; test_node.py decodes that by the contract.

export const NOW = 1_000_000;

export function run(given = {}) {
  return {
    run_id: "r1",
    state: "running",
    preset: "tiny",
    num_params: 1_300_000,
    started_at: NOW - 600,
    stop_at: null,
    token_budget: 4_000_000,
    tokens_accepted: 1_000_000,
    epoch: 2,
    epoch_tokens: 800_000,
    epoch_tokens_accepted: 200_000,
    newest_version: 5,
    newest_version_at: NOW - 47,
    best_version: 5,
    gzip_bits_per_byte: 2.5,
    tokens_per_s: 1700,
    eta: { at: null, earliest_at: null, latest_at: null, reason: "Needs a round." },
    tally: tally(),
    loss_alarm: null,
    rollback: null,
    plan_changes: [],
    reset_from_version: null,
    ...given,
  };
}

export function tally(given = {}) {
  return { trained: 0, accepted: 0, applied: 0, wasted: {}, ...given };
}

export function books(given = {}) {
  return {
    spread: null,
    duration_ratio: null,
    duration_alarm: null,
    tally: tally(),
    ...given,
  };
}

export function facts(given = {}) {
  return {
    heartbeat_age_s: 2,
    heartbeat_s: 5,
    tokens_done: null,
    num_tokens: null,
    no_progress_s: 0,
    elapsed_s: 0,
    predicted_s: null,
    progress_age_s: null,
    cpu_s_since_progress: null,
    lease_lost_s: null,
    back_in_round: false,
    quarantine: null,
    draining: false,
    is_gone: false,
    has_stopped: false,
    ...given,
  };
}

export function worker(name, given = {}) {
  return {
    worker_id: `w-${name}`,
    name,
    verdict: "idle",
    evidence: "Holds no task.",
    facts: facts(),
    phase: "idle",
    draining: false,
    cpu_model: "A CPU",
    isa: "AVX2",
    threads: 8,
    heartbeat_at: NOW - 2,
    heartbeat_s: 5,
    task_id: null,
    tokens_done: null,
    num_tokens: null,
    claimed_at: null,
    predicted_s: null,
    tokens_per_s: null,
    calibrated_tokens_per_s: null,
    tokens_accepted: 0,
    tasks_done: 0,
    tasks_failed: 0,
    books: books(),
    ...given,
  };
}

/** A worker that has computed for so long, at a task forecast to take 100 s. */
export function computing(name, elapsed_s, given = {}) {
  return worker(name, {
    verdict: "computing",
    task_id: `t-${name}`,
    tokens_done: 500,
    num_tokens: 1000,
    claimed_at: NOW - elapsed_s,
    predicted_s: 100,
    ...given,
  });
}

export function lane(name, given = {}) {
  return {
    worker_id: `w-${name}`,
    task_id: `t-${name}`,
    num_tokens: 1000,
    tokens_done: 500,
    claimed_at: NOW - 50,
    predicted_s: 80,
    ended_at: null,
    outcome: null,
    ...given,
  };
}

export function round(lanes, given = {}) {
  return {
    round_id: 5,
    base_version: 5,
    state: "open",
    opened_at: NOW - 60,
    first_claim_at: NOW - 50,
    round_s: 100,
    round_reason: "Overhead 3 s of 100 s = 3 %. Fixed.",
    overhead_s: 3,
    lanes,
    ...given,
  };
}

export function training(given = {}) {
  return {
    round_kind: "delta",
    aggregation: "rounds",
    local_optimiser: "muon",
    learning_rate: 0.00147,
    peak_rate: 0.002,
    stage: "first stage",
    stage_end_tokens: 2_000_000,
    second_stage_tokens: 2_000_000,
    constant_reason: null,
    weight_decay: 0.1,
    codec: "int8",
    broadcast: "exact",
    last_round: { tokens: 20_480, payload_bytes: 2_600_000, num_steps: 40 },
    ...given,
  };
}

export function tasks(given = {}) {
  return {
    pending: 3,
    leased: 1,
    done: 20,
    failed: 0,
    soft_expired: 0,
    stuck: 0,
    range_tokens: 5000,
    latest_failed: [],
    ...given,
  };
}

export function version(number, given = {}) {
  return {
    version: number,
    at: NOW - 100 + number,
    tokens_total: 1000 * number,
    num_submissions: 2,
    train_loss: 3,
    rolled_back_to: null,
    tokens_per_s: 1700,
    ...given,
  };
}

/** Evaluations of v1, v2, ... with these bits per byte. */
export function evaluations(...scores) {
  return scores.map((score, i) => evaluation(i + 1, score));
}

export function evaluation(number, score) {
  return {
    version: number,
    tokens_total: 1000 * number,
    loss: 2 * score,
    bits_per_byte: score,
  };
}

export function fleet(given = {}) {
  return {
    package_version: "0.1.0",
    insecure_http: false,
    missing: null,
    run: run(),
    training: training(),
    round: round([]),
    tasks: tasks(),
    workers: [],
    ternary: null,
    server: { loop_lag_ms: 2 },
    versions: [version(1, { train_loss: null, tokens_per_s: null })],
    evaluations: [],
    ...given,
  };
}

/** The ternary health of v20 against v10: layers of q and down with these flips. */
export function ternary(...flips) {
  const matrix = (name, share) => ({
    name,
    zeros: 0.3 + share,
    scale: 0.02,
    flips: share,
    drift: -share,
  });
  return {
    version: 20,
    before: 10,
    matrices: flips.flatMap((share, i) => [
      matrix(`layers.${i}.q`, share),
      matrix(`layers.${i}.down`, share / 2),
    ]),
  };
}

if (process.argv[1] === import.meta.filename) {
  const failed = { task_id: "t-9", kind: "train", attempt: 5, reason: "no disk" };
  const view = fleet({
    workers: [worker("birch"), computing("alder", 10)],
    round: round([lane("alder")]),
    tasks: tasks({ failed: 1, latest_failed: [failed] }),
    evaluations: evaluations(3, 2),
    ternary: ternary(0.015, 0.025),
  });
  console.log(JSON.stringify(view));
}
