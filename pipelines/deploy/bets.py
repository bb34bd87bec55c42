"""Bets against a claim, which may be looked at at any time.

The bettor begins with 1 and may stake a part of what it has on each outcome. If the claim is true
its expected wealth never grows, so (Ville's inequality) the chance that it *ever* reaches 1/level
is at most `level`, however often one looks, and whenever one stops.

Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B (2024).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from pipelines.deploy.targets import Slot

# Parts of the wealth that are staked, each by a bettor of its own; the wealth is their mean.
STAKES = (0.01, 0.03, 0.1, 0.3, 0.6, 0.9)


@dataclass(frozen=True)
class Bet:
    """The logarithms of the bettors' wealth."""

    logs: tuple[float, ...] = (0.0,) * len(STAKES)

    def after(self, gains: Iterable[tuple[float, int]]) -> "Bet":
        """After so many outcomes of each gain, all at least -1 and in expectation at most 0."""
        logs = np.array(self.logs)
        for gain, times in gains:
            logs += times * np.log1p(np.array(STAKES) * gain)
        return Bet(tuple(logs.tolist()))

    @property
    def log(self) -> float:
        return float(np.logaddexp.reduce(self.logs) - math.log(len(STAKES)))


@dataclass(frozen=True)
class Share:
    """How many of so many."""

    marked: int = 0
    all: int = 0

    def __add__(self, other: "Share") -> "Share":
        return Share(self.marked + other.marked, self.all + other.all)

    @property
    def value(self) -> float:
        return self.marked / self.all if self.all else 0.0


@dataclass(frozen=True)
class Pairs:
    """A bet that the challenger's share is above the champion's by more than a tolerance.

    Answers of both are paired by chance; `waiting` has no partner yet.
    """

    bet: Bet = field(default_factory=Bet)
    waiting: Mapping[Slot, Share] = field(
        default_factory=lambda: {"champion": Share(), "challenger": Share()}
    )
    seen: Mapping[Slot, Share] = field(
        default_factory=lambda: {"champion": Share(), "challenger": Share()}
    )

    def after(
        self, new: Mapping[Slot, Share], tolerance: float, chance: np.random.Generator
    ) -> "Pairs":
        here = {slot: self.waiting[slot] + share for slot, share in new.items()}
        pairs = min(share.all for share in here.values())
        drawn = {slot: _draw(chance, share, pairs) for slot, share in here.items()}
        ours, theirs = drawn["challenger"], drawn["champion"]
        both = _draw(chance, Share(theirs, pairs), ours)
        scale = 1 + tolerance  # the difference of two marks, less the tolerance, is at least -scale
        gains = [
            ((1 - tolerance) / scale, ours - both),
            (-1.0, theirs - both),
            (-tolerance / scale, pairs - ours - theirs + both),
        ]
        left = {
            slot: Share(one.marked - drawn[slot], one.all - pairs) for slot, one in here.items()
        }
        seen = {slot: self.seen[slot] + share for slot, share in new.items()}
        return Pairs(self.bet.after(gains), left, seen)

    def says(self) -> str:
        return f"{self.seen['challenger'].value:.1%} against {self.seen['champion'].value:.1%}"


def _draw(chance: np.random.Generator, share: Share, number: int) -> int:
    """How many are marked among `number` of the share, drawn without return."""
    return int(chance.hypergeometric(share.marked, share.all - share.marked, number))


@dataclass(frozen=True)
class Looks:
    """The same bet, on one look after another instead of on pairs of answers.

    What slows one answer, a neighbour on the machine or a replica that starts, slows many at once:
    of such answers a look is one outcome, however many it holds. Slower to condemn, and not misled.
    """

    bet: Bet = field(default_factory=Bet)
    seen: Mapping[Slot, Share] = field(
        default_factory=lambda: {"champion": Share(), "challenger": Share()}
    )

    def after(self, new: Mapping[Slot, Share], tolerance: float) -> "Looks":
        seen = {slot: self.seen[slot] + share for slot, share in new.items()}
        if not new["challenger"].all or not seen["champion"].all:
            return Looks(self.bet, seen)
        # A champion that answers nobody any more is what it was.
        theirs = new["champion"] if new["champion"].all else seen["champion"]
        gain = (new["challenger"].value - theirs.value - tolerance) / (1 + tolerance)
        return Looks(self.bet.after([(gain, 1)]), seen)

    def says(self) -> str:
        return f"{self.seen['challenger'].value:.1%} against {self.seen['champion'].value:.1%}"
