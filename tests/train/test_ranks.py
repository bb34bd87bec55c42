"""Several processes train together as one does, and end together."""

import json
import os
import random
import signal
import subprocess
import time
from typing import Any

import psutil
import pytest
from train.fits import FIT, past_an_epoch, saved, somewhere
from world import Checkout

from pipelines import stage
from pipelines.deploy.replicas import free_port
from pipelines.train import fitted

pytestmark = pytest.mark.pipeline
KILLS = 10


@pytest.fixture
def two(features: Checkout) -> Checkout:
    """A fit by two processes, one thread each. No unit drops out: processes draw other ones. Its
    last batch has an odd number of rows.
    """
    features.set(
        fit={
            "max_epochs": 3,
            "batch_size": 33,
            "dropout": 0.0,
            "trainer": {"devices": 2, "threads": 1},
        }
    )
    return features


def test_two_halves_of_a_batch_are_one(two: Checkout) -> None:
    together, alone = _fitted(two), _fitted(two, devices=1)
    assert len(together) == len(alone) == 3
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=2e-5)


def test_two_nodes_by_torchrun_are_two_processes(two: Checkout) -> None:
    _fitted(two)
    weights = stage.sha256(fitted.FOLDER / fitted.WEIGHTS)
    two.set(fit={"trainer": {"devices": 1, "nodes": 2}})
    port = free_port()
    nodes = [_node(two, rank, port) for rank in range(2)]
    # One that ends second may ask for five minutes for a store that ended with the first.
    ended = [node.communicate(timeout=420) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ended
    assert stage.sha256(fitted.FOLDER / fitted.WEIGHTS) == weights
    assert ["epoch 1 of" in out for out, _ in ended] == [True, False]


def test_nodes_without_torchrun_are_told_how(two: Checkout) -> None:
    two.set(fit={"trainer": {"nodes": 2}})
    ended = two.run(FIT)
    assert ended.status == 2, ended
    assert "fit.trainer.nodes: several are started by torchrun" in ended.err


@pytest.mark.parametrize(("started", "devices"), [(1, 2), (2, 1)])
def test_torchrun_starts_as_many_as_the_params_say(
    two: Checkout, started: int, devices: int
) -> None:
    """Or each would train as if it were alone."""
    two.set(fit={"trainer": {"devices": devices}})
    ended = two.run(f"torch.distributed.run --standalone --nproc-per-node {started} -m {FIT}")
    assert ended.status == 1, ended  # torchrun's own
    assert f"error: torchrun started {started} processes; expected {devices}" in ended.err


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_dies_ends_the_job(two: Checkout, which: int) -> None:
    two.set(fit={"max_epochs": 1000, "patience": 1000})
    _kill_one(past_an_epoch(two), which)


def test_a_first_rank_that_dies_before_they_met_leaves_no_other(two: Checkout) -> None:
    """The other would ask for it for minutes, and hold what the next attempt wants."""
    process = two.start(FIT)
    deadline = time.monotonic() + 120
    others: list[psutil.Process] = []
    while not others and time.monotonic() < deadline:
        children = psutil.Process(process.pid).children(recursive=True)
        others = [one for one in children if one.environ().get("LOCAL_RANK") == "1"]
        time.sleep(0.05)
    assert others
    process.kill()
    process.communicate(timeout=60)
    for one in others:
        one.wait(60)


def test_killed_at_any_moment_two_give_the_same_bytes(two: Checkout) -> None:
    two.set(fit={"checkpoint": {"seconds": 60, "steps": 1}, "dropout": 0.1})
    _fitted(two)
    expected = stage.digest(fitted.FOLDER)
    chance = random.Random(7)
    for _ in range(KILLS):
        _kill_one(somewhere(two, chance), chance.randrange(2))
    last = two.run(FIT)
    assert last.status == 0, last
    assert "going on after step" in last.out
    assert stage.digest(fitted.FOLDER) == expected
    assert not saved()


def test_told_to_end_both_save_and_end(two: Checkout) -> None:
    two.set(fit={"max_epochs": 1000, "patience": 1000})
    process = past_an_epoch(two)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    (newest,) = saved()
    told = f"fault: told to end after step {int(newest.stem)}; run again"
    assert f"fit: {told}" in err.splitlines()


def _node(checkout: Checkout, rank: int, port: int) -> subprocess.Popen[str]:
    """torchrun on one of two nodes, which are both this machine."""
    place = f"--nnodes 2 --node-rank {rank} --master-addr 127.0.0.1 --master-port {port}"
    return checkout.start(f"torch.distributed.run {place} -m {FIT}")


def _kill_one(process: subprocess.Popen[str], which: int) -> None:
    """All of a job end soon after one of its two processes, and none ends well."""
    children = psutil.Process(process.pid).children()
    (other,) = (one for one in children if FIT in one.cmdline())
    os.kill((process.pid, other.pid)[which], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode
    other.wait(60)


def _fitted(checkout: Checkout, **trainer: Any) -> list[dict[str, float]]:
    checkout.set(fit={"trainer": trainer})
    ended = checkout.run(FIT)
    assert ended.status == 0, ended
    return _curves()


def _curves() -> list[dict[str, float]]:
    """Of the epochs of the network."""
    found: list[dict[str, float]] = json.loads((fitted.FOLDER / fitted.CURVES).read_text())
    return [one for one in found if "epoch" in one]
