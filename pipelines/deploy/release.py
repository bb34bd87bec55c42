"""release: the challenger takes over from the champion, step by step, judged at each. An effect.

in:   the challenger and the champion of the registry; the target that serves
out:  the challenger is champion with all traffic, or the champion has it back; the trail in the
      exchange, the reason on the version, reports/release/record.json. A version that was found bad
      is challenger no more (pipelines/deploy/promotion.py → challenge)
run:  make release, or python -m pipelines.deploy.release [--shadow]

With --shadow callers see nothing of the challenger: its copies of their requests are judged, and it
stops. Killed in the middle and run again, a release goes on from its last good step; a target gives
the champion all traffic where nobody says for a while that the challenger may have its share.
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines import lease, stage
from pipelines.deploy import approval, judge, promotion, registry, targets, trail
from pipelines.deploy.judge import Case, Verdict
from pipelines.deploy.mirrored import Mirrored
from pipelines.deploy.registry import CHALLENGER, ROLLED_BACK, Entry, Registry
from pipelines.deploy.shelf import Shelf
from pipelines.deploy.targets import Slot, Target
from pipelines.deploy.trail import Trail
from pipelines.errors import UserError
from pipelines.params import Params

RECORD = Path("reports/release/record.json")
INTERVAL = 1.0  # seconds between two looks
GONE = 30.0  # seconds until a challenger that was rolled back has to be gone


def run(params: Params, target: Target, shadow: bool = False) -> None:
    """Release the challenger, or go on with the release that was interrupted.

    Raises UserError, once the champion has all traffic, where the challenger was found bad.
    """
    held = registry.of(params)
    with lease.held(held.exchange, f"release-{held.model}", _waits) as mine:
        Controller(held, params, target, mine).run(shadow)


def _waits(who: str) -> None:
    stage.say("release", f"another release is at work: {who}; waiting for it")


class Controller:
    """One release, from its trail's last line to its end."""

    def __init__(self, held: Registry, params: Params, target: Target, mine: lease.Lease) -> None:
        self.held, self.params, self.target, self.mine = held, params, target, mine
        self.limits = params.release
        self.case: Case | None = None

    def run(self, shadow: bool) -> None:
        now = promotion.reconcile(self.held)
        if now is None:
            raise UserError(f"{self.held.model} has no champion to release a challenger beside")
        found = self._unfinished(now, shadow)
        if found is not None and found.begun["challenger"] == now.version:
            self._finish(found)  # killed between the promotion and the switch
            if rival := self.held.aliases().get(CHALLENGER):
                stage.say("release", f"version {rival} is challenger by now; release it: run again")
            return
        if not self.target.up():
            self._unserved(now, shadow, found)
            return
        self._refuse_blind(shadow)
        # Also where nothing is to be released: what is served follows the log.
        theirs = self._start("champion", now.version)
        version = self._challenger(shadow)
        if version is None:
            self._nothing(now)
            return
        if found is None:
            found = trail.follow(
                self.held.exchange,
                self._folder(),
                champion=now.version,
                challenger=version,
                shadow=shadow,
            )
        with self._safe(found):
            ours = self._start("challenger", version)
            captures = Shelf(self.params.serve.capture.folder)
            self.mirrored = Mirrored(captures, Shelf(self.limits.labels), theirs, ours)
            self._step_by_step(found, now, version)
        if not found.ended:
            self._finish(found)

    def _unfinished(self, now: Entry, shadow: bool) -> Trail | None:
        """The release to go on with. One of other versions than today's, or of another kind than
        is asked for, is over.
        """
        found = trail.newest(self.held.exchange, self._folder())
        if found is None or found.ended:
            return None
        if found.begun["challenger"] == now.version:
            return found
        pair = found.begun["champion"], found.begun["challenger"]
        today = now.version, self.held.aliases().get(CHALLENGER)
        if pair != today:
            self._roll_back(found, f"the versions changed from {pair} to {today}")
        elif found.begun["shadow"] != shadow:
            kind = "a shadow" if found.begun["shadow"] else "no shadow"
            self._roll_back(found, f"it was begun as {kind}, and is not gone on with as such")
        else:
            stage.say("release", f"going on with release {found.number}")
            return found
        return None

    def _folder(self) -> str:
        return str(self.held.folder("releases"))

    def _challenger(self, shadow: bool) -> int | None:
        """None where there is none: the release was told twice, or the champion has no rival."""
        version = self.held.aliases().get(CHALLENGER)
        if version is not None and not shadow:
            approval.refuse_without(self.held, self.params, version)
        return version

    def _refuse_blind(self, shadow: bool) -> None:
        """Raise UserError where the params ask for a shadow of which nothing would be known."""
        name, seconds = self.limits.target, self.limits.shadow_seconds
        if shadow and not seconds:
            raise UserError("release.shadow_seconds is 0; expected more for --shadow")
        if seconds and self.target.shadow == "none":
            raise UserError(
                f"release.shadow_seconds is {seconds}; expected 0: {name} copies no request"
            )
        if not self.paired:
            return
        capture, why = self.params.serve.capture, "answers are compared by what was captured"
        if not capture.share:
            raise UserError(
                f"serve.capture.share is 0; expected more where release.shadow_seconds is: {why}"
            )
        if name != "local" and not capture.folder.startswith("s3:"):
            raise UserError(
                f"serve.capture.folder is {capture.folder}; expected s3://bucket/prefix, which who "
                f"serves at {name} and who judges share: {why}"
            )

    @property
    def paired(self) -> bool:
        """Whether answers of both slots to the same requests are compared."""
        return bool(self.limits.shadow_seconds) and self.target.shadow == "paired"

    def _unserved(self, now: Entry, shadow: bool, found: Trail | None) -> None:
        """Promote what the gate passed: where nothing is served, nobody can judge by traffic. What
        traffic began to judge, traffic judges to the end.
        """
        if shadow or found is not None:
            raise UserError(f"nothing is served at {self.limits.target}; start it: make serve")
        version = self._challenger(shadow)
        if version is None:
            self._nothing(now)
            return
        against = self.held.version(version).tags.get("gate_against")
        if against != str(now.version):
            raise UserError(
                f"nothing is served at {self.limits.target} to judge by, and the gate compared "
                f"version {version} with {against}, not with the champion {now.version}; run "
                "python -m pipelines.deploy.gate"
            )
        why = f"nothing is served at {self.limits.target}: no traffic to judge by"
        promotion.promote(self.held, version, now.version, "release", why)
        stage.write_json(RECORD, {"model": self.held.model, "outcome": "promoted", "why": why})
        stage.say("release", f"version {version} is champion; {why}")

    def _nothing(self, now: Entry) -> None:
        stage.write_json(RECORD, {"model": self.held.model, "outcome": "nothing to release"})
        stage.say("release", f"nothing to release: version {now.version} is champion, and no other")
        found = trail.newest(self.held.exchange, self._folder())
        version = found.begun["challenger"] if found is not None else now.version
        with suppress(UserError):  # it may be deleted by now
            if why := self.held.version(version).tags.get(ROLLED_BACK):
                stage.say("release", f"version {version} was rolled back {why}")
                again = f"python -m pipelines.deploy.promotion challenge {version}"
                stage.say("release", f"to try it again: {again}")

    def _start(self, slot: Slot, version: int) -> str:
        """Serve the version in the slot. Returns its hash."""
        before = self.target.serving().get(slot)
        digest = targets.serve(self.target, self.held, slot, version)
        if digest != before:
            stage.say("release", f"version {version} is {slot}, ready")
        return digest

    def _step_by_step(self, found: Trail, now: Entry, version: int) -> None:
        for percent, seconds in self._steps(found):
            verdict = self._step(percent, seconds)
            self.mine.check()
            if verdict.kind != "good":
                bad = verdict.kind == "bad"
                self._roll_back(found, f"at {percent} %: {verdict.reason}", bad)
                raise UserError(
                    f"{self.held.model} version {version} was rolled back: {verdict.reason}"
                )
            # A person may have said no meanwhile.
            if not found.begun["shadow"]:
                approval.refuse_without(self.held, self.params, version)
            found.add("good", percent=percent, reason=verdict.reason)
        if found.begun["shadow"]:
            self._take_away()
            found.add("shadowed")
            self._report(found)
            return
        evidence = {"release": found.number, "steps": found.lines[1:]}
        # The log first: where the switch does not come to pass, whoever runs next makes it.
        promotion.promote(
            self.held, version, now.version, "release", f"release {found.number}", evidence
        )

    def _steps(self, found: Trail) -> Iterator[tuple[int, int]]:
        """Shares and seconds that are still to come. The first share is none: a shadow."""
        steps = [(0, self.limits.shadow_seconds)] if self.limits.shadow_seconds else []
        if not found.begun["shadow"]:
            steps += [(percent, self.limits.step_seconds) for percent in self.limits.steps]
        return (step for step in steps if step[0] not in found.good)

    def _step(self, percent: int, seconds: int) -> Verdict:
        begun, before = time.monotonic(), self.case.answers if self.case else 0
        while True:
            # A controller that was replaced while it slept says nothing more.
            self.mine.check()
            # Said at every look: it holds only as long as somebody says it.
            self.target.shift(percent, shadow=self.limits.shadow_seconds > 0)
            time.sleep(INTERVAL)
            seen = self.target.observe()
            if self.case is None:
                self.case = judge.begin(seen)
            self.case = judge.hear(self.case, seen, self.limits, *self.mirrored.look())
            elapsed, answers = time.monotonic() - begun, self.case.answers - before
            verdict = judge.decide(self.case, self.limits, seconds, elapsed, answers, self.paired)
            stage.say("release", f"{percent:>3} %  {verdict.kind:<9} {verdict.reason}")
            if verdict.kind != "undecided":
                return verdict

    @contextmanager
    def _safe(self, found: Trail) -> Iterator[None]:
        """Whatever goes wrong, the champion gets all traffic; unless another controller is at work
        by now, or the challenger has become champion: then the next run makes the switch.
        """
        try:
            yield
        except lease.LostError:
            raise
        except BaseException as error:
            self.mine.check()
            now = self.held.champion()
            won = now is not None and now.version == found.begun["challenger"]
            if not found.ended and not won:
                # What is no Exception is Ctrl-C.
                why = stage.one_line(error) if isinstance(error, Exception) else "interrupted"
                self._roll_back(found, why)
            raise

    def _take_away(self) -> None:
        """All traffic to the champion, and wait until the target says so."""
        self.target.roll_back()
        begun = time.monotonic()
        while "challenger" in self.target.serving():
            if time.monotonic() - begun > GONE:
                raise RuntimeError(f"the target still serves the challenger after {GONE:.0f} s")
            time.sleep(0.1)

    def _roll_back(self, found: Trail, reason: str, bad: bool = False) -> None:
        """The callers first. A version that was found `bad` is challenger no more."""
        begun, version = time.monotonic(), found.begun["challenger"]
        self._take_away()
        seconds = round(time.monotonic() - begun, 1)
        if bad:
            promotion.bar(self.held, version, f"by release {found.number}: {reason}")
        found.add("rolled back", reason=reason, seconds=seconds)
        self.held.tag(version, {"release": f"release {found.number} rolled back: {reason}"})
        stage.say("release", f"rolled back in {seconds} s: {reason}")
        self._report(found)

    def _finish(self, found: Trail) -> None:
        self.target.switch()
        # Who rolled the champion back meanwhile wrote it first; what is served follows the log.
        now = self.held.champion()
        if now is not None and now.version != found.begun["challenger"]:
            self._start("champion", now.version)
        found.add("promoted")
        self.held.tag(found.begun["challenger"], {"release": f"release {found.number} promoted"})
        self._report(found)

    def _report(self, found: Trail) -> None:
        outcome = found.lines[-1]["event"]
        record = {"model": self.held.model, "release": found.number, "outcome": outcome}
        stage.write_json(RECORD, record | {"trail": found.lines})
        print(f"\n  {'share':>6}  verdict")
        for line in found.lines[1:]:
            share = f"{line['percent']} %" if "percent" in line else ""
            print(f"  {share:>6}  {line['event']} {line.get('reason', '')}".rstrip())


def interrupt(*_: object) -> None:
    """Ctrl-C, once: what it begins, the way back to the champion, comes to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Exit status: 0, 2 where the challenger was rolled back or there is none, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.deploy.release",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shadow", action="store_true", help="mirror and judge, shift nothing")
    shadow = parser.parse_args().shadow
    signal.signal(signal.SIGINT, interrupt)
    return stage.guarded("release", lambda params: run(params, targets.of(params), shadow))


if __name__ == "__main__":
    sys.exit(main())
