"""The champion: of many who promote one wins, whoever is killed; the alias follows the log."""

import itertools
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import Checkout

from pipelines import exchange, tracking
from pipelines.deploy import approval, promotion, registry, targets
from pipelines.deploy.registry import CHALLENGER, CHAMPION, ConflictError, Entry, Registry
from pipelines.deploy.targets import Slot
from pipelines.deploy.targets.local import Local
from pipelines.errors import UserError

PROMOTERS = 20
ROUNDS = 6
FORKED = multiprocessing.get_context("fork")


def _versions(held: Registry, count: int) -> None:
    """So many versions, whose bundles have the hashes b1, b2, …, all passed by the gate."""
    if not held.store.search_registered_models(f"name = '{held.model}'"):
        held.store.create_registered_model(held.model)
    for number in range(1, count + 1):
        tags = {"bundle": f"b{number}", "gate": "passed"}
        held.store.create_model_version(held.model, source="mlflow-artifacts:/none", tags=tags)


@pytest.fixture
def held(checkout: Checkout) -> Registry:
    made = registry.of(checkout.params())
    _versions(made, 4)
    return made


def test_a_promotion_states_whom_it_replaces(held: Registry) -> None:
    first = promotion.promote(held, 1, None, "a", "first")
    assert held.aliases() == {CHAMPION: 1}
    held.store.set_registered_model_alias(held.model, CHALLENGER, "2")
    second = promotion.promote(held, 2, 1, "a", "better")
    assert held.aliases() == {CHAMPION: 2}
    assert [first.number, second.number] == [1, 2]
    with pytest.raises(ConflictError, match="the champion is version 2 by now, not version 1"):
        promotion.promote(held, 3, 1, "b", "better too")
    assert promotion.promote(held, 2, 1, "a", "told twice") == held.champion()
    assert len(held.log()) == 2
    assert "better" in held.version(2).tags["promoted"]


def test_rolling_back_brings_back_the_one_before_and_told_twice_acts_once(held: Registry) -> None:
    for version, before in ((1, None), (2, 1), (3, 2)):
        promotion.promote(held, version, before, "a", "better")
    promotion.roll_back(held, 3, "b", "slow")
    promotion.roll_back(held, 3, "b", "slow")
    assert held.aliases() == {CHAMPION: 2}
    assert "slow" in held.version(3).tags["rolled_back"]
    promotion.roll_back(held, 2, "b", "slow too")
    assert held.aliases() == {CHAMPION: 1}
    with pytest.raises(UserError, match="there was no champion before version 1"):
        promotion.roll_back(held, 1, "b", "slow")
    with pytest.raises(ConflictError, match="the champion is version 1 by now, not version 3"):
        promotion.roll_back(held, 3, "b", "late")


