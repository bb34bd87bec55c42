"""What was answered, as an observation: one JSON line for each call, wherever it was written.

    {"bundle": DIGEST, "seconds": S, "predictions": [P, …], "memory_bytes": M}

The handlers under infra/targets/ write it: on SageMaker and Lambda to CloudWatch, on a device to
its disk. A call that gave no answer has "predictions": [null]. A figure counts answers, not calls.
"""

import json
import math
from collections.abc import Iterable
from typing import Any

from pipelines.deploy.targets import Observation

BINS = 20
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, math.inf)


def notes(lines: Iterable[str], digest: str) -> list[dict[str, Any]]:
    """The lines that are of this bundle; a log holds others too."""
    found = []
    for line in lines:
        if not line.lstrip().startswith("{"):
            continue
        try:
            note = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if note.get("bundle") == digest and _says(note):
            found.append(note)
    return found


def _says(note: dict[str, Any]) -> bool:
    """Whether the line has all it should: who wrote it may be of another release, or be broken."""
    figures = (note.get("seconds"), note.get("memory_bytes"))
    return isinstance(note.get("predictions"), list) and all(
        isinstance(one, float | int) for one in figures
    )


def observation(found: list[dict[str, Any]], restarts: int = 0) -> Observation | None:
    """The sums; None where nothing was answered."""
    if not found:
        return None
    bins, latency, requests, errors = [0] * BINS, dict.fromkeys(BOUNDS, 0), 0, 0
    for note in found:
        requests += len(note["predictions"])
        for bound in BOUNDS:
            latency[bound] += len(note["predictions"]) * (note["seconds"] <= bound)
        for value in note["predictions"]:
            # What is NaN is no number between 0 and 1 either.
            if isinstance(value, float | int) and 0 <= value <= 1:
                bins[min(int(value * BINS), BINS - 1)] += 1
            else:
                errors += 1
    return Observation(
        requests=requests,
        errors=errors,
        refusals=0,
        latency=latency,
        predictions=tuple(bins),
        memory_bytes=max(note["memory_bytes"] for note in found),
        restarts=restarts,
    )


class Log:
    """The lines of one group of CloudWatch's logs, read on from where the last look ended."""

    def __init__(self, client: Any, group: str) -> None:
        self.client, self.group = client, group
        self.held: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}

    def notes(self, digest: str, since: int) -> list[dict[str, Any]]:
        """Every line of the bundle since a moment in milliseconds. Lines come late and out of
        order: the last minute is read anew.
        """
        events = self.held.setdefault((digest, since), {})
        newest = max((event["timestamp"] for event in events.values()), default=0)
        pages = self.client.get_paginator("filter_log_events").paginate(
            logGroupName=self.group,
            startTime=max(since, newest - 60_000),
            filterPattern=f'"{digest}"',
        )
        try:
            events.update((event["eventId"], event) for page in pages for event in page["events"])
        except self.client.exceptions.ResourceNotFoundException:
            return []  # nothing was ever answered
        return notes((event["message"] for event in events.values()), digest)
