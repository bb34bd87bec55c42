"""Connections: how many, and how long a client may take to say what it wants.

uvicorn bounds neither a client that connects and says nothing, nor one that sends a header a
letter at a time. Here whatever is not wholly said in time is closed.
"""

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pipelines.deploy.whole import Gathered

# Beyond the connections: the model, logs, captures.
OTHER_FILES = 256


class Connection(HttpToolsProtocol):
    """One connection; `largest` of them at once, one more is closed at once."""

    largest = 0
    # Since when a request is under way, or the first awaited; None while none is.
    since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Gathered(transport))  # type: ignore[arg-type]
        self.since = self.loop.time()
        if len(self.connections) > self.largest:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # uvicorn leaves the timer of a connection that was reset, and with it all of its memory.
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()

    def on_message_begin(self) -> None:
        self.since = self.loop.time()
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self.since = None
        super().on_message_complete()


async def sweep(connections: set[Any], seconds: float) -> None:
    """Close connections whose request took longer than this to arrive; until cancelled."""
    while True:
        await asyncio.sleep(1)
        late = asyncio.get_running_loop().time() - seconds
        for one in list(connections):
            if one.since is not None and one.since < late:
                one.transport.close()


def allow(connections: int) -> int:
    """Raise this process' limit of open files as far as needed and allowed. Returns for how many
    connections that is enough.
    """
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(now, connections + OTHER_FILES)
    if most != resource.RLIM_INFINITY:
        wanted = min(wanted, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    return min(connections, wanted - OTHER_FILES)
