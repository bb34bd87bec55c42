"""The judgement: rare false alarms however often one looks, and every fault is found."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.deploy import judge
from pipelines.deploy.bets import Bet, Pairs, Share
from pipelines.deploy.judge import Case
from pipelines.deploy.targets import Observation, Slot
from pipelines.params import Params, Release

BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)


@pytest.fixture(scope="session")
def limits(params: Params) -> Release:
    return params.release


class Slots:
    """Two slots that answer by chance; each look adds a second's answers."""

    def __init__(self, seed: int, **challenger: Any) -> None:
        self.random = np.random.default_rng(seed)
        self.ways: dict[Slot, dict[str, Any]] = {"champion": {}, "challenger": challenger}
        self.counts: dict[Slot, Observation] = {slot: _nothing() for slot in self.ways}

    def look(self, answers: Mapping[Slot, int]) -> dict[Slot, Observation]:
        for slot, way in self.ways.items():
            self.counts[slot] = _sum(self.counts[slot], self._second(answers[slot], **way))
        return dict(self.counts)

    def _second(
        self,
        answers: int,
        errors: float = 0.002,
        refusals: float = 0.0,
        slower: float = 0.0,
        predict: Any = lambda values: values,
        memory: int = 0,
        restarts: int = 0,
    ) -> Observation:
        seconds = self.random.exponential(0.004, answers) + slower
        values = np.clip(predict(self.random.beta(1.2, 4, answers)), 0, 1)
        bins = np.histogram(values, judge.BINS, (0, 1))[0]
        latency = {bound: int((seconds <= bound).sum()) for bound in BOUNDS}
        failed = int(self.random.binomial(answers, errors))
        refused = int(self.random.binomial(answers, refusals))
        return Observation(
            answers, failed, refused, latency, tuple(bins.tolist()), memory, restarts
        )


def _nothing() -> Observation:
    return Observation(0, 0, 0, dict.fromkeys(BOUNDS, 0), (0,) * judge.BINS, 100_000_000, 0)


def _sum(one: Observation, two: Observation) -> Observation:
    return Observation(
        one.requests + two.requests,
        one.errors + two.errors,
        one.refusals + two.refusals,
        {bound: one.latency[bound] + two.latency[bound] for bound in BOUNDS},
        tuple(a + b for a, b in zip(one.predictions, two.predictions, strict=True)),
        one.memory_bytes + two.memory_bytes,
        one.restarts + two.restarts,
    )


def _alarm(slots: Slots, limits: Release, seconds: int, champion: int = 50) -> int | None:
    """After how many seconds the challenger is found bad."""
    case = judge.begin(slots.look({"champion": 200, "challenger": 0}))
    for second in range(1, seconds + 1):
        case = judge.hear(case, slots.look({"champion": champion, "challenger": 50}), limits)
        if judge.faults(case, limits):
            return second
    return None


@settings(max_examples=15, deadline=None)
@given(st.floats(0.0, 0.6), st.integers(0, 10**6))
def test_false_alarms_are_rare_however_often_one_looks(share: float, seed: int) -> None:
    """Both slots alike and no tolerance: of 100 bets at level 0.1, looked at 60 times each, more
    than 25 are lost by chance less than once in 100,000 times.
    """
    random = np.random.default_rng(seed)
    alarms = 0
    for _ in range(100):
        pairs, highest = Pairs(), 0.0
        for _ in range(60):
            new: dict[Slot, Share] = {
                "champion": Share(int(random.binomial(30, share)), 30),
                "challenger": Share(int(random.binomial(20, share)), 20),
            }
            pairs = pairs.after(new, 0.0, random)
            highest = max(highest, pairs.bet.log)
        alarms += highest >= math.log(1 / 0.1)
    assert alarms <= 25


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0.0, 0.5), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40),
    st.integers(0, 10**6),
)  # fmt: skip
def test_no_answer_is_lost_or_counted_twice(
    tolerance: float, all_: int, ours: int, theirs: int, seed: int
) -> None:
    new: dict[Slot, Share] = {
        "champion": Share(min(theirs, all_), all_),
        "challenger": Share(min(ours, 25), 25),
    }
    after = Pairs().after(new, tolerance, np.random.default_rng(seed))
    assert min(one.all for one in after.waiting.values()) == 0
    assert abs(all_ - 25) == max(one.all for one in after.waiting.values())
    assert all(0 <= one.marked <= one.all for one in after.waiting.values())
    assert math.isfinite(after.bet.log)


@given(st.lists(st.tuples(st.floats(-1, 5), st.integers(0, 5)), max_size=20))
def test_the_order_of_outcomes_is_nothing_to_a_bet(gains: list[tuple[float, int]]) -> None:
    assert Bet().after(gains).log == pytest.approx(Bet().after(gains[::-1]).log)


