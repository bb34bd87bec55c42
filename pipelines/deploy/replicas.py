"""The replicas of one started release: processes that are kept, replaced and drained.

A replica ends when its standard input does, so none outlives the supervisor, however that dies.
"""

import socket
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.deploy.serving import Started, bundle_of

# One that ends by itself is started again after a delay that doubles, and is forgiven once it has
# been healthy for so long.
FIRST_DELAY, LAST_DELAY = 0.1, 5.0  # seconds
FORGIVEN = 10.0
# One that Envoy finds unhealthy for so long hangs, or will never start.
HUNG = 60.0
# Where none of a release was healthy for so long, another may take its place before it is whole.
LOST = 3.0
# One that was told to end and does not, ends anyway.
DRAIN = 30.0
# Where the last word of one that ended stands.
TAIL = 65536  # bytes of its log
# From the moment Envoy no longer names an endpoint until its replica is told to end.
QUIET = 0.5


@dataclass
class Replica:
    """One process of the service. `turn` is the restart of all replicas that it belongs to."""

    process: subprocess.Popen[bytes]
    port: int
    turn: int
    well: float = field(default_factory=time.monotonic)  # when it was last healthy, or started
    since: float | None = None  # since when it is healthy
    leaving: float | None = None  # since when it gets no new requests
    told: bool = False
    hung: bool = False

    def note(self, healthy: bool | None, now: float) -> None:
        """What Envoy says of it; None where Envoy could not be asked, which is no fault of it."""
        if healthy is not False:
            self.well = now
        if healthy is not None:
            self.since = (self.since or now) if healthy else None

    def end(self, now: float) -> None:
        """Take it off the endpoints, a moment later tell it to drain, and in the end insist."""
        self.leaving = self.leaving or now
        if not self.told and now - self.leaving > QUIET:
            self.process.terminate()
            self.told = True
        if now - self.leaving > DRAIN:
            self.process.kill()


class Group:
    """All replicas of a started release: `wanted` of them, each of the newest turn in the end."""

    def __init__(self, folder: Path, program: Sequence[str], started: Started) -> None:
        self.folder, self.program, self.started = folder, program, started
        self.log = folder / "logs" / f"{started.name}.log"
        self.replicas: list[Replica] = []
        self.restarts = 0
        self.well = time.monotonic()  # when one of them was last healthy
        # By turn: how many in a row ended before they were of use; and what the last of them said.
        self.stillborn: Counter[int] = Counter()
        self.last_word = ""
        self.delay, self.not_before = FIRST_DELAY, 0.0

    @property
    def ports(self) -> list[int]:
        """Where requests may go."""
        return [one.port for one in self.replicas if one.leaving is None]

    @property
    def ready(self) -> list[Replica]:
        return [one for one in self.replicas if one.since is not None and one.leaving is None]

    @property
    def lost(self) -> bool:
        """Whether none of them has been healthy for a while."""
        return time.monotonic() - self.well > LOST

    def settle(self, wanted: int, turn: int, healthy: set[int] | None) -> None:
        """One small step towards `wanted` replicas of this turn; None is healthy where Envoy could
        not be asked.

        A replacement is healthy before the replica it replaces leaves: their number never falls.
        """
        now = time.monotonic()
        self._bury(now)
        for one in self.replicas:
            well = None if healthy is None else one.port in healthy
            if well and one.since is None:
                self.stillborn[one.turn] = 0
            one.note(well, now)
            if one.leaving is None and now - one.well > HUNG:
                one.hung = True
                one.process.kill()
        if healthy is None or any(one.port in healthy for one in self.replicas):
            self.well = now
        staying = [one for one in self.replicas if one.leaving is None]
        new = [one for one in staying if one.turn >= turn]
        old = [one for one in staying if one.turn < turn]
        if len(new) < wanted and len(staying) <= wanted and now >= self.not_before:
            self.replicas.append(self._start(turn))
        if len(staying) > wanted and len(self.ready) == len(staying):
            (old or new)[0].end(now)
        self._drain(now)

    def stop(self) -> bool:
        """One small step towards none. True when there is none."""
        now = time.monotonic()
        self._bury(now)
        for one in self.replicas:
            one.end(now)
        return not self.replicas

    def _drain(self, now: float) -> None:
        for one in self.replicas:
            if one.leaving is not None:
                one.end(now)

    def _bury(self, now: float) -> None:
        """Let go of what has ended; what ended unasked makes the next start wait."""
        dead = [one for one in self.replicas if one.process.poll() is not None]
        for one in dead:
            self.replicas.remove(one)
            assert one.process.stdin is not None
            one.process.stdin.close()
            if one.leaving is None:
                self.restarts += 1
                if one.since is None:
                    self.stillborn[one.turn] += 1
                    self.last_word = (
                        f"it was not healthy for {HUNG:.0f} s"
                        if one.hung
                        else last_word(self.log, one.process)
                    )
                settled = one.since is not None and now - one.since > FORGIVEN
                self.delay = FIRST_DELAY if settled else min(2 * self.delay, LAST_DELAY)
                self.not_before = now + self.delay

    def _start(self, turn: int) -> Replica:
        port = free_port()
        bundle = bundle_of(self.folder, self.started.digest)
        command = [*self.program, "--bundle", bundle, "--digest", self.started.digest]
        command += ["--version", self.started.version]
        if self.started.fallback is not None:
            spare = bundle_of(self.folder, self.started.fallback)
            command += ["--fallback", spare, "--fallback-digest", self.started.fallback]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*map(str, command), "--port", str(port), "--with-parent"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # Ctrl-C is for the supervisor, which lets them drain.
                start_new_session=True,
            )
        return Replica(process, port, turn)


def last_word(log: Path, ended: subprocess.Popen[bytes]) -> str:
    """Why a process ended: the last line that is no record, of which those that live write more;
    or how it ended.
    """
    code = ended.returncode
    how = f"ended by signal {-code}" if code < 0 else f"ended with status {code}"
    lines: list[str] = []
    if log.exists():
        with log.open("rb") as held:
            held.seek(max(0, log.stat().st_size - TAIL))
            lines = held.read().decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line and line[0] != "{"), how)


def free_port() -> int:
    """A port that nobody has at this moment."""
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])
