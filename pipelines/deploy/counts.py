"""What the processes of a slot counted, summed over those that live and those that died.

A process counts from zero; a slot must not. So the last that was read of each process is kept.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from pipelines.deploy import envoy
from pipelines.deploy.envoy import Counted
from pipelines.deploy.targets import Observation, scraped
from pipelines.deploy.targets.scraped import Page


def read(port: int) -> Page:
    """Raises OSError or ValueError where there is nothing to read."""
    return scraped.page(envoy.page(f"http://127.0.0.1:{port}/metrics").decode())


@dataclass
class Counts:
    """The counters of one started release, by process."""

    pages: dict[int, Page] = field(default_factory=dict)
    proxies: dict[int, Counted] = field(default_factory=dict)

    def observation(self, alive: list[int], restarts: int) -> Observation | None:
        """The sums; None where no proxy could ever be read.

        Replicas know which requests were for predictions; Envoy knows how long callers waited, and
        what broke on the way, of which a replica that died says nothing.
        """
        if not self.proxies:
            return None
        latency: Counter[float] = Counter()
        for one in self.proxies.values():
            latency.update(one.latency)
        living = [page for pid, page in self.pages.items() if pid in alive]
        seen = scraped.observation(self.pages.values(), living, restarts)
        broken = sum(one.broken for one in self.proxies.values())
        unsaid = max(broken - sum(page.broken for page in self.pages.values()), 0)
        return replace(
            seen,
            requests=seen.requests + unsaid,
            errors=seen.errors + unsaid,
            latency=dict(latency),
        )
