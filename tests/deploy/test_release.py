"""A release ends with the challenger as champion, or with the champion as it was; never between."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from deploy.served import FAULTY, Served, served, until
from deploy.tiny import make_bundle, two_versions
from world import ROOT, Checkout

from pipelines import lease, stage
from pipelines.deploy import approval, promotion, register, release, targets, trail
from pipelines.deploy.registry import CHALLENGER, ROLLED_BACK, Registry
from pipelines.deploy.targets import Observation, Release, Shadow, Slot
from pipelines.errors import UserError

QUICK: dict[str, Any] = {
    "shadow_seconds": 1, "step_seconds": 1, "step_requests": 30, "limit_seconds": 20,
    "steps": [20, 100],
}  # fmt: skip


class Pretended:
    """A target in memory, whose challenger may answer badly, and which may break at a call."""

    shadow: Shadow = "copied"

    def __init__(
        self,
        errors: int = 0,
        answers: int = 100,
        breaks: str = "",
        hides: Slot | None = None,
        meanwhile: Callable[[str], None] = lambda call: None,
    ) -> None:
        self.errors, self.answers, self.breaks = errors, answers, breaks
        self.hides, self.meanwhile = hides, meanwhile
        self.slots: dict[Slot, str] = {}
        self.percent, self.calls = 0, list[str]()
        self.seen: dict[Slot, Observation] = {}
        self.awake, self.shadowed = True, False

    def up(self) -> bool:
        return self.awake

    def start(self, slot: Slot, release: Release) -> None:
        assert stage.digest(release.folder) == release.digest
        self._called(f"start {slot}")
        if self.slots.get(slot) != release.digest:
            self.slots[slot] = release.digest
            self.seen[slot] = Observation(0, 0, 0, {0.01: 0, 1.0: 0}, (0,) * 20, 10**8, 0)

    def healthy(self, slot: Slot) -> bool:
        return slot in self.slots

    def shift(self, percent: int, shadow: bool = False) -> None:
        self._called(f"shift {percent}")
        self.percent = percent
        self.shadowed |= shadow

    def switch(self) -> None:
        self._called("switch")
        if "challenger" in self.slots:
            self.slots = {"champion": self.slots["challenger"]}
            self.percent = 0

    def roll_back(self) -> None:
        self.calls.append("roll back")
        self.slots.pop("challenger", None)
        self.percent = 0

    def serving(self) -> dict[Slot, str]:
        return dict(self.slots)

    def observe(self) -> dict[Slot, Observation]:
        for slot, seen in self.seen.items():
            n, errors = self.answers, self.errors if slot == "challenger" else 0
            self.seen[slot] = replace(
                seen,
                requests=seen.requests + n,
                errors=seen.errors + errors,
                latency={bound: count + n for bound, count in seen.latency.items()},
                predictions=(seen.predictions[0] + n, *seen.predictions[1:]),
            )
        shown = self.slots.keys() - {self.hides}
        return {slot: seen for slot, seen in self.seen.items() if slot in shown}

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.meanwhile(name)
        if name == self.breaks:
            self.breaks = ""
            raise RuntimeError(f"{name} broke")


@pytest.fixture
def held(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Version 1 is champion, version 2 has passed the gate."""
    monkeypatch.setattr(release, "INTERVAL", 0.05)
    monkeypatch.setattr(lease, "LIFETIME", 2.0)
    checkout.set(release=QUICK)
    return two_versions(checkout.params())


def _trail(held: Registry) -> trail.Trail:
    found = trail.newest(held.exchange, str(held.folder("releases")))
    assert found is not None
    return found


def _events(held: Registry) -> list[str]:
    return [line["event"] for line in _trail(held).lines]


def _champion(held: Registry) -> int:
    found = held.champion()
    assert found is not None
    return found.version


