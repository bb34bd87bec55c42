"""The judgement on a challenger: what both slots answered goes in, good, bad or undecided out.

Each fault is a bet (pipelines/deploy/bets.py) whose level is a part of release.alpha: a challenger
within the tolerance is called bad with at most that chance, though one looks every second. Pure
functions: no clock, no disk, and chance only by the number of the look.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from pipelines.deploy.bets import Bet, Looks, Pairs, Share
from pipelines.deploy.targets import Observation, Slot
from pipelines.params import Release as Limits

KINDS = ("errors", "refusals", "latency", "predictions", "disagreement", "labels")
BINS = 20
# The prediction's distribution moved if more of it than tolerated lies on one side of any cut: the
# distance of Kolmogorov and Smirnov, as two bets per cut.
SIDES = [(side, cut) for cut in range(1, BINS) for side in ("below", "above")]
# The bound of "slow" is known once the champion gave so many answers, those since the release began
# if they are as many; this share is slower.
KNOWN, SLOW = 100, 0.05
# Fewer pairs of answers than these could not show that a challenger contradicts the champion.
PAIRS = 10
# A log loss of more than this counts as this, and so its difference is bounded.
WORST = 5.0

Seen = Mapping[Slot, Observation]


@dataclass(frozen=True)
class Case:
    """All that was heard since the release began, at `first`."""

    first: Seen
    last: Seen
    bound: float | None = None
    errors: Pairs = field(default_factory=Pairs)
    refusals: Pairs = field(default_factory=Pairs)
    latency: Looks = field(default_factory=Looks)
    predictions: tuple[Pairs, ...] = field(default=(Pairs(),) * len(SIDES))
    disagreement: Bet = field(default_factory=Bet)
    labels: Bet = field(default_factory=Bet)
    distances: Share = field(default_factory=Share)  # in thousandths
    # Predictions that the challenger gave, as far as the champion's were there to compare.
    answers: int = 0
    turn: int = 0
    # Whether the last look saw both slots: what was good once may be gone.
    both: bool = True

    @property
    def pairs(self) -> int:
        return self.distances.all // 1000


@dataclass(frozen=True)
class Verdict:
    """`reason` says why it is bad, or what is awaited. What is `unproven` had its time: it ends as
    what is bad does, but nothing is known against it.
    """

    kind: Literal["good", "bad", "unproven", "undecided"]
    reason: str


def begin(seen: Seen) -> Case:
    return Case(seen, seen)


def hear(
    case: Case,
    seen: Seen,
    limits: Limits,
    distances: Sequence[float] = (),
    losses: Sequence[float] = (),
) -> Case:
    """The case after one more look at both slots.

    `distances` are |challenger - champion| of mirrored requests; `losses` the challenger's log loss
    less the champion's, of requests whose label came.
    """
    allowed = limits.tolerance
    case = replace(
        case,
        turn=case.turn + 1,
        both=set(seen) == {"champion", "challenger"},
        disagreement=_apart(case.disagreement, distances, allowed.disagreement),
        labels=_lost(case.labels, losses, allowed.log_loss),
        distances=case.distances + _thousandths(distances),
    )
    if not case.both:
        return case  # one alone says nothing; the step's limit waits for nobody
    new = {slot: since(case.last.get(slot), seen[slot]) for slot in seen}
    chance = np.random.default_rng(case.turn)
    errors = {slot: Share(min(one.errors, one.requests), one.requests) for slot, one in new.items()}
    refusals = {slot: Share(one.refusals, one.refusals + one.requests) for slot, one in new.items()}
    first = {slot: case.first.get(slot, seen[slot]) for slot in seen}
    predictions = tuple(
        pairs.after(
            {slot: _beyond(one, side) for slot, one in new.items()}, allowed.predictions, chance
        )
        for side, pairs in zip(SIDES, case.predictions, strict=True)
    )
    latency = case.latency
    if case.bound is not None:
        slow = {slot: _slower(one, case.bound) for slot, one in new.items()}
        latency = latency.after(slow, allowed.latency)
    return replace(
        case,
        first=first,
        last=seen,
        # From the champion's past alone, for the looks to come: a bet is placed before its outcome.
        bound=_bound(since(first["champion"], seen["champion"])) or _bound(seen["champion"]),
        errors=case.errors.after(errors, allowed.errors, chance),
        refusals=case.refusals.after(refusals, allowed.errors, chance),
        latency=latency,
        predictions=predictions,
        answers=case.answers + new["challenger"].requests - errors["challenger"].marked,
    )


def since(before: Observation | None, now: Observation) -> Observation:
    """What was counted between two looks; counters that fell began again."""
    if before is None or now.requests < before.requests or _fell(before, now):
        return now
    return replace(
        now,
        requests=now.requests - before.requests,
        errors=max(now.errors - before.errors, 0),
        refusals=max(now.refusals - before.refusals, 0),
        latency={bound: n - before.latency.get(bound, 0) for bound, n in now.latency.items()},
        predictions=tuple(b - a for a, b in zip(before.predictions, now.predictions, strict=True)),
    )


def _fell(before: Observation, now: Observation) -> bool:
    return any(b < a for a, b in zip(before.predictions, now.predictions, strict=True))


def _bound(champion: Observation) -> float | None:
    """Twice the smallest bound that all but SLOW of the champion's answers keep."""
    answers = max(champion.latency.values(), default=0)
    if answers < KNOWN:
        return None
    kept = [bound for bound, n in sorted(champion.latency.items()) if n >= (1 - SLOW) * answers]
    above = [bound for bound in sorted(champion.latency) if bound >= 2 * kept[0]]
    return above[0] if above else None


