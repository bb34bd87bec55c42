"""Capture: a share of the requests with their answers, as Parquet, for monitoring.

A request is kept by the hash of its id and body, so that champion and challenger keep the same ones
of the mirrored. A file is put on the shelf of `serve.capture.folder`, whole, off the event loop,
every so many rows or seconds, and when the replica ends. What cannot be written is dropped and
counted: no request ever waits or fails for it. Files older than retention_days are removed.

    request_id, row     which request, and which row of it
    body                a hash of the request's body: a caller may use an id twice
    at                  when it was answered, UTC
    bundle, version     whose answer
    fallback            null, or who answered in place
    <contract columns>  as asked; null where missing
    prediction          as answered
"""

import asyncio
import hashlib
import logging
import os
import secrets
import time
import zlib
from collections import defaultdict
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines import stage
from pipelines.bundle import PREDICTION
from pipelines.deploy.serve.contract import Columns
from pipelines.deploy.serve.metrics import Metrics
from pipelines.deploy.serve.model import Model, Probabilities
from pipelines.deploy.shelf import Shelf
from pipelines.params import Capture as Settings

log = logging.getLogger("headrace")
# So many files' worth of rows may wait for the disk.
WAITING = 4
SWEEP = 3600.0  # seconds between two looks for what is old


def share_of(request_id: str, body: bytes) -> float:
    """Where a request stands in [0, 1): by its body too, since a caller may know one id only."""
    return zlib.crc32(body, zlib.crc32(request_id.encode())) / 2**32


def digest_of(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=8).hexdigest()


class Kept(NamedTuple):
    """One request and its answer."""

    request_id: str
    body: str
    at: float
    model: Model
    columns: Columns
    answer: Probabilities
    fallback: str | None


class Capture:
    """What waits to be written, and the task that writes it."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.shelf = Shelf(settings.folder)
        self.waiting: list[Kept] = []
        self.rows = 0
        self.enough = asyncio.Event()
        self.over = False
        self.swept = -SWEEP

    def keep(self, kept: Kept) -> None:
        rows = kept.columns.rows
        if self.rows + rows > WAITING * self.settings.rows:
            self.metrics.captured["dropped"] += rows
            return
        self.waiting.append(kept)
        self.rows += rows
        if self.rows >= self.settings.rows:
            self.enough.set()

    async def run(self) -> None:
        """Write until `end`, and then what is left."""
        last = False
        while not last:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.enough.wait(), self.settings.seconds)
            last = self.over
            await self._flush()
            if time.monotonic() > self.swept + SWEEP:
                self.swept = time.monotonic()
                await asyncio.to_thread(self._sweep)

    def end(self) -> None:
        self.over = True
        self.enough.set()

    async def _flush(self) -> None:
        """Write what waits; one file for each bundle that answered."""
        taken, self.waiting, self.rows = self.waiting, [], 0
        self.enough.clear()
        by_bundle: defaultdict[str, list[Kept]] = defaultdict(list)
        for kept in taken:
            by_bundle[kept.model.digest].append(kept)
        for digest, group in by_bundle.items():
            rows = sum(kept.columns.rows for kept in group)
            name = f"{time.time_ns()}-{os.getpid()}-{secrets.token_hex(4)}-{digest[:12]}.parquet"
            try:
                await asyncio.to_thread(self._put, name, group)
                self.metrics.captured["written"] += rows
            except Exception as error:
                self.metrics.captured["dropped"] += rows
                fields = {"rows": rows, "fault": stage.one_line(error)}
                log.error("capture dropped", extra={"fields": fields})

    def _sweep(self) -> None:
        """Remove what is older than retention_days; a name begins with its time."""
        oldest = str(time.time_ns() - self.settings.retention_days * 86400 * 10**9)
        try:
            for name in self.shelf.names():
                at = name.partition("-")[0]
                if at.isdecimal() and at < oldest:
                    self.shelf.remove(name)
        except Exception as error:  # of a disk, or of the way to a bucket
            fields = {"fault": stage.one_line(error)}
            log.error("old captures are not removed", extra={"fields": fields})

    def _put(self, name: str, group: list[Kept]) -> None:
        self.shelf.put(name, table(group))


def table(group: list[Kept]) -> pa.Table:
    """Requests that one bundle answered, a row for each of their rows."""
    model = group[0].model
    counts = [kept.columns.rows for kept in group]
    whose = np.repeat(np.arange(len(group)), counts)

    def spread(values: list[object], kind: pa.DataType) -> pa.Array:
        return pa.array(values, kind).take(pa.array(whose))

    made = {
        "request_id": spread([kept.request_id for kept in group], pa.string()),
        "row": pa.array(np.concatenate([np.arange(count) for count in counts]), pa.int32()),
        "body": spread([kept.body for kept in group], pa.string()),
        "at": spread([int(kept.at * 1e6) for kept in group], pa.timestamp("us", "UTC")),
        "bundle": pa.array([model.digest] * len(whose)),
        "version": pa.array([model.version] * len(whose)),
        "fallback": spread([kept.fallback for kept in group], pa.string()),
    }
    texts = np.concatenate([kept.columns.texts for kept in group], axis=1)
    numbers = np.concatenate([kept.columns.numbers for kept in group], axis=1)
    columns = {
        name: pa.array([value or None for value in values], pa.string())
        for name, values in zip(model.contract.texts, texts, strict=True)
    }
    for name, row in zip(model.contract.numbers, numbers, strict=True):
        columns[name] = pa.array(row, from_pandas=True)
    made |= {name: columns[name] for name, _ in model.contract.order}
    made[PREDICTION] = pa.array(np.concatenate([kept.answer for kept in group]))
    return pa.table(made)