def test_who_follows_serves_what_the_log_says_in_the_end(
    held: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version is rolled back while it starts: the old one is in force, so nobody sees it."""
    served: list[int] = []

    class Here(Local):
        def up(self) -> bool:
            return True

        def serving(self) -> dict[Slot, str]:
            return {"champion": "b1"}

    def serve(target: Local, held: Registry, slot: Slot, version: int) -> None:
        if version == 2 and not served:
            promotion.roll_back(held, 2, "b", "worse")
            promotion.follow(held, target)
        served.append(version)

    monkeypatch.setattr(targets, "serve", serve)
    promotion.promote(held, 1, None, "a", "first")
    promotion.promote(held, 2, 1, "a", "better")
    promotion.follow(held, Here())
    assert served == [1, 2, 1]


def test_reconcile_mends_an_alias_set_by_hand_and_adopts_one_from_before_the_log(
    held: Registry, tmp_path: Path
) -> None:
    held.store.set_registered_model_alias(held.model, CHAMPION, "4")
    entry = promotion.reconcile(held)
    assert entry is not None
    assert (entry.version, entry.bundle) == (4, "b4")
    promotion.promote(held, 2, 4, "a", "better")
    held.store.set_registered_model_alias(held.model, CHAMPION, "3")
    assert "run reconcile" in promotion.status(held, Local(tmp_path))[-1]
    promotion.reconcile(held)
    assert held.aliases() == {CHAMPION: 2}


def test_a_new_registry_has_a_new_log(held: Registry) -> None:
    promotion.promote(held, 1, None, "a", "first")
    held.store.delete_registered_model(held.model)
    assert held.log() == []
    assert promotion.reconcile(held) is None


def test_the_command_refuses_what_no_gate_passed_or_no_person_approved(checkout: Checkout) -> None:
    held = registry.of(checkout.params())
    _versions(held, 2)
    held.tag(2, {"gate": "failed", "gate_reason": "log loss may rise by 0.1"})
    command = "pipelines.deploy.promotion promote"
    failed = checkout.run(f"{command} 2")
    assert failed.status == 2
    assert failed.err.endswith("version 2 may not be released: log loss may rise by 0.1\n")
    checkout.set(release={"approval": True})
    with pytest.raises(UserError, match="version 1 waits for a person: python -m "):
        approval.refuse_without(held, checkout.params(), 1)
    with pytest.raises(SystemExit):
        approval.main(["perhaps", "1"])
    assert approval.main(["reject", "1", "--who", "Ada", "--why", "not on Friday"]) == 2
    with pytest.raises(UserError, match="version 1 was rejected by Ada: not on Friday"):
        approval.refuse_without(held, checkout.params(), 1)
    assert approval.main(["approve", "1", "--who", "Ada", "--why", "Monday"]) == 0
    promoted = checkout.run(f"{command} 1")
    assert promoted.status == 0, promoted
    assert "version 1 in the place of none" in promoted.out
    assert held.aliases() == {CHAMPION: 1}


@settings(max_examples=200)
@given(st.lists(st.booleans(), max_size=30))
def test_the_log_is_a_stack(backs: list[bool]) -> None:
    """Promotions push, roll-backs pop; the newest entry is always the top."""
    log: list[Entry] = []
    for number, back in enumerate(backs, 1):
        stack = promotion.standing(log)
        top = stack[-1].version if stack else None
        entry = Entry(number, number, "b", top, "a", "w")
        if back and len(stack) > 1:
            entry = replace(entry, version=stack[-2].version, rolled_back=True)
        log.append(entry)
        assert promotion.standing(log)[-1].version == entry.version


class _Mortal:
    """An object whose process dies by kill -9 at the n-th call of it or of its like."""

    left = 0

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def called(*arguments: Any, **named: Any) -> Any:
            _Mortal.left -= 1
            # Before the call or after it: what was asked happened, and nobody knows.
            if _Mortal.left == 0 and random.random() < 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
            done = found(*arguments, **named)
            if _Mortal.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        return called


def _promoter(
    open_: Callable[[], Registry], version: int, replaces: int | None, dies_at: int, seed: int
) -> None:
    """Promote in a process of its own. Ends with 0, 3 where another was first, or by signal."""
    random.seed(seed)
    held = open_()
    if dies_at:
        _Mortal.left = dies_at
        held = replace(held, store=_Mortal(held.store), exchange=_Mortal(held.exchange))
    try:
        promotion.promote(held, version, replaces, f"promoter {version}", "race")
    except ConflictError:
        os._exit(3)
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_twenty_at_once_killed_anywhere_leave_one_champion(
    checkout: Checkout, place: str, request: pytest.FixtureRequest
) -> None:
    if place == "bucket":
        url = str(request.getfixturevalue("race_url"))
    else:
        url = str(checkout.folder / "store")
    params = checkout.params()

    def opened() -> Registry:
        store, _ = tracking.client(params)
        return Registry(store, "flights", exchange.at(url))

    # This process keeps no connection that a fork would share.
    FORKED.Process(target=lambda: _versions(opened(), PROMOTERS)).start()
    while len(FORKED.active_children()):
        pass
    rounds = ROUNDS if place == "folder" else 1
    won = 0
    for round_ in range(rounds):
        before = _told(opened)
        replaces = before[-1].version if before else None
        dice = random.Random(round_)
        racers = [
            FORKED.Process(
                target=_promoter,
                args=(opened, version, replaces, dice.choice((0, dice.randint(1, 16))), version),
            )
            for version in range(1, PROMOTERS + 1)
            if version != replaces
        ]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(120)
        ends = [racer.exitcode for racer in racers]
        assert set(ends) <= {0, 3, -signal.SIGKILL}, ends
        log = _told(opened)
        assert log[: len(before)] == before, "nothing is lost"
        assert len(log) - len(before) <= 1, "never two champions"
        assert [entry.number for entry in log] == list(range(1, len(log) + 1))
        for older, newer in itertools.pairwise(log):
            assert newer.replaces == older.version
        assert ends.count(0) <= 1
        if 0 in ends:
            assert len(log) == len(before) + 1
        won += len(log) - len(before)
    assert won >= rounds / 2
    final = _told(opened, mended=True)
    assert final


def _told(open_: Callable[[], Registry], mended: bool = False) -> list[Entry]:
    """The log as a process of its own reads it; with `mended` once the alias was made to agree."""
    ours, theirs = FORKED.Pipe()

    def tell() -> None:
        held = open_()
        if mended:
            newest = promotion.reconcile(held)
            assert newest is not None
            assert held.aliases()[CHAMPION] == newest.version
            assert held.version(newest.version).tags["bundle"] == newest.bundle
        theirs.send(held.log())

    teller = FORKED.Process(target=tell)
    teller.start()
    assert ours.poll(60)
    log: list[Entry] = ours.recv()
    teller.join()
    return log