def _slower(seen: Observation, bound: float) -> Share:
    answers = max(seen.latency.values(), default=0)
    return Share(answers - seen.latency.get(bound, answers), answers)


def _beyond(seen: Observation, side: tuple[str, int]) -> Share:
    name, cut = side
    part = seen.predictions[:cut] if name == "below" else seen.predictions[cut:]
    return Share(sum(part), sum(seen.predictions))


def _apart(bet: Bet, distances: Sequence[float], mean: float) -> Bet:
    """The bet that distances in [0, 1] are above `mean`; what is no number is far away."""
    return bet.after(((_known(one) - mean) / mean, 1) for one in distances)


def _thousandths(distances: Sequence[float]) -> Share:
    return Share(round(1000 * sum(map(_known, distances))), 1000 * len(distances))


def _known(distance: float) -> float:
    return 1.0 if math.isnan(distance) else min(max(distance, 0.0), 1.0)


def _lost(bet: Bet, losses: Sequence[float], tolerance: float) -> Bet:
    """The bet that log losses differ by more than the tolerance."""
    bounded = [min(max(one, -WORST), WORST) for one in losses]
    return bet.after(((one - tolerance) / (WORST + tolerance), 1) for one in bounded)


def faults(case: Case, limits: Limits) -> list[str]:
    """What is known to be worse than tolerated; empty where nothing is."""
    needed = math.log(len(KINDS) / limits.alpha)
    found = []
    if case.errors.bet.log >= needed:
        found.append(f"errors: {case.errors.says()}")
    if case.refusals.bet.log >= needed:
        found.append(f"refusals of what the contract should take: {case.refusals.says()}")
    if case.latency.bet.log >= needed:
        found.append(f"slower than {case.bound or 0:.3g} s: {case.latency.says()}")
    for (side, cut), pairs in zip(SIDES, case.predictions, strict=True):
        if pairs.bet.log >= needed + math.log(len(SIDES)):
            found.append(f"predictions {side} {cut / BINS:.2f}: {pairs.says()}")
            break
    if case.disagreement.log >= needed:
        found.append(f"mean distance of two answers {case.distances.value:.3f}")
    if case.labels.log >= needed:
        found.append("log loss on the labels that came is above the champion's")
    return found + _grown(case, limits)


def _grown(case: Case, limits: Limits) -> list[str]:
    """Memory and restarts, which are no shares: beyond the champion's by more than the limit."""
    if "challenger" not in case.last or "champion" not in case.last:
        return []
    restarts = {slot: one.restarts - case.first[slot].restarts for slot, one in case.last.items()}
    memory = {
        slot: max(one.memory_bytes - case.first[slot].memory_bytes, 0) / 1e6
        for slot, one in case.last.items()
    }
    found = []
    if restarts["challenger"] - restarts["champion"] > limits.restarts:
        found.append(f"restarts: {restarts['challenger']} against {restarts['champion']}")
    if memory["challenger"] - memory["champion"] > limits.memory_mb:
        found.append(
            f"memory grew by {memory['challenger']:.0f} MB against {memory['champion']:.0f} MB"
        )
    return found


def decide(
    case: Case, limits: Limits, seconds: float, elapsed: float, answers: int, paired: bool
) -> Verdict:
    """The verdict on a step of `seconds` that began `elapsed` seconds ago, with so many answers of
    the challenger since that could be compared; and, if `paired`, enough of the two slots' to the
    same requests since the release began.
    """
    if found := faults(case, limits):
        return Verdict("bad", "; ".join(found))
    said = f"{answers} answers in {elapsed:.0f} s"
    if paired:
        said += f"; {case.pairs} different requests answered by both so far"
    if not case.both:
        said += "; the last look did not see both slots"
    enough = case.both and answers >= limits.step_requests and (case.pairs >= PAIRS or not paired)
    if elapsed >= seconds and enough:
        return Verdict("good", said)
    if elapsed < limits.limit_seconds:
        return Verdict("undecided", said)
    if not answers:
        return Verdict("unproven", f"no traffic or no metrics in {elapsed:.0f} s")
    wanted = f"{limits.step_requests} answers"
    if paired:
        wanted += f", and {PAIRS} different requests"
    return Verdict("unproven", f"{said}; expected {wanted}")
