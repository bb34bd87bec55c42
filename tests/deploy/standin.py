"""A replica without a model, up in a moment: its probability is a hash of the request's body.

For tests of what stands around a replica. Its command line and routes are those of the service.
"""

import argparse
import asyncio
import hashlib
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).parent.parent))

from deploy import faults
from deploy.faults import Receive, Scope, Send

from pipelines.deploy import whole

BINS = 20


class Standin:
    """One process's answers and counts."""

    def __init__(self, digest: str, fault: str) -> None:
        self.digest, self.fault = digest, fault
        self.bins, self.fallbacks, self.draining = [0] * BINS, 0, False
        self.statuses = Counter[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        status, answer = self._answer(scope["path"], body)
        headers = [(key, value) for key, value in scope["headers"] if key == b"x-request-id"]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.encode()})

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    def _answer(self, path: str, body: bytes) -> tuple[int, str]:
        if path == "/v2/health/ready":
            return (503 if self.draining or self.fault == "never" else 200), ""
        if path == "/metrics":
            return 200, self._metrics()
        if path != "/predict":
            return 404, ""
        if not body:
            self.statuses["422"] += 1
            return 422, ""
        before = self.fallbacks
        predictions = [{"probability": self._predict(body)}]
        self.statuses["200" if before == self.fallbacks else "fallback"] += 1
        return 200, json.dumps({"predictions": predictions, "bundle": self.digest})

    def _predict(self, body: bytes) -> float:
        """Skewed to small ones, as most flights are on time."""
        value = (int.from_bytes(hashlib.sha256(body).digest()[:4], "big") / 2**32) ** 3
        if self.fault == "nan":
            self.fallbacks += 1
            return 0.2
        value = {"constant": 0.2, "inverted": 1 - value}.get(self.fault, value)
        self.bins[min(math.floor(value * BINS), BINS - 1)] += 1
        return value

    def _metrics(self) -> str:
        import psutil

        lines, total = [], 0
        for number, count in enumerate(self.bins, start=1):
            total += count
            lines.append(f'headrace_first_predictions_bucket{{le="{number / BINS}"}} {total}')
        lines += [
            f'headrace_first_predictions_bucket{{le="+Inf"}} {total}',
            *(
                f'headrace_requests_total{{route="predict",status="{status}"}} {count}'
                for status, count in self.statuses.items()
            ),
            f'headrace_bundle_info{{bundle="{self.digest}",version="1"}} 1',
            f"process_resident_memory_bytes {psutil.Process().memory_info().rss}",
        ]
        return "\n".join(lines) + "\n"


async def serve(port: int, standin: Standin) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: object) -> None:
            standin.draining = True
            super().handle_exit(sig, frame)  # type: ignore[arg-type]

    app = faults.around(standin, standin.fault)
    config = uvicorn.Config(
        app, host="127.0.0.1", port=port, log_level="warning", http=whole.Protocol
    )
    server = Server(config)

    def gone() -> None:
        if not sys.stdin.buffer.read1(1):
            os._exit(0)

    asyncio.get_running_loop().add_reader(0, gone)
    await server.serve()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--bundle", "--digest", "--fallback", "--fallback-digest", "--version"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    parser.add_argument("--with-parent", action="store_true")
    given = parser.parse_args()
    uvloop.run(serve(given.port, Standin(given.digest, faults.of(given.digest))))


if __name__ == "__main__":
    main()
