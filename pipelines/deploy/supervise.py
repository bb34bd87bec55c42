"""The supervisor: it makes this machine serve what it should, and says what it does.

in:   .state/serving/desired.json
out:  replicas behind Envoy; .state/serving/status.json

Everything that must survive lies in the two files: killed in any moment, it leaves no process
behind, and started again it goes on from what should be.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pipelines import stage
from pipelines.deploy import counts, envoy, serving
from pipelines.deploy.counts import Counts
from pipelines.deploy.envoy import Way
from pipelines.deploy.replicas import FORGIVEN, Group, last_word
from pipelines.deploy.serving import Desired, Serving, Started, Status
from pipelines.deploy.targets import Slot
from pipelines.deploy.targets.scraped import Page
from pipelines.errors import UserError
from pipelines.params import Serve, Traffic

TICK = 0.1  # seconds
REPORT = 0.4
SILENT = 10.0  # an Envoy that tells nothing for so long is replaced
GOING = 3.0  # until the Envoy of a supervisor that was killed is gone
REPLICA = (sys.executable, "-m", "pipelines.deploy.serve")


class Supervisor:
    """Replicas, Envoy and the files between. One thread acts, another reads what came of it."""

    def __init__(
        self, folder: Path, traffic: Traffic, serve: Serve, program: Sequence[str] = REPLICA
    ) -> None:
        self.folder, self.traffic, self.serve, self.program = folder, traffic, serve, program
        self.config = folder / "envoy"
        self.admin = envoy.Admin(traffic)
        self.groups: dict[str, Group] = {}
        # Of every group there ever was: who reads need not know which one goes.
        self.counts: dict[str, Counts] = {}
        self.pages: dict[str, dict[int, Page]] = {}
        self.proxy: subprocess.Popen[bytes] | None = None
        # Of the proxy: when it began, how often in a row it fell soon, and its last word.
        self.begun, self.falls, self.last_word = 0.0, 0, ""
        self.heard = time.monotonic()  # when it last told who is healthy
        self.wanted = Desired()
        # Who answers the callers: the champion, once it is healthy for the first time.
        self.answering: Started | None = None
        self.ways: list[Way] = []
        self.said: set[str] = set()
        self.over = threading.Event()

    def run(self) -> None:
        """Until `over` is set. Raises UserError where another supervisor serves this folder."""
        busy = f"{self.folder} is served by another supervisor"
        with stage.alone(self.folder / serving.LOCK, busy):
            for name in ("port", "admin_port"):
                _free(name, self.traffic)
            bootstrap = envoy.prepare(self.config, self.traffic, self.serve)
            envoy.validate(bootstrap)
            watching = threading.Thread(target=self._again, args=(self._watch, REPORT), daemon=True)
            watching.start()
            try:
                self._again(lambda: self._act(bootstrap), TICK)
            finally:
                self.over.set()
                watching.join()
                self._end()

    def trouble(self) -> dict[str, str]:
        """What keeps on ending before it is of use, by its name, in one line."""
        turn = self.wanted.restarts
        groups = list(self.groups.items())
        words = {name: one.last_word for name, one in groups if one.stillborn[turn] > 1}
        if self.falls > 1:
            words["envoy"] = self.last_word
        logs = self.folder / "logs"
        return {
            name: f"{name} ends again and again: {word} ({logs / name}.log)"
            for name, word in words.items()
        }

    def _again(self, turn: Callable[[], None], pause: float) -> None:
        """Take this turn until `over`. One that fails is said, and the next goes on: what runs
        serves meanwhile, and a disk that is full for a moment must not end it.
        """
        said = ""
        while not self.over.is_set():
            fault = ""
            try:
                turn()
            except Exception as error:
                fault = stage.one_line(error)
                if fault != said:
                    stage.say("supervise", f"a turn failed and is tried again: {fault}")
            said = fault
            self.over.wait(pause)

    def _act(self, bootstrap: Path) -> None:
        self._keep_proxy(bootstrap)
        self._settle()

    def _keep_proxy(self, bootstrap: Path) -> None:
        log = self.folder / "logs" / "envoy.log"
        log.parent.mkdir(exist_ok=True)
        if time.monotonic() - self.begun > FORGIVEN:
            self.falls = 0
        if self.proxy is not None and time.monotonic() - self.heard > SILENT:
            self.proxy.kill()  # it lives and does not answer
            self.proxy.wait()
        if self.proxy is not None and self.proxy.poll() is None:
            return
        if self.proxy is not None:
            self.falls += 1
            self.last_word = last_word(log, self.proxy)
            _release(self.proxy)
            time.sleep(1)  # one that cannot start must not spin
        self.begun = self.heard = time.monotonic()
        with log.open("ab") as out:
            self.proxy = subprocess.Popen(
                envoy.command(bootstrap, log),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _settle(self) -> None:
        """One step of everything towards what should be."""
        self.wanted = serving.desired(self.folder).held()
        healthy: dict[str, set[int]] | None = None
        with suppress(OSError, ValueError):
            healthy = self.admin.healthy()
            self.heard = time.monotonic()
        slots = self.wanted.slots()
        for started in slots.values():
            if started.name not in self.groups:
                self.counts[started.name] = Counts()
                self.groups[started.name] = Group(self.folder, self.program, started)
        self._answer()
        kept = {started.name for started in slots.values()}
        kept |= {self.answering.name} if self.answering else set()
        for name, group in list(self.groups.items()):
            # What Envoy still sends requests to must not end.
            if name in kept or self._routed(name):
                well = None if healthy is None else healthy.get(name, set())
                group.settle(self.traffic.replicas, self.wanted.restarts, well)
            elif group.stop():
                del self.groups[name]
        self._publish()

    def _answer(self) -> None:
        """Follow the champion; a new one takes over once all its replicas are healthy."""
        champion = self.wanted.champion
        if champion is None or self.answering == champion:
            return
        group = self.groups[champion.name]
        ready = len(group.ready) >= self.traffic.replicas
        if ready or self.answering is None or self.groups[self.answering.name].lost:
            self.answering = champion

    def _publish(self) -> None:
        """Tell Envoy: endpoints and clusters first, routes once it knows the clusters."""
        for name, group in self.groups.items():
            envoy.endpoints(self.config, name, group.ports)
        clusters = envoy.clusters(self.config, self.traffic, sorted(self.groups))
        ways = self._wanted_ways()
        with suppress(OSError, ValueError):
            if self.admin.applied("cds") == clusters:
                routes = envoy.routes(self.config, self.traffic, ways)
                if self.admin.applied("rds") == routes:
                    self.ways = ways

    def _wanted_ways(self) -> list[Way]:
        """With `shadow` each slot gets a copy of what the other one answers, so that the two are
        compared on the same requests at every share.
        """
        champion, challenger = self.answering, self.wanted.challenger
        if champion is None:
            return []
        asked = self.wanted.percent or self.wanted.shadow
        if challenger is None or not asked or not self.groups[challenger.name].ready:
            return [Way(100, champion.name, version=champion.version)]
        copies = (champion.name, challenger.name) if self.wanted.shadow else (None, None)
        return [
            Way(self.wanted.percent, challenger.name, copies[0], challenger.version),
            Way(100 - self.wanted.percent, champion.name, copies[1], champion.version),
        ]

    def _routed(self, name: str) -> bool:
        return any(name in (way.cluster, way.copy) for way in self.ways)

    def _watch(self) -> None:
        """Read what the processes count, report, and say trouble as it begins."""
        pages = {name: self._read(name, group) for name, group in list(self.groups.items())}
        self.pages = pages
        status = self._status()
        for name in status.trouble.keys() - self.said:
            stage.say("supervise", status.trouble[name])
        self.said = set(status.trouble)
        serving.report(self.folder, status)

    def _read(self, name: str, group: Group) -> dict[int, Page]:
        kept = self.counts[name]
        pages: dict[int, Page] = {}
        for one in list(group.replicas):
            with suppress(OSError, ValueError):
                pages[one.process.pid] = counts.read(one.port)
        kept.pages.update(pages)
        with suppress(OSError, ValueError):
            if self.proxy is not None:
                kept.proxies[self.proxy.pid] = self.admin.counted(name)
        return pages

    def _status(self) -> Status:
        wanted, ways = self.wanted, self.ways
        slots: dict[Slot, Serving] = {}
        for slot, name in self._slots().items():
            if (group := self.groups.get(name)) is not None:
                slots[slot] = self._serving(group, wanted.restarts)
        return Status(
            at=time.time(),
            pid=os.getpid(),
            envoy=self.proxy.pid if self.proxy else 0,
            percent=sum(way.percent for way in ways[:-1]),
            shadow=any(way.copy for way in ways),
            restarts=wanted.restarts,
            trouble=self.trouble(),
            slots=slots,
        )

    def _slots(self) -> dict[Slot, str]:
        """Who is who for the callers: what Envoy has in force, not yet what it was told."""
        champion, challenger = self.answering, self.wanted.challenger
        found: dict[Slot, str] = {}
        if self.ways:
            found["champion"] = self.ways[-1].cluster
        elif champion is not None:
            found["champion"] = champion.name
        others = [way.cluster for way in self.ways[:-1]]
        others += [challenger.name] if challenger is not None else []
        if others:
            found["challenger"] = others[0]
        return found

    def _serving(self, group: Group, turn: int) -> Serving:
        name = group.started.name
        pages, ready = self.pages.get(name, {}), group.ready
        replicas = [one for one in list(group.replicas) if one.leaving is None]
        found = {pages[one.process.pid].digest for one in ready if one.process.pid in pages}
        alive = [one.process.pid for one in replicas]
        return Serving(
            name=name,
            wanted=self.traffic.replicas,
            ports=[one.port for one in replicas],
            ready=[one.port for one in ready],
            pids=alive,
            digests=sorted(found),
            old=sum(one.turn < turn for one in group.replicas),
            seen=self.counts[name].observation(alive, group.restarts),
        )

    def _end(self) -> None:
        """Envoy first, so that nobody asks a replica that ends."""
        if self.proxy is not None:
            _release(self.proxy)
        while self.groups:
            for name, group in list(self.groups.items()):
                if group.stop():
                    del self.groups[name]
            time.sleep(TICK)


def _free(name: str, traffic: Traffic) -> None:
    """Raise UserError where another program has the port. Envoy itself would share it."""
    address = traffic.address if name == "port" else "127.0.0.1"
    port = getattr(traffic, name)
    end = time.monotonic() + GOING
    while True:
        with socket.socket() as asked:
            asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                asked.bind((address, port))
                return
            except OSError as error:
                if time.monotonic() > end:
                    raise UserError(
                        f"params.yaml: traffic.{name} is {port} at {address}; expected one that is "
                        f"free: {error.strerror}"
                    ) from None
        time.sleep(TICK)


def _release(proxy: subprocess.Popen[bytes]) -> None:
    """End the process that hangs on our end of its standard input."""
    assert proxy.stdin is not None
    proxy.stdin.close()
    try:
        proxy.wait(10)
    except subprocess.TimeoutExpired:
        proxy.kill()
        proxy.wait()
