"""A small world that `make run` went through once, and the events that it left."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from world import Checkout, checked_out, lenient

JOURNAL = ".state/lineage/events.jsonl"
Event = dict[str, Any]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Checkout:
    """After a whole run. Who changes it works on a copy."""
    checkout = lenient(checked_out(tmp_path_factory.mktemp("made"), source))
    ended = checkout.run("pipelines.run")
    assert ended.status == 0, ended
    assert "lineage:" not in ended.out + ended.err
    return checkout


@pytest.fixture
def copied(made: Checkout, tmp_path: Path) -> Checkout:
    shutil.copytree(made.folder, tmp_path / "checkout", symlinks=True)
    return Checkout(tmp_path / "checkout", made.source)


def told(checkout: Checkout, stage: str) -> list[Event]:
    """The events of the stage, oldest first."""
    lines = (checkout.folder / JOURNAL).read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["job"]["name"] == stage]
