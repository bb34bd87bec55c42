"""Callers that come at their own pace, whatever the answers: an open loop on a few connections."""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence

TIMEOUT = 10.0  # seconds until a caller gives up
NEAR = 1e-5


class Load:
    """`rate` requests a second from a thread of its own, until the block ends.

    `expected` gives by bundle what it says of each body. `seen` counts answers by what was wrong
    with them ("" where nothing was), `slowest` holds their seconds.
    """

    def __init__(
        self,
        port: int,
        rate: float,
        bodies: Sequence[bytes],
        expected: Mapping[str, Sequence[float]],
    ) -> None:
        self.port, self.rate, self.bodies, self.expected = port, rate, bodies, expected
        self.seen: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.over = threading.Event()
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Load":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    async def _run(self) -> None:
        tasks: set[asyncio.Task[None]] = set()
        begun, number = time.perf_counter(), 0
        while not self.over.is_set():
            await asyncio.sleep(max(begun + number / self.rate - time.perf_counter(), 0))
            task = asyncio.create_task(self._one(number % len(self.bodies)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
        await asyncio.gather(*tasks)
        for _, writer in self.idle:
            writer.close()

    async def _one(self, row: int) -> None:
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(TIMEOUT):
                wrong = await self._ask(row)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
            wrong = type(error).__name__
        self.seen[wrong] += 1
        self.seconds.append(time.perf_counter() - begun)

    async def _ask(self, row: int) -> str:
        reader, writer = (
            self.idle.pop() if self.idle else await asyncio.open_connection("127.0.0.1", self.port)
        )
        body = self.bodies[row]
        head = "POST /predict HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith("content-length:"))
        said = await reader.readexactly(length)
        self.idle.append((reader, writer))
        status = lines[0].split(" ")[1]
        if status != "200":
            return f"{status} {said[:80].decode()}"
        return self._judge(row, json.loads(said))

    def _judge(self, row: int, said: dict) -> str:
        bundle = said["bundle"]
        self.answered[bundle] += 1
        if said.get("fallback"):
            return "fallback"
        if bundle not in self.expected:
            return "unknown bundle"
        off = abs(said["predictions"][0]["probability"] - self.expected[bundle][row])
        return "" if off < NEAR else "wrong answer"

    def says(self) -> str:
        ordered = sorted(self.seconds)
        p50, p99 = (ordered[int(len(ordered) * part)] * 1000 for part in (0.5, 0.99))
        failed = {why: n for why, n in self.seen.items() if why}
        return f"{len(ordered):,} requests, p50 {p50:.1f} ms, p99 {p99:.1f} ms; not right: {failed}"