def test_a_good_challenger_becomes_champion(held: Registry, checkout: Checkout) -> None:
    target = Pretended()
    release.run(checkout.params(), target)
    assert (_champion(held), target.slots) == (2, {"champion": held.version(2).tags["bundle"]})
    assert _events(held) == ["begun", "good", "good", "good", "promoted"]
    shares = [call for call in dict.fromkeys(target.calls) if call.startswith("shift")]
    assert shares == ["shift 0", "shift 20", "shift 100"]
    assert stage.read_json(release.RECORD)["outcome"] == "promoted"


def test_a_bad_challenger_is_rolled_back_with_the_reason(
    held: Registry, checkout: Checkout
) -> None:
    target = Pretended(errors=20)
    with pytest.raises(UserError, match=r"version 2 was rolled back: errors: 20\.0% against 0\.0%"):
        release.run(checkout.params(), target)
    assert (_champion(held), list(target.slots), target.percent) == (1, ["champion"], 0)
    assert _events(held) == ["begun", "rolled back"]
    assert "errors: 20.0%" in held.version(2).tags["release"]
    assert stage.read_json(release.RECORD)["outcome"] == "rolled back"


def test_what_was_rolled_back_comes_again_only_if_a_person_says_so(
    held: Registry, checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError):
        release.run(checkout.params(), Pretended(errors=20))
    register.run(checkout.params())  # the same bundle, once more
    target = Pretended()
    release.run(checkout.params(), target)
    assert set(target.slots) == {"champion"}
    said = capsys.readouterr().out
    assert "version 2 was rolled back by release 1: at 0 %: errors: 20.0%" in said
    assert "to try it again: python -m pipelines.deploy.promotion challenge 2" in said
    promotion.challenge(held, 2)
    release.run(checkout.params(), target)
    assert _champion(held) == 2
    assert ROLLED_BACK not in held.version(2).tags
    with pytest.raises(UserError, match="version 2 is champion"):
        promotion.challenge(held, 2)


def test_what_a_person_rolled_back_can_be_challenger_too(
    held: Registry, checkout: Checkout
) -> None:
    promotion.promote(held, 2, 1, "a person", "a try")
    for _ in range(2):
        # Who approves it does not know that it will be rolled back.
        approval.decide(held, 2, approval.APPROVED, "a person", "yes")
        promotion.roll_back(held, promotion.standing(held.log())[-1].version, "a person", "no")
        register.run(checkout.params())
        assert CHALLENGER not in held.aliases()
        assert ROLLED_BACK in held.version(2).tags
        assert approval.APPROVED not in held.version(2).tags
        approval.decide(held, 2, approval.APPROVED, "a person", "yes, again")
        promotion.challenge(held, 2)
        promotion.reconcile(held)
        assert held.aliases() == {"champion": 1, CHALLENGER: 2}
        assert ROLLED_BACK not in held.version(2).tags
        assert approval.APPROVED in held.version(2).tags
        promotion.promote(held, 2, 1, "a person", "again")


def test_a_person_who_says_no_meanwhile_is_heard(held: Registry, checkout: Checkout) -> None:
    def reject(call: str) -> None:
        if call == "shift 20":
            approval.decide(held, 2, approval.REJECTED, "a person", "no")

    target = Pretended(meanwhile=reject)
    with pytest.raises(UserError, match="version 2 was rejected by a person: no"):
        release.run(checkout.params(), target)
    assert (_champion(held), set(target.slots)) == (1, {"champion"})
    assert "shift 100" not in target.calls


def test_a_gate_against_a_champion_of_before_is_none_where_nothing_is_served(
    held: Registry, checkout: Checkout
) -> None:
    held.tag(2, {"gate_against": "7"})
    target = Pretended()
    target.awake = False
    with pytest.raises(UserError, match="compared version 2 with 7, not with the champion 1; run"):
        release.run(checkout.params(), target)
    assert _champion(held) == 1


