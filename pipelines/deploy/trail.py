"""The trail of a release: what it did, one line after another, in the exchange.

    releases/<model>-<created>/<release>/<line>.json

A line is written where nothing was. A controller that was taken for dead and replaced finds its
next line taken, and stops; whoever runs next reads on from the last line.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipelines.exchange import Exchange, Record
from pipelines.lease import LostError

ENDS = ("promoted", "rolled back", "shadowed")


@dataclass
class Trail:
    """One release; `lines` are all so far."""

    exchange: Exchange
    folder: str
    number: int
    lines: list[Record]

    @property
    def ended(self) -> bool:
        return bool(self.lines) and self.lines[-1]["event"] in ENDS

    @property
    def begun(self) -> Record:
        return self.lines[0]

    @property
    def good(self) -> list[int]:
        """The shares that were judged good."""
        return [line["percent"] for line in self.lines if line["event"] == "good"]

    def add(self, event: str, **what: Any) -> None:
        """Write the next line. Raises LostError where another controller did."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"event": event, "at": at, **what}
        name = f"{self.folder}/{self.number:06}/{len(self.lines) + 1:06}.json"
        if not self.exchange.put_new(name, line):
            raise LostError(f"release {self.number}: another controller took over")
        self.lines.append(line)


def newest(exchange: Exchange, folder: str) -> Trail | None:
    """The newest release, or None where there was none."""
    names = exchange.names(folder)
    if not names:
        return None
    last = names[-1].split("/")[-2]
    found = [exchange.get(name) for name in names if name.split("/")[-2] == last]
    return Trail(exchange, folder, int(last), [line for line in found if line is not None])


def follow(exchange: Exchange, folder: str, **what: Any) -> Trail:
    """Begin the release after the newest."""
    before = newest(exchange, folder)
    made = Trail(exchange, folder, before.number + 1 if before else 1, [])
    made.add("begun", **what)
    return made
