"""Ways for a replica to be bad, put around any ASGI app; which one, by the digest of its bundle.

HEADRACE_FAULTS holds {digest: fault}; only tests and benchmarks know that name.
"""

import asyncio
import json
import os
import random
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

NAME = "HEADRACE_FAULTS"
ASKED = ("/predict", "/v2/models")


def of(digest: str) -> str:
    """The fault of this bundle, or ""."""
    return str(json.loads(os.environ.get(NAME, "{}")).get(digest, ""))


def around(app: App, fault: str) -> App:
    """The app with a fault: errors | slow | memory | crash, or as it is. `never` is the
    stand-in's own: it is not ready, ever.
    """
    random.seed(os.getpid())
    leaked: list[bytearray] = []

    async def faulty(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(ASKED):
            await app(scope, receive, send)
            return
        if fault == "slow":
            await asyncio.sleep(0.05)
        if fault == "memory":
            leaked.append(bytearray(os.urandom(1000) * 1000))
        if fault == "crash" and random.random() < 0.2:
            os._exit(1)
        if fault == "errors" and random.random() < 0.05:
            while (await receive()).get("more_body"):
                pass
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"injected"})
            return
        await app(scope, receive, send)

    return faulty