@pytest.mark.parametrize("hides", [None, "champion", "challenger"])
def test_no_traffic_or_a_slot_nobody_can_see_is_bad(
    held: Registry, checkout: Checkout, hides: Slot | None
) -> None:
    checkout.set(release={"limit_seconds": 1})
    with pytest.raises(UserError, match="no traffic or no metrics"):
        release.run(checkout.params(), Pretended(answers=100 if hides else 0, hides=hides))
    assert _champion(held) == 1
    # It ends as a bad one does, but nothing was found against the version.
    assert held.aliases()[CHALLENGER] == 2
    checkout.set(release={"limit_seconds": 20})
    release.run(checkout.params(), Pretended())
    assert _champion(held) == 2


def test_a_shadow_is_judged_and_nobody_sees_it(held: Registry, checkout: Checkout) -> None:
    target = Pretended()
    release.run(checkout.params(), target, shadow=True)
    assert (_champion(held), list(target.slots)) == (1, ["champion"])
    assert {call for call in target.calls if call.startswith("shift")} == {"shift 0"}
    assert _events(held) == ["begun", "good", "shadowed"]


def test_a_target_that_copies_no_request_releases_without_a_shadow(
    held: Registry, checkout: Checkout
) -> None:
    target = Pretended()
    target.shadow = "none"
    with pytest.raises(UserError, match="shadow_seconds is 1; expected 0: local copies no request"):
        release.run(checkout.params(), target)
    assert trail.newest(held.exchange, str(held.folder("releases"))) is None  # nothing was begun
    checkout.set(release={"shadow_seconds": 0})
    with pytest.raises(UserError, match="shadow_seconds is 0; expected more for --shadow"):
        release.run(checkout.params(), target, shadow=True)
    release.run(checkout.params(), target)
    assert _champion(held) == 2
    assert "shift 0" not in target.calls
    assert target.shadowed is False


def test_without_pairs_to_compare_no_release_is_begun(held: Registry, checkout: Checkout) -> None:
    target = Pretended()
    target.shadow = "paired"
    checkout.set(serve={"capture": {"share": 0}})
    with pytest.raises(UserError, match=r"serve\.capture\.share is 0; expected more"):
        release.run(checkout.params(), target)
    checkout.set(serve={"capture": {"share": 1}}, release={"target": "kubernetes"})
    with pytest.raises(UserError, match=r"serve\.capture\.folder is .* expected s3://"):
        release.run(checkout.params(), target)
    checkout.set(release={"target": "local", "limit_seconds": 1})
    with pytest.raises(
        UserError, match="; 0 different requests answered by both so far; expected "
    ):
        release.run(checkout.params(), target)


