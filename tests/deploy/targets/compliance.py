"""What every target promises. A target's own test subclasses Compliance and gives it a `place`."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from pipelines.deploy.targets import Release, Target


@dataclass(frozen=True)
class Place:
    """A fresh target that serves nothing yet, two releases of one model, and how to ask it.

    `ask(n)` sends n requests as a caller would and counts the answers by the digest of the bundle
    that gave them; None where this target can only be looked at.
    """

    target: Target
    champion: Release
    challenger: Release
    ask: Callable[[int], Counter[str]] | None = None
    patience: float = 30.0  # seconds

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait, since a target is told and then works on it."""
        end = time.monotonic() + self.patience
        while not condition():
            assert time.monotonic() < end, f"not within {self.patience} s; {self.target.serving()}"
            time.sleep(0.05)

    def champion_up(self) -> None:
        self.target.start("champion", self.champion)
        self.until(lambda: self.target.healthy("champion"))

    def both_up(self) -> None:
        self.champion_up()
        self.target.start("challenger", self.challenger)
        self.until(lambda: self.target.healthy("challenger"))

    def serves(self, champion: Release, challenger: Release | None = None) -> None:
        """Wait until exactly these are served."""
        wanted = {"champion": champion.digest}
        if challenger is not None:
            wanted["challenger"] = challenger.digest
        self.until(lambda: self.target.serving() == wanted)


class Compliance:
    """The promises; `place` is the fixture of the subclass."""

    @pytest.fixture
    def place(self) -> Place:
        raise NotImplementedError("a target's test gives this fixture")

    def test_what_was_not_started_is_not_healthy(self, place: Place) -> None:
        assert place.target.up()  # it can serve a first champion
        assert not place.target.healthy("champion")
        assert not place.target.healthy("challenger")
        assert place.target.serving() == {}

    def test_a_started_champion_serves_and_told_twice_changes_nothing(self, place: Place) -> None:
        place.champion_up()
        place.target.start("champion", place.champion)
        assert place.target.healthy("champion")
        place.serves(place.champion)
        if place.ask is not None:
            assert set(place.ask(20)) == {place.champion.digest}

    def test_a_challenger_gets_nothing_until_it_is_given_a_share(self, place: Place) -> None:
        place.both_up()
        place.target.start("challenger", place.challenger)
        place.serves(place.champion, place.challenger)
        if place.ask is not None:
            assert set(place.ask(50)) == {place.champion.digest}

    def test_a_share_is_what_callers_see(self, place: Place) -> None:
        place.both_up()
        for percent in (25, 25, 50):
            place.target.shift(percent)
        if place.ask is not None:
            asked = place.ask
            place.until(lambda: asked(1)[place.challenger.digest] == 1)
            # Of 600 answers the share lies within 10 points but once in a million times.
            seen = asked(600)[place.challenger.digest] / 600
            assert seen == pytest.approx(0.5, abs=0.1)
        place.serves(place.champion, place.challenger)

    def test_all_of_the_traffic_can_go_to_the_challenger_and_come_back(self, place: Place) -> None:
        place.both_up()
        place.target.shift(100)
        if place.ask is not None:
            asked = place.ask
            place.until(lambda: set(asked(20)) == {place.challenger.digest})
        place.target.shift(0)
        if place.ask is not None:
            place.until(lambda: set(asked(20)) == {place.champion.digest})

    def test_rolled_back_the_champion_is_alone(self, place: Place) -> None:
        place.both_up()
        place.target.shift(50, shadow=True)
        for _ in range(2):
            place.target.roll_back()
            place.serves(place.champion)
        assert not place.target.healthy("challenger")
        assert place.target.healthy("champion")
        if place.ask is not None:
            assert set(place.ask(50)) == {place.champion.digest}

    def test_switched_the_challenger_is_champion_and_alone(self, place: Place) -> None:
        place.both_up()
        place.target.shift(100)
        for _ in range(2):
            place.target.switch()
            place.serves(place.challenger)
        place.until(lambda: place.target.healthy("champion"))
        assert not place.target.healthy("challenger")
        if place.ask is not None:
            assert set(place.ask(50)) == {place.challenger.digest}

    def test_after_a_rollback_the_same_challenger_can_come_again(self, place: Place) -> None:
        place.both_up()
        place.target.roll_back()
        place.serves(place.champion)
        place.target.start("challenger", place.challenger)
        place.until(lambda: place.target.healthy("challenger"))
        place.serves(place.champion, place.challenger)

    def test_another_champion_takes_the_place_of_the_first(self, place: Place) -> None:
        place.champion_up()
        place.target.start("champion", place.challenger)
        place.serves(place.challenger)
        place.until(lambda: place.target.healthy("champion"))

    def test_what_was_answered_is_counted(self, place: Place) -> None:
        place.both_up()
        place.target.shift(50)
        if place.ask is None:
            return
        asked = place.ask
        place.until(lambda: asked(1)[place.challenger.digest] == 1)
        answers = asked(40)
        for release, slot in ((place.champion, "champion"), (place.challenger, "challenger")):
            count = answers[release.digest]

            def counted(slot: str = slot, count: int = count) -> bool:
                found = place.target.observe().get(slot)  # type: ignore[call-overload]
                return (
                    found is not None
                    and found.requests >= count
                    and sum(found.predictions) >= count
                    and max(found.latency.values(), default=0) >= count
                    and found.memory_bytes > 0
                )

            place.until(counted)
            assert place.target.observe()[slot].errors == 0  # type: ignore[index]
