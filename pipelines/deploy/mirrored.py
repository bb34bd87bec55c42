"""What both slots said to the same requests, from the service's captures, and the labels that came.

in:   the shelf of serve.capture, where both slots keep the same requests under their ids; the shelf
      of release.labels: Parquet files with request_id, row and label (0 or 1)
out:  distances of two answers to what was asked, each body once; and differences of log loss, each
      label once; means over the rows of a request, since they are alike

What cannot be read is no reason to roll back: it is said once, and read again at the next look.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pipelines import stage
from pipelines.bundle import PREDICTION
from pipelines.deploy.shelf import Shelf

# A request by its id, and a row of it.
Row = tuple[str, int]
# The same, and what was asked: a caller may use an id twice.
Asked = tuple[str, int, str]
LEAST = 1e-6
# Replicas name their captures by their own clocks, which may lie so far apart.
SKEW = 3600 * 10**9  # nanoseconds


@dataclass
class Mirrored:
    """The captures of two bundles, and the labels, that come from now on."""

    captures: Shelf
    labels: Shelf
    champion: str
    challenger: str
    after: str = ""
    read: set[str] = field(default_factory=set)
    said: set[str] = field(default_factory=set)
    answers: defaultdict[str, dict[Asked, float]] = field(default_factory=lambda: defaultdict(dict))
    compared: set[Asked] = field(default_factory=set)
    # The bodies of what was compared: said again, they say nothing new.
    bodies: set[str] = field(default_factory=set)
    judged: set[Asked] = field(default_factory=set)
    known: dict[Row, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.after = str(time.time_ns() - SKEW)
        self.read.update(self.captures.names(self.after), self.labels.names())

    def look(self) -> tuple[list[float], list[float]]:
        """Distances and differences of log loss that are new since the last look."""
        self._each(self.captures, self.after, self._capture)
        self._each(self.labels, "", self._label)
        ours, theirs = self.answers[self.challenger], self.answers[self.champion]
        fresh = (ours.keys() & theirs.keys()) - self.compared
        self.compared |= fresh
        told = {asked for asked in self.compared - self.judged if asked[:2] in self.known}
        self.judged |= told
        distances = {
            ("", row, body): abs(ours[one, row, body] - theirs[one, row, body])
            for one, row, body in sorted(fresh)
            if body not in self.bodies
        }
        self.bodies.update(body for *_, body in fresh)
        losses = {
            asked: _loss(ours[asked], self.known[asked[:2]])
            - _loss(theirs[asked], self.known[asked[:2]])
            for asked in told
        }
        return _by_request(distances), _by_request(losses)

    def _each(self, shelf: Shelf, after: str, take: Callable[[str], None]) -> None:
        """Take every file that was not read yet."""
        try:
            fresh = [name for name in shelf.names(after) if name not in self.read]
        except Exception as error:  # of a disk, or of the way to a bucket
            self._say(shelf.place, error)
            return
        for name in fresh:
            try:
                take(name)
            except Exception as error:  # of Parquet, or of who wrote it, too
                self._say(f"{shelf.place}/{name}", error)
            else:
                self.read.add(name)

    def _say(self, what: str, error: Exception) -> None:
        if what not in self.said:
            self.said.add(what)
            stage.say("release", f"{what} is left out: {stage.one_line(error)}")

    def _capture(self, name: str) -> None:
        # A capture's name ends with whose it is.
        short = name.removesuffix(".parquet").rpartition("-")[2]
        for digest in (self.champion, self.challenger):
            if digest[:12] == short:
                rows = self.captures.rows(name, ("request_id", "row", "body", PREDICTION))
                for one, row, body, value in rows:
                    self.answers[digest][one, row, body] = math.nan if value is None else value

    def _label(self, name: str) -> None:
        self.known |= dict(_labels(self.labels.rows(name, ("request_id", "row", "label"))))


def _by_request(values: dict[Asked, float]) -> list[float]:
    """The mean over the rows of each request."""
    rows: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for (one, _, body), value in sorted(values.items()):
        rows[one, body].append(value)
    return [sum(found) / len(found) for found in rows.values()]


def _labels(rows: Iterator[tuple[str, int, int]]) -> Iterator[tuple[Row, int]]:
    for number, (one, row, label) in enumerate(rows, start=1):
        if label not in (0, 1):
            raise ValueError(f"row {number}: label is {label}; expected 0 or 1")
        yield (one, row), int(label)


def _loss(prediction: float, label: int) -> float:
    said = prediction if label else 1 - prediction
    return -math.log(max(said, LEAST)) if said == said else -math.log(LEAST)
