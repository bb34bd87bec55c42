"""What both slots said to the same requests, from the service's captures, and the labels that came.

in:   the shelf of serve.capture, where both slots keep the same requests under their ids; the shelf
      of release.labels: Parquet files with request_id, row and label (0 or 1)
out:  distances of two answers to one row, and differences of log loss, each once
"""

import math
import time
from dataclasses import dataclass, field

from pipelines.bundle import PREDICTION
from pipelines.deploy.shelf import Shelf

# A row of a request.
Asked = tuple[str, int]
LEAST = 1e-6


@dataclass
class Mirrored:
    """The captures of two bundles since `begun`."""

    captures: Shelf
    labels: Shelf
    champion: str
    challenger: str
    begun: int = field(default_factory=time.time_ns)
    read: set[str] = field(default_factory=set)
    answers: dict[str, dict[Asked, float]] = field(default_factory=dict)
    compared: set[Asked] = field(default_factory=set)
    judged: set[Asked] = field(default_factory=set)
    known: dict[Asked, int] = field(default_factory=dict)

    def look(self) -> tuple[list[float], list[float]]:
        """Distances and differences of log loss that are new since the last look."""
        slots = {digest[:12]: digest for digest in (self.champion, self.challenger)}
        # A capture's name begins with when it was written, and ends with whose it is.
        for name in self._new(self.captures, after=str(self.begun)):
            digest = slots.get(name.removesuffix(".parquet").rpartition("-")[2])
            if digest is not None:
                found = _column(self.captures, name, PREDICTION)
                self.answers.setdefault(digest, {}).update(found)
        for name in self._new(self.labels):
            labels = _column(self.labels, name, "label")
            self.known |= {asked: int(label) for asked, label in labels.items()}
        ours = self.answers.get(self.challenger, {})
        theirs = self.answers.get(self.champion, {})
        fresh = (ours.keys() & theirs.keys()) - self.compared
        self.compared |= fresh
        told = (self.compared & self.known.keys()) - self.judged
        self.judged |= told
        distances = [abs(ours[asked] - theirs[asked]) for asked in sorted(fresh)]
        losses = [
            _loss(ours[asked], self.known[asked]) - _loss(theirs[asked], self.known[asked])
            for asked in sorted(told)
        ]
        return distances, losses

    def _new(self, shelf: Shelf, after: str = "") -> list[str]:
        """The names that were not there at the last look."""
        found = [name for name in shelf.names(after) if name not in self.read]
        self.read.update(found)
        return found


def _column(shelf: Shelf, name: str, column: str) -> dict[Asked, float]:
    wanted = ["request_id", "row", column]
    table = shelf.read(name, wanted)
    ids, rows, values = (table[one].to_pylist() for one in wanted)
    found = zip(ids, rows, values, strict=True)
    return {(one, row): math.nan if value is None else float(value) for one, row, value in found}


def _loss(prediction: float, label: int) -> float:
    said = prediction if label else 1 - prediction
    return -math.log(max(said, LEAST)) if said == said else -math.log(LEAST)
