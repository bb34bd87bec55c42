"""What the processes of a slot counted, summed over those that live and those that died.

A process counts from zero; a slot must not. So the last that was read of each process is kept.
"""

import math
import urllib.request
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from pipelines.deploy.envoy import Counted
from pipelines.deploy.targets import Observation

BINS = 20


@dataclass(frozen=True)
class Page:
    """The /metrics of one replica, as far as a judgement needs it."""

    digest: str
    faults: int
    predictions: tuple[int, ...]
    memory_bytes: int


def read(port: int) -> Page:
    """Raises OSError or ValueError where there is nothing to read."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
        text = answer.read().decode()
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    named: dict[str, list[float]] = defaultdict(list)
    for one in samples:
        named[one.name].append(one.value)
    bounds = sorted(
        (float(one.labels["le"]), one.value)
        for one in samples
        if one.name == "headrace_predictions_bucket"
    )
    digests = [one.labels["bundle"] for one in samples if one.name == "headrace_bundle_info"]
    return Page(
        digest=digests[0] if digests else "",
        faults=int(sum(named["headrace_fallback_total"])),
        predictions=_bins(bounds),
        memory_bytes=int(sum(named["process_resident_memory_bytes"])),
    )


def _bins(bounds: list[tuple[float, float]]) -> tuple[int, ...]:
    """Counts in equal bins of [0, 1] from a cumulative histogram of just these bounds."""
    below = [count for bound, count in bounds if 0 < bound < math.inf]
    if not bounds:
        return (0,) * BINS
    if len(below) != BINS:
        raise ValueError(f"headrace_predictions has {len(below)} bins; expected {BINS}")
    return tuple(int(high - low) for low, high in zip([0.0, *below], below, strict=False))


@dataclass
class Counts:
    """The counters of one started release, by process."""

    pages: dict[int, Page] = field(default_factory=dict)
    proxies: dict[int, Counted] = field(default_factory=dict)

    def observation(self, alive: list[int], restarts: int) -> Observation | None:
        """The sums; None where no proxy could ever be read."""
        if not self.proxies:
            return None
        latency: Counter[float] = Counter()
        for one in self.proxies.values():
            latency.update(one.latency)
        pages = self.pages.values()
        # Where a model faulted callers saw the fallback's answer; the model itself gave none.
        faults = sum(page.faults for page in pages)
        return Observation(
            requests=sum(one.requests for one in self.proxies.values()),
            errors=sum(one.errors for one in self.proxies.values()) + faults,
            latency=dict(latency),
            predictions=tuple(
                map(sum, zip((0,) * BINS, *(page.predictions for page in pages), strict=True))
            ),
            # Of the largest: how many replicas there are for the moment says nothing of a leak.
            memory_bytes=max(
                (page.memory_bytes for pid, page in self.pages.items() if pid in alive), default=0
            ),
            restarts=restarts,
        )
