"""`make serve`: what it prints works, what it serves is the registry's champion."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from deploy.replica import until
from deploy.served import free
from deploy.tiny import two_versions
from world import ROOT, Checkout

from pipelines.deploy import promotion, serving
from pipelines.deploy.registry import Registry


@pytest.fixture
def held(checkout: Checkout) -> Registry:
    """Version 1 is champion, version 2 has passed the gate; ports that nobody has."""
    traffic = free(checkout.params().traffic, replicas=1).model_dump()
    checkout.set(traffic=traffic, serve={"drain_seconds": 0.1})
    return two_versions(checkout.params())


class Up:
    """The process, and what it has said so far."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "up.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.deploy.up"],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def ask(self, key: str = "") -> dict[str, object]:
        """What the printed curl answers, once it is printed, with this key in its place."""
        until(lambda: "Ctrl-C stops all of it" in self.said or self.process.poll() is not None)
        found = re.search(r"curl .*? -d '[^']*'", self.said.replace("\\\n", " "))
        assert found, self.said
        command = [*shlex.split(found[0].replace("KEY", key)), "--silent"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout))


@contextmanager
def up(checkout: Checkout) -> Iterator[Up]:
    made = Up(checkout.folder)
    try:
        yield made
    finally:
        made.process.send_signal(signal.SIGINT)
        made.process.wait(30)


def test_what_is_printed_works_and_what_is_served_is_the_registrys(
    held: Registry, checkout: Checkout
) -> None:
    with up(checkout) as first:
        assert first.ask()["version"] == 1
        second = Up(checkout.folder)
        assert second.process.wait(60) == 2
        assert "up: error: .state/serving is served by another supervisor" in second.said
    assert first.process.returncode == 0
    promotion.promote(held, 2, 1, "a person", "while nothing was served")
    with up(checkout) as again:
        assert again.ask()["version"] == 2


def test_without_its_registry_it_serves_what_it_served(held: Registry, checkout: Checkout) -> None:
    with up(checkout) as first:
        first.ask()
    (checkout.folder / ".state" / "mlflow" / "mlflow.db").write_text("no database")
    with up(checkout) as again:
        assert again.ask()["version"] == 1
    assert "so version 1, which was served here before" in again.said


@pytest.mark.parametrize("wrong", ["port", "keys", "state"])
def test_what_cannot_be_served_is_one_line(held: Registry, checkout: Checkout, wrong: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        if wrong == "port":
            checkout.set(traffic={"port": other.getsockname()[1]})
        elif wrong == "keys":
            checkout.set(serve={"keys": "nowhere"})
        else:
            (checkout.folder / serving.FOLDER).mkdir(parents=True)
            (checkout.folder / serving.FOLDER / "desired.json").write_text("{")
        made = Up(checkout.folder)
        assert made.process.wait(60) == 2
    line = made.said.splitlines()[-1]
    assert line.startswith("up: error: ")
    assert len(made.said.splitlines()) == 1 + (wrong == "port")
    expected = {
        "port": "traffic.port is ",
        "keys": "pipelines.deploy.serve.keys NAME",
        "state": "desired.json does not say what should be served: ",
    }
    assert expected[wrong] in line


def test_with_keys_the_printed_way_asks_for_one_and_a_new_one_is_known(
    held: Registry, checkout: Checkout
) -> None:
    checkout.set(serve={"keys": "keys.txt"})
    key = checkout.run("pipelines.deploy.serve.keys alice").out.strip()
    with up(checkout) as made:
        until(lambda: "Ctrl-C stops all of it" in made.said)
        assert "-H 'authorization: Bearer KEY'" in made.said
        assert "python -m pipelines.deploy.serve.keys NAME" in made.said
        assert made.ask(key)["version"] == 1
        other = checkout.run("pipelines.deploy.serve.keys bob").out.strip()
        assert checkout.run("pipelines.deploy.targets.local restart").status == 0
        assert made.ask(other)["version"] == 1


def test_a_restart_that_cannot_be_says_why_at_once_and_make_serve_too(
    held: Registry, checkout: Checkout
) -> None:
    """The old replicas serve on, and the new ones come as soon as the keys are mended."""
    checkout.set(serve={"keys": "keys.txt"})
    key = checkout.run("pipelines.deploy.serve.keys alice").out.strip()
    file = checkout.folder / "keys.txt"
    good = file.read_text()
    with up(checkout) as made:
        until(lambda: "Ctrl-C stops all of it" in made.said)
        file.write_text(good + "no key\n")
        begun = time.monotonic()
        ended = checkout.run("pipelines.deploy.targets.local restart")
        assert time.monotonic() - begun < 60
        assert ended.status == 2
        assert len(ended.err.splitlines()) == 1
        why = (
            "release-1 ends again and again: serve: error: keys.txt, line 2: expected: name sha256"
        )
        assert why in ended.err
        assert made.ask(key)["version"] == 1
        file.write_text(good)
        assert checkout.run("pipelines.deploy.targets.local restart").status == 0
        assert made.ask(key)["version"] == 1
    assert f"supervise: {why}" in made.said
