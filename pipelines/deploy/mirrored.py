"""What both slots said to the same requests, from the service's captures, and the labels that came.

in:   the folder of serve.capture, where both slots keep the same requests under their ids;
      the folder release.labels: Parquet files with request_id, row and label (0 or 1)
out:  distances of two answers to one row, and differences of log loss, each once
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from pipelines.bundle import PREDICTION

# A row of a request.
Asked = tuple[str, int]
LEAST = 1e-6


@dataclass
class Mirrored:
    """The captures of two bundles since `begun`."""

    captures: Path
    labels: Path
    champion: str
    challenger: str
    begun: int = field(default_factory=time.time_ns)
    read: set[Path] = field(default_factory=set)
    answers: dict[str, dict[Asked, float]] = field(default_factory=dict)
    compared: set[Asked] = field(default_factory=set)
    judged: set[Asked] = field(default_factory=set)
    known: dict[Asked, int] = field(default_factory=dict)

    def look(self) -> tuple[list[float], list[float]]:
        """Distances and differences of log loss that are new since the last look."""
        for digest in (self.champion, self.challenger):
            files = self._new(self.captures, f"*-{digest[:12]}.parquet")
            for file in files:
                if int(file.name.partition("-")[0]) >= self.begun:
                    self.answers.setdefault(digest, {}).update(_column(file, PREDICTION))
        for file in self._new(self.labels, "*.parquet"):
            self.known |= {asked: int(label) for asked, label in _column(file, "label").items()}
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

    def _new(self, folder: Path, pattern: str) -> Iterator[Path]:
        for file in sorted(folder.glob(pattern)):
            if file not in self.read and not file.name.startswith("."):
                self.read.add(file)
                yield file


def _column(file: Path, name: str) -> dict[Asked, float]:
    table = pq.read_table(file, columns=["request_id", "row", name])
    ids, rows, values = (table[column].to_pylist() for column in ("request_id", "row", name))
    found = zip(ids, rows, values, strict=True)
    return {(one, row): math.nan if value is None else float(value) for one, row, value in found}


def _loss(prediction: float, label: int) -> float:
    said = prediction if label else 1 - prediction
    return -math.log(max(said, LEAST)) if said == said else -math.log(LEAST)
