"""A fleet under a virtual clock: production rounds, codecs, sizing and outer step.

One round after another: workers claim tasks cut to their measured speed, fetch,
train for real, and hand in; some die on the way. The round closes; what came back is
merged in its one order by the functions of the coordinator, and the next version is
what workers get. Every byte, every second and every optimiser's FLOP is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.chain import next_link
from bitnet_ext.codecs import Codec, decode, encode_with_feedback
from bitnet_ext.frames import frame_bytes
from bitnet_ext.fused import norm_of
from bitnet_ext.outer import Part
from bitnet_ext.wire.messages import EXACT
from bitnet_ext.wire.verdicts import Optimiser, RoundKind
from coordinator.domain import guards, muon, sizing
from coordinator.domain.initial import initial_vector
from coordinator.domain.muon import OptimiserState, merged_step
from coordinator.domain.outer_step import merge_weights, outer_step
from coordinator.domain.plan import TrainingPlan, hyper_parameters, step_sizes
from coordinator.domain.rounds import ClaimedWork, stops_waiting_at
from coordinator.domain.throughput import Trained, measured
from tests.sim import setting as costs
from tests.sim.crew import Claim, Counts, Stretch, Worker
from tests.sim.net import SEQ_LEN, Net
from tests.sim.setting import Setting
from tests.sim.steps import Local, Moments, clipped, trained
from tests.sim.text import Text, Windows

Vector = NDArray[np.float32]

#: JSON and HTTP headers in bytes, as a TCP proxy between a worker and its coordinator
#: counted them (tests/integration/test_talk.py): what each task has beside its payloads
#: (claim, links, submission), a request for text, and a heartbeat with a lease. Neither
#: tokens of the text nor log records are part of it.
TALK_UP_BYTES: Final = 985
TALK_DOWN_BYTES: Final = 889
TEXT_UP_BYTES: Final = 165
TEXT_DOWN_BYTES: Final = 269
BEAT_UP_BYTES: Final = 377
BEAT_DOWN_BYTES: Final = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a fleet learns: the plan of a run, and what is not in a plan yet."""

    plan: TrainingPlan
    #: Whether moments and residual outlive their process.
    keeps_state: bool = True
    #: Whether rounds have a due time: a worker hands in the windows that it has by
    #: then, begins its next task at once, on the weights that it holds, and takes the
    #: next version between two windows once it is there.
    works_ahead: bool = False
    #: What the last worker multiplies its pseudo-gradients by.
    poison: float = 1.0
    #: Whether submissions are judged before they are merged.
    guarded: bool = True

    def __post_init__(self) -> None:
        """Refuse local steps that change their weights on the way."""
        kind = self.plan.round_kind
        if self.works_ahead and kind is not RoundKind.GRADIENT:
            raise ValueError(f"works_ahead needs gradient rounds, not {kind}")


