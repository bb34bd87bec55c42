"""What replicas counted, from the text of their /metrics (pipelines/deploy/serve/metrics.py)."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.deploy.targets import Observation

BINS = 20


@dataclass(frozen=True)
class Page:
    """One replica's, as far as a judgement needs it. `broken` are the requests that ended in a
    status of 5xx; they are errors too.
    """

    digest: str
    requests: int
    errors: int
    broken: int
    refusals: int
    latency: dict[float, int]
    predictions: tuple[int, ...]
    memory_bytes: int


def page(text: str) -> Page:
    """Raises ValueError where the text is no such page."""
    from prometheus_client.parser import text_string_to_metric_families

    digest, memory = "", 0
    statuses: Counter[str] = Counter()
    latency: dict[float, int] = {}
    below: dict[float, int] = {}
    samples = (one for family in text_string_to_metric_families(text) for one in family.samples)
    for name, labels, value, *_ in samples:
        match name:
            case "headrace_requests_total":
                statuses[labels["status"]] += int(value)
            case "headrace_request_seconds_bucket":
                latency[float(labels["le"])] = int(value)
            case "headrace_first_predictions_bucket":
                below[float(labels["le"])] = int(value)
            case "headrace_bundle_info":
                digest = labels["bundle"]
            case "process_resident_memory_bytes":
                memory = int(value)
    broken = sum(count for status, count in statuses.items() if status.startswith("5"))
    errors = broken + statuses["fallback"]
    return Page(
        digest=digest,
        requests=errors + statuses["200"],
        errors=errors,
        broken=broken,
        refusals=statuses["422"],
        latency=latency,
        predictions=_bins(below),
        memory_bytes=memory,
    )


def _bins(below: dict[float, int]) -> tuple[int, ...]:
    """Counts in equal bins of [0, 1] from a cumulative histogram of just these bounds."""
    counts = [count for bound, count in sorted(below.items()) if bound < math.inf]
    if not below:
        return (0,) * BINS
    if len(counts) != BINS:
        raise ValueError(f"headrace_first_predictions has {len(counts)} bins; expected {BINS}")
    return tuple(high - low for low, high in zip([0, *counts], counts, strict=False))


def observation(pages: Iterable[Page], alive: Iterable[Page], restarts: int) -> Observation:
    """The sums over the pages of all that ever lived; memory is of the largest that is alive."""
    pages = list(pages)
    latency: Counter[float] = Counter()
    for one in pages:
        latency.update(one.latency)
    bins = zip((0,) * BINS, *(one.predictions for one in pages), strict=True)
    return Observation(
        requests=sum(one.requests for one in pages),
        errors=sum(one.errors for one in pages),
        refusals=sum(one.refusals for one in pages),
        latency=dict(latency),
        predictions=tuple(map(sum, bins)),
        # How many there are for the moment says nothing of a leak.
        memory_bytes=max((one.memory_bytes for one in alive), default=0),
        restarts=restarts,
    )