def test_two_alike_go_on(limits: Release) -> None:
    alarms = [_alarm(Slots(seed), limits, 300) for seed in range(5)]
    assert alarms == [None] * 5


def test_a_machine_that_stalls_now_and_then_is_no_fault(limits: Release) -> None:
    """Every tenth second one of the slots, by chance, answers all of its requests slowly."""
    for seed in range(20):
        slots, chance = Slots(seed), np.random.default_rng(seed)
        case = judge.begin(slots.look({"champion": 200, "challenger": 0}))
        for _ in range(90):
            stalled = chance.random() < 0.1
            slow: Slot = "champion" if chance.random() < 0.5 else "challenger"
            slots.ways[slow] = {"slower": 0.05} if stalled else {}
            case = judge.hear(case, slots.look({"champion": 50, "challenger": 50}), limits)
            slots.ways[slow] = {}
        assert judge.faults(case, limits) == []


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "5 % errors": ({"errors": 0.05}, "errors: "),
    "50 ms": ({"slower": 0.05}, "slower than "),
    "constant": ({"predict": lambda values: values * 0 + 0.21}, "predictions "),
    "inverted": ({"predict": lambda values: 1 - values}, "predictions "),
    "shifted": ({"predict": lambda values: values + 0.3}, "predictions "),
    "memory": ({"memory": 20_000_000}, "memory grew by "),
    "crash loop": ({"restarts": 1}, "restarts: "),
    "no number": ({"errors": 1.0}, "errors: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_within_seconds(limits: Release, fault: str) -> None:
    how, said = FAULTS[fault]
    for seed in range(3):
        slots = Slots(seed, **how)
        case = judge.begin(slots.look({"champion": 200, "challenger": 0}))
        for _ in range(15):
            case = judge.hear(case, slots.look({"champion": 50, "challenger": 50}), limits)
            verdict = judge.decide(case, limits, 60, 5, 100, paired=False)
            if verdict.kind == "bad":
                break
        assert said in verdict.reason


def test_a_fault_is_found_at_a_hundred_percent_too(limits: Release) -> None:
    """Where the champion answers nobody, it is compared with what it answered before."""
    slots = Slots(1)
    case = judge.begin(slots.look({"champion": 200, "challenger": 0}))
    for _ in range(30):
        case = judge.hear(case, slots.look({"champion": 95, "challenger": 5}), limits)
    assert not judge.faults(case, limits)
    slots.ways["challenger"]["errors"] = 0.05
    for _ in range(20):
        case = judge.hear(case, slots.look({"champion": 0, "challenger": 100}), limits)
    assert "errors" in judge.faults(case, limits)[0]


def test_what_cannot_be_compared_is_not_good(limits: Release) -> None:
    """The challenger answers errors alone, and nobody knows what the champion does."""
    slots = Slots(1, errors=1.0)
    both = slots.look({"champion": 200, "challenger": 0})
    case = judge.begin({"challenger": both["challenger"]})
    for _ in range(30):
        seen = slots.look({"champion": 50, "challenger": 50})
        case = judge.hear(case, {"challenger": seen["challenger"]}, limits)
    assert _after(case, limits, 30).kind == "undecided"
    assert _after(case, limits, limits.limit_seconds).kind == "unproven"
    case = judge.hear(case, seen, limits)
    assert "errors: " in _after(case, limits, 30).reason


def _after(case: Case, limits: Release, elapsed: float) -> judge.Verdict:
    return judge.decide(case, limits, 15, elapsed, case.answers, paired=False)


def test_what_was_good_once_may_be_gone(limits: Release) -> None:
    """Answers of before do not stand for a slot that nobody sees any more."""
    slots = Slots(1)
    case = judge.begin(slots.look({"champion": 200, "challenger": 0}))
    for _ in range(10):
        case = judge.hear(case, slots.look({"champion": 50, "challenger": 50}), limits)
    gone = judge.hear(case, {}, limits)
    assert _after(gone, limits, 30).kind == "undecided"
    late = _after(gone, limits, limits.limit_seconds)
    assert (late.kind, "did not see both slots" in late.reason) == ("unproven", True)
    back = judge.hear(gone, slots.look({"champion": 50, "challenger": 50}), limits)
    assert _after(back, limits, 30).kind == "good"


def test_refusals_alone_are_no_answers(limits: Release) -> None:
    """Both slots refuse all they are asked: nothing is known of the challenger's predictions."""
    slots = Slots(1, errors=1.0)
    slots.ways["champion"]["errors"] = 1.0
    case = judge.begin(slots.look({"champion": 200, "challenger": 0}))
    for _ in range(30):
        case = judge.hear(case, slots.look({"champion": 50, "challenger": 50}), limits)
    assert (case.answers, judge.faults(case, limits)) == (0, [])
    assert _after(case, limits, 30).kind == "undecided"
    assert "no traffic" in _after(case, limits, limits.limit_seconds).reason


def test_what_callers_do_wrong_hides_no_fault(limits: Release) -> None:
    """Half of the requests break the contract, whoever is asked."""
    slots = Slots(1, errors=0.05, refusals=0.5)
    slots.ways["champion"]["refusals"] = 0.5
    assert _alarm(slots, limits, 60, champion=100) is not None
    slots.ways["challenger"]["errors"] = 0.002
    assert _alarm(slots, limits, 60) is None


def test_a_contract_that_refuses_too_much_is_a_fault(limits: Release) -> None:
    slots = Slots(1, refusals=0.1)
    case = judge.begin(slots.look({"champion": 200, "challenger": 0}))
    for _ in range(15):
        case = judge.hear(case, slots.look({"champion": 50, "challenger": 50}), limits)
    assert judge.faults(case, limits)[0].startswith("refusals of what the contract should take")


def test_an_hour_of_slowness_before_the_release_excuses_nothing(limits: Release) -> None:
    slots = Slots(1, slower=0.05)
    slots.ways["champion"]["slower"] = 0.2
    begun = slots.look({"champion": 100_000, "challenger": 0})
    slots.ways["champion"]["slower"] = 0.0
    case = judge.begin(begun)
    for _ in range(30):
        case = judge.hear(case, slots.look({"champion": 50, "challenger": 50}), limits)
    assert judge.faults(case, limits)[0].startswith("slower than ")


def test_where_answers_are_paired_none_is_good_without_pairs(limits: Release) -> None:
    seen = Slots(1).look({"champion": 200, "challenger": 0})
    few = judge.hear(judge.begin(seen), seen, limits, distances=[0.0] * (judge.PAIRS - 1))
    assert judge.decide(few, limits, 15, 20, 10_000, paired=True).kind == "undecided"
    late = judge.decide(few, limits, 15, limits.limit_seconds, 10_000, paired=True)
    assert late.kind == "unproven"
    assert "; 9 different requests answered by both so far; expected " in late.reason
    assert late.reason.endswith("answers, and 10 different requests")
    enough = judge.hear(few, seen, limits, distances=[0.0])
    assert judge.decide(enough, limits, 15, 20, 10_000, paired=True).kind == "good"


def test_so_few_pairs_can_condemn(limits: Release) -> None:
    """Else to ask for them would be to ask for nothing."""
    case = judge.hear(judge.begin({}), {}, limits, distances=[0.9] * judge.PAIRS)
    assert judge.faults(case, limits) == ["mean distance of two answers 0.900"]


def test_answers_that_differ_are_a_fault_and_those_that_hardly_do_are_none(limits: Release) -> None:
    random = np.random.default_rng(0)
    case: Case = judge.begin({})
    for _ in range(100):
        case = judge.hear(case, {}, limits, distances=random.uniform(0, 0.15, 5).tolist())
    assert judge.faults(case, limits) == []
    for _ in range(20):
        case = judge.hear(case, {}, limits, distances=[*random.uniform(0.1, 0.6, 5), math.nan])
    assert judge.faults(case, limits)[0].startswith("mean distance of two answers")


def test_labels_that_came_can_condemn(limits: Release) -> None:
    random = np.random.default_rng(0)
    case = judge.begin({})
    for _ in range(40):
        case = judge.hear(case, {}, limits, losses=random.normal(0, 0.4, 10).tolist())
    assert judge.faults(case, limits) == []
    for _ in range(60):
        case = judge.hear(case, {}, limits, losses=random.normal(0.6, 0.4, 10).tolist())
    assert "log loss" in judge.faults(case, limits)[0]


@pytest.mark.parametrize(
    ("elapsed", "answers", "kind"),
    [
        (1, 10_000, "undecided"),
        (20, 10_000, "good"),
        (20, 3, "undecided"),
        (10_000, 3, "unproven"),
        (10_000, 0, "unproven"),
    ],
)
def test_a_step_needs_seconds_and_answers(
    limits: Release, elapsed: float, answers: int, kind: str
) -> None:
    case = judge.begin({})
    assert judge.decide(case, limits, 20, elapsed, answers, paired=False).kind == kind


def test_counters_that_began_again_are_counted_from_nothing() -> None:
    slots = Slots(0)
    before = slots.look({"champion": 50, "challenger": 0})["champion"]
    again = Slots(1).look({"champion": 10, "challenger": 0})["champion"]
    assert judge.since(before, again) == again
    assert judge.since(None, again) == again
    assert judge.since(before, before).requests == 0
