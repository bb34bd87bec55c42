"""What replicas counted, from the text of their /metrics (pipelines/deploy/serve/metrics.py)."""

from collections import Counter
from collections.abc import Iterable

from pipelines.deploy.targets import Observation

BINS = 20


def observation(pages: Iterable[str], alive: Iterable[str], restarts: int) -> Observation:
    """The sums over the pages of all that ever lived; memory is of the largest that is alive."""
    from prometheus_client.parser import text_string_to_metric_families

    def samples(texts: Iterable[str]) -> list[tuple[str, dict[str, str], float]]:
        families = (one for text in texts for one in text_string_to_metric_families(text))
        return [(s.name, s.labels, s.value) for family in families for s in family.samples]

    requests, errors = 0, 0
    latency: Counter[float] = Counter()
    below: Counter[float] = Counter()
    for name, labels, value in samples(pages):
        if name == "headrace_requests_total" and not labels["status"].startswith("4"):
            requests += int(value)
            errors += int(value) if labels["status"] != "200" else 0
        elif name == "headrace_request_seconds_bucket":
            latency[float(labels["le"])] += int(value)
        elif name == "headrace_predictions_bucket":
            below[round(float(labels["le"]) * BINS, 6)] += int(value)
    counts = [0, *(below[number] for number in range(1, BINS + 1))]
    held = [v for name, _, v in samples(alive) if name == "process_resident_memory_bytes"]
    return Observation(
        requests=requests,
        errors=errors,
        latency=dict(latency),
        predictions=tuple(counts[n + 1] - counts[n] for n in range(BINS)),
        memory_bytes=int(max(held, default=0)),
        restarts=restarts,
    )
