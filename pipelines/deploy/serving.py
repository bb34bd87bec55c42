"""What this machine should serve, and what it does: two files under .state/serving/.

    desired.json   written by the local target: a release per slot, and who gets how much
    status.json    written by the supervisor about twice a second: what runs, and what it counted

Either writer may die at any moment: both files are whole or as they were.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter

from pipelines import stage
from pipelines.deploy.targets import Observation, Slot
from pipelines.errors import UserError

FOLDER = stage.STATE / "serving"
# Held by the supervisor as long as it lives: what it reports may be late.
LOCK = "supervisor.lock"
# A status older than this says nothing: its supervisor is dead or stuck.
FRESH = 5.0  # seconds
# The challenger keeps its share only as long as somebody says so again: who judged it may be dead.
HOLD = 30.0  # seconds


@dataclass(frozen=True)
class Started:
    """A release that a slot was told to serve. `name` is its own for ever, in Envoy too."""

    name: str
    model: str
    version: int
    digest: str
    # What answers where its model faults: the champion of the time it was started.
    fallback: str | None


@dataclass(frozen=True)
class Desired:
    """What should be. `share` and `shadow` count from `shifted`, for HOLD seconds."""

    champion: Started | None = None
    challenger: Started | None = None
    percent: int = 0
    shadow: bool = False
    shifted: float = 0.0
    # How many releases were ever started, and how often all replicas were to be replaced.
    started: int = 0
    restarts: int = 0

    def slots(self) -> dict[Slot, Started]:
        both: dict[Slot, Started | None] = {
            "champion": self.champion,
            "challenger": self.challenger,
        }
        return {slot: started for slot, started in both.items() if started is not None}

    def held(self) -> "Desired":
        """What is still in force: a share that nobody renewed is none."""
        if time.time() - self.shifted > HOLD:
            return replace(self, percent=0, shadow=False)
        return self


@dataclass(frozen=True)
class Serving:
    """What one slot does. `digests` are those that its ready replicas report."""

    name: str
    wanted: int
    ports: list[int]
    ready: list[int]
    pids: list[int]
    digests: list[str]
    # Replicas older than the restart that was heard of last.
    old: int
    seen: Observation | None

    @property
    def whole(self) -> bool:
        """Whether all replicas are there and ready."""
        return len(self.ready) == len(self.ports) >= self.wanted


@dataclass(frozen=True)
class Status:
    """What is, `at` a time: `percent` and `shadow` as Envoy has them in force, how often all
    replicas were to be replaced, as far as the supervisor has heard, and by its name what keeps on
    ending since.
    """

    at: float = 0.0
    pid: int = 0
    envoy: int = 0
    percent: int = 0
    shadow: bool = False
    restarts: int = 0
    trouble: dict[str, str] = field(default_factory=dict)
    slots: dict[Slot, Serving] = field(default_factory=dict)


_DESIRED, _STATUS = TypeAdapter(Desired), TypeAdapter(Status)


def desired(folder: Path) -> Desired:
    """What should be; nothing where nobody said so yet. Raises UserError where it was damaged."""
    path = folder / "desired.json"
    if not path.is_file():
        return Desired()
    try:
        return _DESIRED.validate_json(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{path} does not say what should be served: {stage.one_line(error)}; remove it while "
            "nothing is served, and make serve begins with the champion"
        ) from None


def change(folder: Path, turn: Callable[[Desired], Desired]) -> None:
    """Replace what should be by what `turn` makes of it, one at a time."""
    with stage.turn(folder / "desired.lock"):
        before = desired(folder)
        after = turn(before)
        if after != before:
            stage.write_json(folder / "desired.json", asdict(after))


def report(folder: Path, status: Status) -> None:
    stage.write_json(folder / "status.json", asdict(status))


def status(folder: Path) -> Status:
    """What is; nothing where that is damaged, or the supervisor stopped to report."""
    try:
        found = _STATUS.validate_json((folder / "status.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return Status()
    return Status() if time.time() - found.at > FRESH else found


def bundle_of(folder: Path, digest: str) -> Path:
    """Where a bundle lies that is or was served here."""
    return folder / "bundles" / digest
