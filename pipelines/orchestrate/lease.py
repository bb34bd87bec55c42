"""A lease: one at a time, among processes that share nothing but the exchange.

Each holder writes the next generation of the name, and only one can. The generation is the fencing
token: whoever holds a lower one than the newest has been replaced. A holder that is alive renews;
one that is silent for `LIFETIME`, or known to be dead, is followed.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pipelines.orchestrate.exchange import Exchange, Record

LIFETIME = 30.0  # seconds
RENEWAL = LIFETIME / 6
POLL = 0.3


@contextmanager
def held(exchange: Exchange, name: str, waiting: Callable[[str], None]) -> Iterator[int]:
    """Wait until the lease of `name` is free and hold it; yield its generation.

    `waiting` is told once who holds it.
    """
    me = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
    generation = _acquire(exchange, name, me, waiting)
    mine = _path(name, generation)
    stop = threading.Event()
    renewing = threading.Thread(target=_renew, args=(exchange, mine, me, stop), daemon=True)
    renewing.start()
    try:
        yield generation
    finally:
        stop.set()
        renewing.join()
        with suppress(Exception):  # what is not released expires
            exchange.put(mine, me | {"until": 0.0})


def _acquire(exchange: Exchange, name: str, me: Record, waiting: Callable[[str], None]) -> int:
    told = False
    while True:
        generation = newest(exchange, name)
        holder = exchange.get(_path(name, generation)) if generation else None
        if holder is None or _over(holder):
            mine = me | {"until": time.time() + LIFETIME}
            if exchange.put_new(_path(name, generation + 1), mine):
                return generation + 1
        elif not told:
            waiting(f"process {holder['pid']} on {holder['host']}")
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


def _over(holder: Record) -> bool:
    if float(holder["until"]) < time.time():
        return True
    here = holder["host"] == socket.gethostname()
    return here and not _alive(int(holder["pid"]))


def _alive(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _renew(exchange: Exchange, mine: str, me: Record, stop: threading.Event) -> None:
    while not stop.wait(RENEWAL):
        with suppress(Exception):  # the next renewal may get through
            exchange.put(mine, me | {"until": time.time() + LIFETIME})
