"""What a replica counts, in Prometheus' words at /metrics.

A request costs a few additions to plain numbers, all in the thread of the event loop; Prometheus'
own types, with a lock each, would cost more than the model.

    headrace_requests_total{route,status}   of predict and infer; status is the HTTP status, or
                                            `fallback` for a 200 that the model did not give:
                                            whoever judges the model counts that as an error
    headrace_fallback_total                 the same answers
    headrace_request_seconds                from the whole body to the answer, of answers only
    headrace_rows_total, headrace_missing_total{column}
    headrace_predictions                    20 equal bins of [0, 1]; not of fallbacks
    headrace_first_predictions              the same of the first row of each body that is not one
                                            of the last RECENT: what is alike is no proof twice,
                                            neither rows of one request nor a request said again
    headrace_bundle_info{bundle,version}
    headrace_reloads_total{result}          taken or refused
    headrace_capture_rows_total{result}     written or dropped
    process_*                               memory, processor time, files, start
"""

import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from pipelines.deploy.serve.contract import Columns, Contract

BINS = 20
RECENT = 1000
SECONDS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15,
    0.25, 0.5, 1.0, 2.5,
)  # fmt: skip


class Metrics:
    """The counters; `bundle` tells the digest and version that answer now."""

    def __init__(self, bundle: Callable[[], tuple[str, int]]) -> None:
        self.bundle = bundle
        self.requests: Counter[tuple[str, str]] = Counter()
        self.reloads = Counter(taken=0, refused=0)
        self.captured = Counter(written=0, dropped=0)
        self.missing: Counter[str] = Counter()
        self.rows = 0
        self.fallbacks = 0
        self.seconds = [0] * (len(SECONDS) + 1)
        self.seconds_sum = 0.0
        self.predictions = [0] * BINS
        self.predictions_sum = 0.0
        # Checksums of the last bodies, in order.
        self.recent: dict[int, None] = {}
        self.firsts = [0] * BINS
        self.firsts_sum = 0.0
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def refused(self, route: str, status: int) -> None:
        self.requests[route, str(status)] += 1

    def answered(
        self,
        route: str,
        body: bytes,
        seconds: float,
        answer: npt.NDArray[np.float32],
        fallback: bool,
    ) -> None:
        self.requests[route, "fallback" if fallback else "200"] += 1
        self.seconds[bisect_left(SECONDS, seconds)] += 1
        self.seconds_sum += seconds
        if fallback:
            self.fallbacks += 1
            return
        values = answer.tolist()
        for value in values:
            self.predictions[min(int(value * BINS), BINS - 1)] += 1
            self.predictions_sum += value
        if self._new(body):
            self.firsts[min(int(values[0] * BINS), BINS - 1)] += 1
            self.firsts_sum += values[0]

    def _new(self, body: bytes) -> bool:
        """Whether it is none of the last bodies; it is one of them now."""
        checksum = zlib.crc32(body)
        known = checksum in self.recent
        self.recent.pop(checksum, None)
        self.recent[checksum] = None
        if len(self.recent) > RECENT:
            del self.recent[next(iter(self.recent))]
        return not known

    def asked(self, contract: Contract, columns: Columns) -> None:
        self.rows += columns.rows
        for number in np.isnan(columns.numbers).nonzero()[0].tolist():
            self.missing[contract.numbers[number]] += 1
        for name, values in zip(contract.texts, columns.texts.tolist(), strict=True):
            if "" in values:
                self.missing[name] += values.count("")

    def page(self) -> bytes:
        return generate_latest(self.registry)

    def collect(self) -> Iterable[Metric]:
        """What Prometheus' registry asks for."""
        yield _counter("headrace_requests", ("route", "status"), self.requests)
        yield CounterMetricFamily("headrace_fallback", "answers in place", value=self.fallbacks)
        yield _histogram("headrace_request_seconds", SECONDS, self.seconds, self.seconds_sum)
        yield CounterMetricFamily("headrace_rows", "rows asked", value=self.rows)
        yield _counter("headrace_missing", ("column",), self.missing)
        bounds = [number / BINS for number in range(1, BINS + 1)]
        for name, counts, total in (
            ("headrace_predictions", self.predictions, self.predictions_sum),
            ("headrace_first_predictions", self.firsts, self.firsts_sum),
        ):
            yield _histogram(name, bounds, [*counts, 0], total)
        digest, version = self.bundle()
        info = GaugeMetricFamily("headrace_bundle_info", "answers", labels=["bundle", "version"])
        info.add_metric([digest, str(version)], 1)
        yield info
        yield _counter("headrace_reloads", ("result",), self.reloads)
        yield _counter("headrace_capture_rows", ("result",), self.captured)


def _counter(
    name: str, labels: Iterable[str], counts: Counter[tuple[str, str]] | Counter[str]
) -> Metric:
    family = CounterMetricFamily(name, name.replace("_", " "), labels=list(labels))
    for key, count in counts.items():
        family.add_metric([key] if isinstance(key, str) else list(key), count)
    return family


def _histogram(name: str, bounds: Iterable[float], counts: list[int], total: float) -> Metric:
    """Counts by bin, the last beyond all bounds, as Prometheus' cumulative ones."""
    edges = [*map(str, bounds), "+Inf"]
    below = np.cumsum(counts).tolist()
    buckets = list(zip(edges, below, strict=True))
    return HistogramMetricFamily(name, name.replace("_", " "), buckets=buckets, sum_value=total)
