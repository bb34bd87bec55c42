"""The history of a bundle: the steps that led to it, and what each of them gave.

dvc.lock says which, by hash: so it is true after `dvc checkout`, and of stages that ran elsewhere.
Files of the same hash, on the disk or in DVC's cache, say what is in them; the journal, where it
knows of a run that gave them, when and by whom.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import UserError
from pipelines.lineage import datasets, journal, steps
from pipelines.lineage.datasets import Dataset
from pipelines.lineage.steps import Step


@dataclass(frozen=True)
class Given:
    """What a step gave: the path, its hash, what is in it as far as this machine knows, and whether
    it lies here.
    """

    path: str
    md5: str
    content: Dataset | None
    here: bool


@dataclass(frozen=True)
class Link:
    """A step with what it gave; when (UTC) and by whom, "" where the journal does not know."""

    step: Step
    given: list[Given]
    at: str
    who: str

    @property
    def moment(self) -> str:
        """To the minute, for people."""
        return f"{self.at[:16].replace('T', ' ')} UTC" if self.at else ""


def of(path: str) -> list[Link]:
    """The steps that led to the path as it is on the disk, the last one first.

    Raises UserError where dvc.lock does not tell how that came to be.
    """
    made = steps.made()
    maker = next((step for step in made.values() if path in step.outs), None)
    if maker is None:
        raise UserError(f"{steps.LOCK} names no stage that gives {path}; make it: make run")
    if not Path(path).exists():
        raise UserError(
            f"{path} is missing; bring it back: dvc checkout {path}, or make it: make run"
        )
    if (found := datasets.read(path).md5) != maker.outs[path]:
        raise UserError(
            f"{path} is {found[:8]}, but the one of {steps.LOCK} is {maker.outs[path][:8]}; bring "
            f"that back: dvc checkout {path}, or make one anew: dvc repro {maker.name}"
        )
    runs = _runs()
    return [_link(step, runs) for step in steps.back(made, path)]


def _link(step: Step, runs: Mapping[tuple[str, str, str], tuple[str, str]]) -> Link:
    given = [_given(path, md5) for path, md5 in step.outs.items()]
    parts = [part for one in given if one.content for part in datasets.tables(one.content)]
    known = [runs[key] for part in parts if (key := (step.name, part.name, part.md5)) in runs]
    return Link(step, given, *max(known, default=("", "")))


def _given(path: str, md5: str) -> Given:
    """Of a folder that is another on the disk, DVC's cache knows the files by name and hash."""
    if Path(path).exists() and (found := datasets.read(path)).md5 == md5:
        return Given(path, md5, found, here=True)
    return Given(path, md5, datasets.cached(path, md5), here=False)


def _runs() -> dict[tuple[str, str, str], tuple[str, str]]:
    """(stage, dataset, hash) → when the stage last gave it, and who ran it."""
    return {
        (event["job"]["name"], out["name"], out["facets"]["version"]["datasetVersion"]): (
            event["eventTime"],
            event["run"]["facets"]["tags"]["tags"][0]["value"],
        )
        for event in journal.read()
        if event["eventType"] == "COMPLETE"
        for out in event["outputs"]
    }