class Fleet:
    """One run of a fleet, from its first version to its token budget."""

    def __init__(
        self,
        net: Net,
        text: Text,
        recipe: Recipe,
        *,
        seed: int,
        setting: Setting | None = None,
    ) -> None:
        self.counts = Counts()
        self.now = 0.0
        self.tokens = 0
        self._net, self._text, self._recipe = net, text, recipe
        self._setting = setting or Setting()
        self._seed = seed
        self._random = np.random.default_rng((seed, 1))
        first = initial_vector(net.segments, net.shape.num_layers, seed)
        zeros = np.zeros_like(first)
        self._state = OptimiserState(weights=first, momentum=zeros, square=zeros)
        self.published = first.copy()
        self._workers = [
            Worker(speed, Moments.zeros(net.num_params))
            for speed in self._setting.speeds
        ]
        self._version = 0
        #: The last two versions, and since when they can be had.
        self._versions = [(0.0, self.published), (0.0, self.published)]
        #: Until when the coordinator's optimiser is at work.
        self._busy_until = 0.0
        #: When the last round was due, of rounds that have a due time.
        self._due = 0.0
        self._given_back: list[Stretch] = []
        #: Sizes of the last submissions that were merged.
        self._recent: list[float] = []
        self._epoch, self._next = 0, 0
        self._order = text.order(seed, 0)

    def run(self, budget: int, *, num_scores: int = 1) -> dict[str, object]:
        """Train until `budget` tokens are accepted; return the figures."""
        due = budget / num_scores
        while self.tokens < budget:
            self._round(budget)
            if self.tokens >= due - SEQ_LEN:
                loss = self._net.loss(self.published, self._text.held_out)
                ready_at = max(self.now, self._busy_until)
                self.counts.curve.append((ready_at, self.tokens, loss))
                due += budget / num_scores
        self.now = max(self.now, self._busy_until)
        return self._figures()

    def _figures(self) -> dict[str, object]:
        counts, setting = self.counts, self._setting
        step_s = 1 + setting.optimiser_s(
            costs.ADAMW * self._net.num_params,
            num_params=self._net.num_params,
            speed=1.0,
        )
        alone_s = self.tokens / SEQ_LEN * step_s / setting.mean_speed
        # They come whether or not there is a task.
        num_beats = len(self._workers) * self.now / costs.HEARTBEAT_S
        more_up = num_beats * BEAT_UP_BYTES + counts.num_text_requests * TEXT_UP_BYTES
        more_down = (
            num_beats * BEAT_DOWN_BYTES + counts.num_text_requests * TEXT_DOWN_BYTES
        )
        bytes_up, bytes_down = counts.bytes_up + more_up, counts.bytes_down + more_down
        return {
            "loss": counts.curve[-1][2],
            "tokens": self.tokens,
            "virtual_s": self.now,
            "speedup": alone_s / self.now,
            "utilisation": counts.useful_s / (self.now * len(self._workers)),
            "rounds": counts.num_rounds,
            "lost_tasks": counts.num_lost,
            "honest_left_out": counts.num_honest_left_out,
            "poison_left_out": counts.num_poison_left_out,
            "clipped": counts.num_clipped,
            "quarantined": sum(worker.is_quarantined for worker in self._workers),
            "optimiser_s": counts.optimiser_s,
            "stale_share": counts.num_stale / max(1, counts.num_windows),
            "bytes_up_per_token": bytes_up / self.tokens,
            "bytes_down_per_token": bytes_down / self.tokens,
            "bytes_up_ratio": (counts.bytes_up_fp32 + more_up) / bytes_up,
            "bytes_down_ratio": (counts.bytes_down_fp32 + more_down) / bytes_down,
            "curve": counts.curve,
        }

    @property
    def master(self) -> Vector:
        """The weights of the coordinator."""
        return self._state.weights

    # One round.

    def _round(self, budget: int) -> None:
        # Not while the coordinator is still at the step before.
        self._due = max(self._due + self._recipe.plan.round_s, self._versions[-1][0])
        claims = self._claims(budget)
        closes_at = max(self.now, self._closes_at(claims))
        back = [c for c in claims if c.back_at is not None and c.back_at <= closes_at]
        for claim in claims:
            self._end(claim, closes_at, is_back=claim in back)
        self.now = closes_at
        if back:
            self._busy_until = max(self.now, self._busy_until)
            self._apply(sorted(back, key=lambda claim: claim.stretch))

    def _claims(self, budget: int) -> list[Claim]:
        """Give out the tasks of a round, in the order in which workers ask."""
        claims: list[Claim] = []
        left = -(-(budget - self.tokens) // SEQ_LEN)
        plan, ahead = self._recipe.plan, self._recipe.works_ahead
        (before_at, _), (newest_at, _) = self._versions
        # Who works ahead is never more than one version behind.
        opens_at = before_at if ahead else max(self.now, newest_at)
        for worker in sorted(self._workers, key=lambda w: max(opens_at, w.free_at)):
            at = max(opens_at, worker.free_at) + self._setting.round_trip_s
            first_back = min((c.back_at for c in claims if c.back_at), default=None)
            late = not ahead and first_back is not None and first_back <= at
            if late or left == 0 or worker.is_quarantined:
                continue
            pace = 1 + self._setting.jitter * self._random.random()
            if ahead:
                # Cut with room, and handed in as far as it has come by then.
                size = self._size(worker, sizing.STOP_FACTOR * (self._due - at))
                size = min(size, self._num_until_due(worker, at, pace) * SEQ_LEN)
            else:
                age = at - claims[0].claimed_at if claims else 0.0
                left_s = sizing.seconds_left(plan.round_s, round_age_s=age)
                size = self._size(worker, left_s)
            # Too late for a single window: its first of the next round.
            if size == 0:
                continue
            stretch = self._cut(size, left, may_retry=at >= self.now)
            left -= stretch.num
            claims.append(self._timed(worker, stretch, at, pace))
        return claims

    def _size(self, worker: Worker, seconds: float) -> int:
        """Return the tokens of a task of so many seconds, by measured speed."""
        return sizing.task_tokens(
            worker.tokens_per_s,
            seconds=seconds,
            batch_tokens=self._recipe.plan.batch_size * SEQ_LEN,
            seq_len=SEQ_LEN,
            largest=max((one.tokens for one in worker.recent), default=None),
        )

    def _num_until_due(self, worker: Worker, at: float, pace: float) -> int:
        """Return the windows that a worker has in time to hand them in."""
        first_s = self._compute_s(worker, 0, pace)
        each_s = self._compute_s(worker, 1, pace) - first_s
        up_s = self._setting.transfer_s(self._up_bytes)
        return max(0, int((self._due - at - up_s - first_s) / each_s))

    def _cut(self, size: int, most: int, *, may_retry: bool) -> Stretch:
        if self._given_back and may_retry:
            found = self._given_back.pop(0)
            quorum = self._recipe.plan.quorum
            head = sizing.divided(found.num * SEQ_LEN, size, quorum=quorum)
            num = min(head // SEQ_LEN, most)
            if num < found.num:
                rest = Stretch(found.epoch, found.start + num, found.num - num)
                self._given_back.insert(0, rest)
            return Stretch(found.epoch, found.start, num)
        if self._next == len(self._order):
            self._epoch, self._next = self._epoch + 1, 0
            self._order = self._text.order(self._seed, self._epoch)
        left = len(self._order) - self._next
        num = min(sizing.cut(left * SEQ_LEN, size) // SEQ_LEN, most)
        stretch = Stretch(self._epoch, self._next, num)
        self._next += num
        return stretch

    def _timed(self, worker: Worker, stretch: Stretch, at: float, pace: float) -> Claim:
        """Say how the task will go: how long each part takes, and who dies."""
        setting, counts, random = self._setting, self.counts, self._random
        whole_bytes = frame_bytes(Codec.FP32, self._net.num_params)
        counts.num_text_requests += not worker.has_text(stretch)
        down_bytes = self._download(worker)
        counts.bytes_down += down_bytes
        counts.bytes_down_fp32 += whole_bytes + TALK_DOWN_BYTES
        compute_s = self._compute_s(worker, stretch.num, pace)
        fetch_s = setting.transfer_s(down_bytes)
        # Who works ahead fetches the next version while it trains.
        fetched_at = at if self._recipe.works_ahead else at + fetch_s
        bases = self._bases(stretch.num, fetched_at, compute_s, fetch_s)
        if random.random() < setting.deaths:
            died_at = fetched_at + compute_s * random.random()
            silent_s = costs.HEARTBEAT_S * random.random()
            over_at = died_at - silent_s + costs.TTL_S
            return Claim(worker, stretch, at, bases, None, over_at)
        counts.bytes_up += self._up_bytes
        counts.bytes_up_fp32 += whole_bytes + TALK_UP_BYTES
        back_at = fetched_at + compute_s + setting.transfer_s(self._up_bytes)
        return Claim(worker, stretch, at, bases, back_at, back_at)

    def _bases(
        self, num: int, starts_at: float, compute_s: float, fetch_s: float
    ) -> tuple[tuple[int, Vector], ...]:
        """Say which windows begin before the newest version is there, or after."""
        (_, before), (ready_at, newest) = self._versions
        if not self._recipe.works_ahead:
            return ((num, newest),)
        missing_s = ready_at + fetch_s - starts_at
        num_before = min(num, max(0, math.ceil(missing_s / (compute_s / num))))
        parts = ((num_before, before), (num - num_before, newest))
        return tuple(part for part in parts if part[0])

    def _download(self, worker: Worker) -> int:
        """Return the bytes of the weights a worker lacks, and let it have them."""
        size = self._net.num_params
        whole = frame_bytes(Codec.FP32, size)
        broadcast = self._recipe.plan.broadcast
        if worker.held is not None and broadcast != EXACT:
            num_links = self._version - worker.held
            whole = min(whole, num_links * frame_bytes(Codec(broadcast), size))
        worker.held = self._version
        return whole + TALK_DOWN_BYTES

    @property
    def _up_bytes(self) -> int:
        """Bytes of a submission and all that goes with it."""
        codec = Codec(self._recipe.plan.codec)
        return frame_bytes(codec, self._net.num_params) + TALK_UP_BYTES

    def _compute_s(self, worker: Worker, num_windows: int, pace: float) -> float:
        plan, size = self._recipe.plan, self._net.num_params
        num_steps = sizing.num_steps(
            num_windows * SEQ_LEN, seq_len=SEQ_LEN, batch_size=plan.batch_size
        )
        flop = (costs.DECODE + costs.ENCODE) * size + self._step_flop * num_steps
        optimiser_s = self._setting.optimiser_s(
            flop, num_params=size, speed=worker.speed
        )
        return (num_windows / worker.speed + optimiser_s) * pace

    @property
    def _step_flop(self) -> int:
        """FLOP of a local step beside its products, or of adding up a gradient."""
        plan, size = self._recipe.plan, self._net.num_params
        if plan.round_kind is RoundKind.GRADIENT:
            return costs.ACCUMULATE * size
        by_muon = plan.local_optimiser is Optimiser.MUON
        return costs.ADAMW * size + by_muon * muon.flop(self._net.segments)

    def _closes_at(self, claims: list[Claim]) -> float:
        """Return when the round closes: all back or over, or quorum and grace.

        Where it has a due time: when all are back, else then.
        """
        plan = self._recipe.plan
        if self._recipe.works_ahead:
            backs = [claim.back_at or self._due for claim in claims]
            return max(backs, default=self._due)
        claimed = [
            ClaimedWork(
                num_tokens=claim.stretch.num * SEQ_LEN,
                ended_at=claim.over_at,
                is_back=claim.back_at is not None,
                is_probe=claim.worker.tokens_per_s is None,
            )
            for claim in claims
        ]
        due = stops_waiting_at(claimed, quorum=plan.quorum, round_s=plan.round_s)
        all_over = max(claim.over_at for claim in claims)
        return all_over if due is None else min(all_over, due)

    def _end(self, claim: Claim, closes_at: float, *, is_back: bool) -> None:
        """Settle what a claim means for its worker and its stretch."""
        worker = claim.worker
        if is_back and claim.back_at is not None:
            seconds = claim.back_at - claim.claimed_at
            num_tokens = claim.stretch.num * SEQ_LEN
            worker.recent.appendleft(
                Trained(tokens=num_tokens, seconds=seconds, num_tokens=num_tokens)
            )
            found = measured(worker.recent)
            worker.tokens_per_s = found.tokens_per_s if found else None
            worker.free_at = claim.back_at
            self.counts.useful_s += seconds
            return
        self.counts.num_lost += 1
        self._given_back.append(claim.stretch)
        if claim.back_at is None:
            died_at = claim.over_at - costs.TTL_S + costs.HEARTBEAT_S
            # Its old lease keeps it from claiming until that has ended.
            over_at = min(claim.over_at, closes_at)
            worker.free_at = max(died_at + costs.RESTART_S, over_at)
            worker.blocks = range(0)
            if not self._recipe.keeps_state:
                worker.moments = Moments.zeros(self._net.num_params)
                worker.residual = worker.held = None
        else:
            # A heartbeat tells it, or the refusal of what it hands in.
            worker.free_at = min(claim.back_at, closes_at + costs.HEARTBEAT_S)

    def _apply(self, claims: list[Claim]) -> None:
        """Train what came back, merge it and publish the next version."""
        codec, size = Codec(self._recipe.plan.codec), self._net.num_params
        payloads = [
            self._payload(claim, gradient)
            for claim, gradient in zip(claims, self._train(claims), strict=True)
        ]
        kept, mean = self._judged(claims, payloads)
        tokens = [claims[place].stretch.num * SEQ_LEN for place in kept]
        parts = [
            Part(codec, payloads[place], share * factor)
            for (place, factor), share in zip(
                kept.items(), merge_weights(tokens), strict=True
            )
            if mean is None
        ]
        self._spend(costs.DECODE * len(parts) * size)
        state = self._stepped(parts, mean, sum(tokens))
        self.tokens += sum(tokens)
        self._count_stale([claims[place] for place in kept])
        if state is not None:
            self._state = state
            self._publish()

    def _count_stale(self, claims: list[Claim]) -> None:
        newest = self._versions[-1][1]
        for num, base in (part for claim in claims for part in claim.bases):
            self.counts.num_windows += num
            self.counts.num_stale += 0 if base is newest else num

    def _judged(
        self, claims: list[Claim], payloads: list[bytes]
    ) -> tuple[dict[int, float], Vector | None]:
        """Return the factors of what is merged, by place; the rest goes back.

        And what that adds up to, where the guards have done so.
        """
        if not self._recipe.guarded:
            return dict.fromkeys(range(len(claims)), 1.0), None
        codec, size = Codec(self._recipe.plan.codec), self._net.num_params
        self._spend(costs.PRODUCT * len(claims) * size)
        candidates = [
            self._candidate(claim, norm_of(decode(codec, payload, size)))
            for claim, payload in zip(claims, payloads, strict=True)
        ]
        judgement = self._judgement(candidates, codec, payloads)
        rulings = judgement.rulings
        for claim, candidate, ruling in zip(claims, candidates, rulings, strict=True):
            self._note(claim, candidate, ruling)
        factors = {
            place: ruling.factor
            for place, ruling in enumerate(rulings)
            if ruling.reason is None
        }
        return factors, judgement.mean

    def _judgement(
        self, candidates: list[guards.Candidate], codec: Codec, payloads: list[bytes]
    ) -> guards.Judgement:
        """Judge, and let that take its time: once more where one is left out."""
        size, num_reads = self._net.num_params, 0

        def read(place: int) -> tuple[Codec, bytes]:
            nonlocal num_reads
            num_reads += 1
            return codec, payloads[place]

        judgement = guards.judge(candidates, self._recent, read, num_elements=size)
        # Half of the times for the mean, half to compare with it.
        self._spend(costs.JUDGE * num_reads / 2 * size)
        return judgement

    def _candidate(self, claim: Claim, norm: float) -> guards.Candidate:
        plan, tokens = self._recipe.plan, claim.stretch.num * SEQ_LEN
        num_steps = sizing.num_steps(
            tokens, seq_len=SEQ_LEN, batch_size=plan.batch_size
        )
        size = guards.size_of(
            norm,
            plan,
            tokens_before=self.tokens,
            tokens=tokens,
            num_steps=num_steps,
        )
        return guards.Candidate(tokens=tokens, norm=norm, size=size)

    def _note(
        self, claim: Claim, candidate: guards.Candidate, ruling: guards.Ruling
    ) -> None:
        """Keep what a ruling means for its worker, its stretch and later rounds."""
        claim.worker.left_out.append(ruling.reason is not None)
        if ruling.reason is None:
            self.counts.num_clipped += ruling.factor < 1.0
            self._recent = [*self._recent, candidate.size][-guards.NUM_RECENT :]
            return
        self._given_back.append(claim.stretch)
        if self._is_poisoned(claim.worker):
            self.counts.num_poison_left_out += 1
        else:
            self.counts.num_honest_left_out += 1

    def _is_poisoned(self, worker: Worker) -> bool:
        return self._recipe.poison != 1.0 and worker is self._workers[-1]

    def _stepped(
        self, parts: list[Part], mean: Vector | None, tokens: int
    ) -> OptimiserState | None:
        """Return the next state of the coordinator, and let that take its time.

        None where it is not finite.
        """
        plan, state, num_params = self._recipe.plan, self._state, self._net.num_params
        if self._recipe.plan.round_kind is RoundKind.GRADIENT:
            self._spend(muon.flop(self._net.segments) + costs.ADAMW * num_params)
            step = self.counts.num_rounds + 1
            sizes = step_sizes(
                plan, tokens_before=self.tokens, tokens=tokens, step=step
            )
            return merged_step(state, parts, self._net.segments, sizes, mean=mean)
        self._spend(costs.NESTEROV * num_params)
        after = np.empty_like(state.weights), np.empty_like(state.momentum)
        fine = outer_step(
            (state.weights, state.momentum),
            parts,
            after,
            rate=plan.outer_rate,
            decay=plan.outer_momentum,
            mean=mean,
        )
        weights, momentum = after
        new = OptimiserState(weights=weights, momentum=momentum, square=state.square)
        return new if fine else None

    def _spend(self, flop: float) -> None:
        """Let the coordinator's optimiser take its time."""
        seconds = self._setting.optimiser_s(
            flop, num_params=self._net.num_params, speed=self._setting.mean_speed
        )
        self._busy_until += seconds
        self.counts.optimiser_s += seconds

    def _publish(self) -> None:
        """Make the next version what workers get: whole, or by the next link."""
        self._version += 1
        self.counts.num_rounds += 1
        broadcast = self._recipe.plan.broadcast
        if broadcast == EXACT:
            self.published = self.master.copy()
        else:
            self.published = self.published.copy()
            next_link(Codec(broadcast), self.master, self.published)
            self._spend(costs.ENCODE * self._net.num_params)
        self._versions = [self._versions[-1], (self._busy_until, self.published)]

    def _train(self, claims: list[Claim]) -> Iterator[Vector]:
        """Yield the pseudo-gradient, or the mean gradient, of each claim."""
        if self._recipe.plan.round_kind is RoundKind.GRADIENT:
            yield from map(self._mean_gradient, claims)
            return
        locals_ = [self._local(claim) for claim in claims]
        base = self._versions[-1][1]
        flats = trained(self._net, base, locals_)
        for claim, local, flat in zip(claims, locals_, flats, strict=True):
            claim.worker.moments = local.moments
            yield base - flat

    def _mean_gradient(self, claim: Claim) -> Vector:
        windows, done = self._windows(claim.stretch), 0
        mean = np.zeros(self._net.num_params, np.float32)
        for num, base in claim.bases:
            part = windows[done : done + num]
            _, grads = self._net.gradients(base[None], part[None])
            mean += grads[0] * np.float32(num / len(windows))
            done += num
        mean *= np.float32(clipped(mean, self._recipe.plan.clip_norm))
        return mean

    def _local(self, claim: Claim) -> Local:
        plan, stretch = self._recipe.plan, claim.stretch
        windows = self._windows(stretch)
        return Local(
            [
                windows[start : start + plan.batch_size]
                for start in range(0, len(windows), plan.batch_size)
            ],
            hyper_parameters(
                plan, tokens_accepted=self.tokens, task_tokens=stretch.num * SEQ_LEN
            ),
            claim.worker.moments.copy(),
        )

    def _windows(self, stretch: Stretch) -> Windows:
        """Return the windows of a task, in the order of the epoch."""
        if stretch.epoch != self._epoch:
            order = self._text.order(self._seed, stretch.epoch)
        else:
            order = self._order
        return self._text.train[order[stretch.start : stretch.start + stretch.num]]

    def _payload(self, claim: Claim, gradient: Vector) -> bytes:
        worker = claim.worker
        if self._is_poisoned(worker):
            gradient = gradient * np.float32(self._recipe.poison)
        payload, worker.residual = encode_with_feedback(
            Codec(self._recipe.plan.codec), gradient, worker.residual
        )
        return payload