def test_ctrl_c_again_does_not_interrupt_the_way_back(held: Registry, checkout: Checkout) -> None:
    class Impatient(Pretended):
        def roll_back(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            super().roll_back()

    def interrupted(call: str) -> None:
        if call == "shift 20":
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, release.interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            release.run(checkout.params(), Impatient(meanwhile=interrupted))
    finally:
        signal.signal(signal.SIGINT, before)
    record = stage.read_json(release.RECORD)
    assert (record["outcome"], record["trail"][-1]["reason"]) == ("rolled back", "interrupted")


def test_an_interrupted_release_leaves_its_own_record(held: Registry, checkout: Checkout) -> None:
    def interrupted(call: str) -> None:
        if call == "shift 20":
            raise KeyboardInterrupt

    stage.write_json(release.RECORD, {"outcome": "promoted"})
    with pytest.raises(KeyboardInterrupt):
        release.run(checkout.params(), Pretended(meanwhile=interrupted))
    record = stage.read_json(release.RECORD)
    assert (record["outcome"], record["trail"][-1]["reason"]) == ("rolled back", "interrupted")
    # That says nothing against the version.
    release.run(checkout.params(), Pretended())
    assert _champion(held) == 2


@pytest.mark.parametrize("breaks", ["start challenger", "shift 0", "shift 20", "shift 100"])
def test_where_the_target_breaks_the_champion_stays(
    held: Registry, checkout: Checkout, breaks: str
) -> None:
    target = Pretended(breaks=breaks)
    with pytest.raises(RuntimeError, match=f"{breaks} broke"):
        release.run(checkout.params(), target)
    assert (_champion(held), target.percent) == (1, 0)
    assert "challenger" not in target.slots
    assert _events(held)[-1] == "rolled back"


def test_broken_between_promotion_and_switch_the_next_run_switches(
    held: Registry, checkout: Checkout
) -> None:
    target = Pretended(breaks="switch")
    with pytest.raises(RuntimeError):
        release.run(checkout.params(), target)
    release.run(checkout.params(), target)
    assert (_champion(held), target.slots) == (2, {"champion": held.version(2).tags["bundle"]})
    assert _events(held)[-1] == "promoted"


def test_a_release_goes_on_from_its_last_good_step(held: Registry, checkout: Checkout) -> None:
    target = Pretended()
    folder = str(held.folder("releases"))
    begun = trail.follow(held.exchange, folder, champion=1, challenger=2, shadow=False)
    begun.add("good", percent=0, reason="")
    begun.add("good", percent=20, reason="")
    release.run(checkout.params(), target)
    assert {call for call in target.calls if call.startswith("shift")} == {"shift 100"}
    assert (_champion(held), _trail(held).number) == (2, 1)


@pytest.mark.parametrize("begun", [True, False])
def test_a_shadow_is_not_gone_on_with_as_a_release_nor_the_reverse(
    held: Registry, checkout: Checkout, begun: bool
) -> None:
    folder = str(held.folder("releases"))
    trail.follow(held.exchange, folder, champion=1, challenger=2, shadow=begun)
    release.run(checkout.params(), Pretended(), shadow=not begun)
    assert _trail(held).number == 2
    assert _events(held)[-1] == ("promoted" if begun else "shadowed")
    assert "not gone on with" in str(held.exchange.get(f"{folder}/000001/000002.json"))


def test_what_traffic_began_to_judge_is_not_promoted_without(
    held: Registry, checkout: Checkout
) -> None:
    folder = str(held.folder("releases"))
    trail.follow(held.exchange, folder, champion=1, challenger=2, shadow=False)
    target = Pretended()
    target.awake = False
    with pytest.raises(UserError, match="nothing is served at local; start it: make serve"):
        release.run(checkout.params(), target)
    assert _champion(held) == 1


def test_a_controller_that_slept_and_was_replaced_says_nothing_more(
    held: Registry, checkout: Checkout
) -> None:
    name = f"release-{held.model}"

    def replaced(call: str) -> None:
        if call == "shift 20":
            newest = lease.newest(held.exchange, name)
            held.exchange.put_new(f"leases/{name}/{newest + 1:06}.json", {"place": "elsewhere"})

    target = Pretended(meanwhile=replaced)
    with pytest.raises(lease.LostError):
        release.run(checkout.params(), target)
    assert target.calls[-1] == "shift 20"
    assert set(target.slots) == {"champion", "challenger"}
    assert "rolled back" not in _events(held)


def test_rolled_back_by_a_person_as_it_switches_what_is_served_follows_the_log(
    held: Registry, checkout: Checkout
) -> None:
    def back(call: str) -> None:
        if call == "switch":
            promotion.roll_back(held, 2, "a person", "no")

    target = Pretended(meanwhile=back)
    release.run(checkout.params(), target)
    assert (_champion(held), target.slots) == (1, {"champion": held.version(1).tags["bundle"]})


def test_the_commands_of_promotion_see_and_mend_what_is_served(
    held: Registry,
    checkout: Checkout,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = Pretended()
    monkeypatch.setattr(targets, "of", lambda params: target)
    bundles = {number: held.version(number).tags["bundle"] for number in (1, 2)}
    target.slots = {"champion": bundles[2]}
    assert promotion.main(["status"]) == 0
    said = f"bundle {bundles[2][:12]} is served as champion; run reconcile"
    assert said in capsys.readouterr().out
    for verb, champion in (
        (["reconcile"], 1),
        (["promote", "2", "--replaces", "1"], 2),
        (["roll-back", "--replaces", "2"], 1),
    ):
        assert promotion.main(verb) == 0
        assert target.slots == {"champion": bundles[champion]}
        assert "run reconcile" not in capsys.readouterr().out


def test_a_release_of_other_versions_is_over(held: Registry, checkout: Checkout) -> None:
    """A newer challenger came while the controller was dead."""
    folder = str(held.folder("releases"))
    trail.follow(held.exchange, folder, champion=1, challenger=2, shadow=False)
    make_bundle(0.2)
    register.run(checkout.params())
    held.tag(3, {"gate": "passed", "gate_against": "1"})
    release.run(checkout.params(), Pretended())
    assert (_champion(held), _trail(held).number) == (3, 2)
    assert "the versions changed" in held.version(2).tags["release"]


def test_a_controller_that_was_replaced_changes_nothing(held: Registry) -> None:
    folder = str(held.folder("releases"))
    one = trail.follow(held.exchange, folder, champion=1, challenger=2, shadow=False)
    two = _trail(held)
    two.add("good", percent=0, reason="")
    with pytest.raises(lease.LostError, match="another controller"):
        one.add("rolled back", reason="late")


@pytest.mark.parametrize("awake", [True, False])
def test_without_gate_there_is_no_release(held: Registry, checkout: Checkout, awake: bool) -> None:
    held.tag(2, {"gate": "failed", "gate_reason": "worse"})
    target = Pretended()
    target.awake = awake
    with pytest.raises(UserError, match="may not be released: worse"):
        release.run(checkout.params(), target)
    assert _champion(held) == 1


def test_without_challenger_nothing_is_released_but_the_champion_served(
    held: Registry, checkout: Checkout
) -> None:
    held.store.delete_registered_model_alias(held.model, CHALLENGER)
    target = Pretended()
    release.run(checkout.params(), target)
    assert json.loads(release.RECORD.read_text())["outcome"] == "nothing to release"
    assert target.serving() == {"champion": held.version(1).tags["bundle"]}


def test_where_nothing_is_served_the_gate_decides_alone(held: Registry, checkout: Checkout) -> None:
    target = Pretended()
    target.awake = False
    with pytest.raises(UserError, match="nothing is served at local; start it: make serve"):
        release.run(checkout.params(), target, shadow=True)
    release.run(checkout.params(), target)
    release.run(checkout.params(), target)
    assert _champion(held) == 2
    assert target.calls == []


@pytest.fixture
def here(held: Registry, checkout: Checkout, tmp_path: Path) -> Iterator[Served]:
    """Real replicas of this checkout, and callers who never pause. Version 2 is slow."""
    faults = {held.version(2).tags["bundle"]: "slow"}
    folder = Path(".state/serving").resolve()
    over = threading.Event()
    with served(folder, checkout.params(), FAULTY, faults, replicas=1) as made:

        def ask() -> None:
            while not over.is_set():
                made.ask(1)
                time.sleep(0.005)

        callers = [threading.Thread(target=ask) for _ in range(4)]
        for caller in callers:
            caller.start()
        yield made
        over.set()
        for caller in callers:
            caller.join()


def _controller(checkout: Checkout) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.deploy.release"],
        cwd=checkout.folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_a_slow_challenger_is_found_behind_a_real_envoy(
    here: Served, held: Registry, checkout: Checkout
) -> None:
    """The first controller is killed as it begins; the second finds its release and ends it."""
    checkout.set(release={"shadow_seconds": 40, "limit_seconds": 60})  # of slow looks it takes ten
    first = _controller(checkout)
    until(lambda: "challenger" in here.target.serving(), 60)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    said, _ = (second := _controller(checkout)).communicate(timeout=120)
    assert second.returncode == 2, said
    assert "going on with release 1" in said
    assert "version 2 was rolled back: slower than" in said
    assert list(here.target.serving()) == ["champion"]
    assert set(here.ask(20)) == {held.version(1).tags["bundle"]}
