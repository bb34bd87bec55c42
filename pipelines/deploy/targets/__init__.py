"""Targets: where a bundle is served. One module each, and one line in the table.

A target has two slots, champion and challenger. Whatever it is told may be told twice: the second
time changes nothing. What it reports is read from what runs, not from what it was told.
"""

import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from pipelines.errors import UserError
from pipelines.params import Params

if TYPE_CHECKING:
    from pipelines.deploy.registry import Registry

# The word of release.target, and the module whose `target(params)` it is.
MODULES = {
    "local": "pipelines.deploy.targets.local",
    "kubernetes": "pipelines.deploy.targets.kubernetes",
    "sagemaker": "pipelines.deploy.targets.sagemaker",
    "lambda": "pipelines.deploy.targets.lambda_",
    "edge": "pipelines.deploy.targets.edge",
}
Slot = Literal["champion", "challenger"]
# What comes of a shadow: nobody copies requests; the challenger gets copies; or who judges can read
# the captures of both slots too, and compares their answers to one request.
Shadow = Literal["none", "copied", "paired"]
MENDED = 15.0  # seconds until what was mended has to show
READY = 120.0  # seconds until what was started has to be healthy


@dataclass(frozen=True)
class Release:
    """A version as a target needs it: its name, and its bundle in a folder."""

    model: str
    version: int
    digest: str
    folder: Path


@dataclass(frozen=True)
class Observation:
    """What a slot answered since it started; every number only grows, but the memory.

    `requests` are those for predictions, without what was refused; an answer that is no probability
    is an error. `refusals` are of what breaks the contract, which may be the contract's fault;
    others are the caller's. `latency` counts answers by upper bound in seconds, each including the
    smaller ones; `predictions` counts them in equal bins of [0, 1].
    `memory_bytes` is of the largest replica.
    """

    requests: int
    errors: int
    refusals: int
    latency: dict[float, int]
    predictions: tuple[int, ...]
    memory_bytes: int
    restarts: int


class Target(Protocol):
    """Where the slots are served."""

    shadow: Shadow

    def up(self) -> bool:
        """Whether there is anything that can serve, if nothing but a first champion is started.
        Where not, there is no traffic to judge by.
        """

    def start(self, slot: Slot, release: Release) -> None:
        """Serve the release in the slot; returns once asked, before it is ready."""

    def healthy(self, slot: Slot) -> bool:
        """Whether all of the slot answers, with the bundle that was started. Raises UserError with
        the reason where it is known that it will not.
        """

    def shift(self, percent: int, shadow: bool = False) -> None:
        """Give the challenger this share of the traffic; with `shadow`, a copy of the champion's
        requests too, whose answers nobody sees.
        """

    def switch(self) -> None:
        """The challenger becomes champion with all traffic; the old one stops."""

    def roll_back(self) -> None:
        """All traffic to the champion; the challenger stops."""

    def serving(self) -> dict[Slot, str]:
        """The digest of the bundle that each slot serves."""

    def observe(self) -> dict[Slot, Observation]:
        """What each slot answered; one that cannot be read is absent."""


def start(target: Target, held: "Registry", slot: Slot, version: int) -> str:
    """Bring a version to the target, before it is ready. Returns its hash."""
    with tempfile.TemporaryDirectory() as folder:
        digest = held.bring(version, Path(folder))
        target.start(slot, Release(held.model, version, digest, Path(folder)))
    return digest


def serve(target: Target, held: "Registry", slot: Slot, version: int) -> str:
    """Start a version, and wait until it answers in the slot. Returns its hash.

    Raises UserError where it does not within READY seconds, or is known not to.
    """
    digest = start(target, held, slot, version)
    begun = time.monotonic()
    while not _healthy(target, slot, begun):
        if time.monotonic() - begun > READY:
            raise UserError(f"version {version} was not ready as {slot} within {READY:.0f} s")
        time.sleep(0.2)
    return digest


def _healthy(target: Target, slot: Slot, begun: float) -> bool:
    try:
        return target.healthy(slot)
    except UserError:
        # What kept it from starting may just have been mended.
        if time.monotonic() - begun < MENDED:
            return False
        raise


def of(params: Params) -> Target:
    """The target that release.target names."""
    name = params.release.target
    if name not in MODULES:
        raise UserError(f"params.yaml: release.target is {name}; expected {', '.join(MODULES)}")
    made: Target = import_module(MODULES[name]).target(params)
    return made
