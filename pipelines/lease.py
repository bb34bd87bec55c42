"""A lease: one at a time, among processes that share nothing but the exchange.

Each holder writes the next generation of the name, and only one can. The generation is the fencing
token: whoever holds a lower one than the newest has been replaced. A holder that is alive renews;
one whose record stays as it is for `LIFETIME`, by the clock of who waits, or who is known to be
dead, is followed. No two machines' clocks are compared.
"""

import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines.exchange import Exchange, Record
from pipelines.stage import lives, me

LIFETIME = 30.0  # seconds
RENEWAL = LIFETIME / 6
POLL = 0.3


class LostError(RuntimeError):
    """Another process took this one for dead and took its place."""


@dataclass(frozen=True)
class Lease:
    """A lease that is held, unless another process took its place."""

    exchange: Exchange
    name: str
    generation: int

    def check(self) -> None:
        """Raise LostError where another process holds it by now."""
        if newest(self.exchange, self.name) != self.generation:
            raise LostError(f"{self.name}: another process took over")


@contextmanager
def held(exchange: Exchange, name: str, waiting: Callable[[str], None]) -> Iterator[Lease]:
    """Wait until the lease of `name` is free and hold it.

    `waiting` is told once who holds it.
    """
    holder = {"place": _place(), "process": me(), "token": secrets.token_hex(8)}
    generation = _acquire(exchange, name, holder, waiting)
    path = _path(name, generation)
    stop = threading.Event()
    renewing = threading.Thread(target=_renew, args=(exchange, path, holder, stop), daemon=True)
    renewing.start()
    try:
        yield Lease(exchange, name, generation)
    finally:
        stop.set()
        renewing.join()
        with suppress(Exception):  # what is not released expires
            exchange.put(path, holder | {"released": True})


def _acquire(exchange: Exchange, name: str, mine: Record, waiting: Callable[[str], None]) -> int:
    seen: Record | None = None
    since, told = time.monotonic(), False
    while True:
        generation = newest(exchange, name)
        holder = exchange.get(_path(name, generation)) if generation else None
        if holder != seen:
            seen, since = holder, time.monotonic()
        silent = time.monotonic() - since > LIFETIME
        if holder is None or holder.get("released") or silent or _dead(holder):
            if exchange.put_new(_path(name, generation + 1), mine | {"renewed": 0}):
                return generation + 1
        elif not told:
            waiting(f"process {holder['process'].partition(' ')[0]} on {holder['place']}")
            told = True
        time.sleep(POLL)


def newest(exchange: Exchange, name: str) -> int:
    """The newest generation, 0 where nobody held it yet."""
    numbers = [
        path.rpartition("/")[2].removesuffix(".json") for path in exchange.names(f"leases/{name}")
    ]
    return max(map(int, numbers), default=0)


def _path(name: str, generation: int) -> str:
    return f"leases/{name}/{generation:06}.json"


def _place() -> str:
    """Where a process id means something: the host, and the container in it."""
    try:
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return socket.gethostname()
    return f"{socket.gethostname()} {namespace}"


def _dead(holder: Record) -> bool:
    """Whether it was a process of this place and is gone."""
    return bool(holder["place"] == _place() and not lives(holder["process"]))


def _renew(exchange: Exchange, path: str, holder: Record, stop: threading.Event) -> None:
    count = 0
    while not stop.wait(RENEWAL):
        count += 1
        with suppress(Exception):  # the next renewal may get through
            exchange.put(path, holder | {"renewed": count})
