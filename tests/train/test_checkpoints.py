"""A fit that is killed goes on where it stood: the bytes are those of one that was not."""

import json
import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from train.fits import FIT, GPU, arrays, past_an_epoch, saved, somewhere
from world import Checkout

from pipelines import stage
from pipelines.errors import TransientError
from pipelines.train import checkpoints, fit, fitted
from pipelines.train.data import Rows
from pipelines.train.module import Batches

pytestmark = pytest.mark.pipeline
KILLS = 10


class Counted(Rows):
    """So many rows, each of which is its number."""

    def __init__(self, rows: int) -> None:
        self.arrays = (np.arange(rows),)

    def __len__(self) -> int:
        return len(self.arrays[0])

    def take(self, indices: np.ndarray) -> list[int]:  # type: ignore[override]
        return indices.tolist()  # type: ignore[no-any-return]


@given(st.data(), st.integers(1, 60), st.integers(1, 20), st.integers(1, 3))
def test_every_row_is_visited_once_an_epoch_whoever_stops_and_goes_on(
    data: st.DataObject, rows: int, size: int, parts: int
) -> None:
    """The rows that all processes visit are a permutation, and the next epoch's is another."""
    epochs: list[list[int]] = []
    for epoch in range(2):
        visited: list[int] = []
        for which in range(parts):
            part = (which, parts)
            batches = Batches(Counted(rows), size, part, seed=7)
            batches.load_state_dict({"epoch": epoch, "place": 0})
            stop = data.draw(st.integers(0, len(batches) - 1))
            stopped = iter(batches)
            visited += [row for _ in range(stop) for row in next(stopped)]
            going_on = Batches(Counted(rows), size, part, seed=7)
            going_on.load_state_dict(batches.state_dict())
            visited += [row for batch in going_on for row in batch]
            next(iter(going_on))
            assert going_on.state_dict() == {"epoch": epoch + 1, "place": 1}
        assert sorted(visited) == list(range(rows))
        epochs.append(visited)
    if rows > 20:
        assert epochs[0] != epochs[1]


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=20,
)


@given(TREES)
def test_what_is_packed_comes_back(tmp_path_factory: pytest.TempPathFactory, tree: object) -> None:
    path = tmp_path_factory.mktemp("packed") / "one.safetensors"
    path.write_bytes(checkpoints.pack({"tree": tree, "tensor": torch.arange(3.0)}))
    back = checkpoints.unpack(path)
    assert back["tree"] == tree
    assert torch.equal(back["tensor"], torch.arange(3.0))


def test_what_has_no_form_is_refused() -> None:
    with pytest.raises(TypeError, match="function has no form in a checkpoint"):
        checkpoints.pack({"one": [lambda: 0]})


@given(st.integers(0, 10**6), st.integers(1, 255))
@example(230, ord(" ") ^ ord("\t"))  # in the header, where JSON takes one for the other
def test_a_changed_byte_is_seen_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, place: int, change: int
) -> None:
    weights = torch.randn(20)
    content = bytearray(checkpoints.pack({"step": 3, "weights": weights}))
    content[place % len(content)] ^= change
    path = tmp_path_factory.mktemp("changed") / "one.safetensors"
    path.write_bytes(content)
    back = {"step": 3, "weights": weights}
    with suppress(ValueError):
        back = checkpoints.unpack(path)
    assert back["step"] == 3
    assert torch.equal(back["weights"], weights)


@pytest.fixture
def long(features: Checkout) -> Checkout:
    """A fit of some hundred steps, saved at each."""
    features.set(fit={"max_epochs": 3, "batch_size": 32, "checkpoint": {"seconds": 60, "steps": 1}})
    return features


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=GPU)])
def test_killed_at_any_moment_it_gives_the_same_bytes(long: Checkout, accelerator: str) -> None:
    long.set(fit={"trainer": {"accelerator": accelerator}})
    whole = long.run(FIT)
    assert whole.status == 0, whole
    expected = stage.digest(fitted.FOLDER)
    assert not saved()
    chance = random.Random(7)
    begun = {"going on after step 0"}
    for _ in range(KILLS):
        process = somewhere(long, chance)
        process.kill()
        out, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before it was killed"
        begun |= set(re.findall(r"going on after step \d+", out))
        assert len(saved()) <= checkpoints.KEPT + 1
    assert len(begun) > 2, "no attempt went on where another stood"
    last = long.run(FIT)
    assert last.status == 0, last
    assert "going on after step" in last.out
    assert stage.digest(fitted.FOLDER) == expected
    assert not saved()


def test_told_to_end_it_saves_and_may_be_tried_again(long: Checkout) -> None:
    long.set(fit={"checkpoint": {"seconds": 3600, "steps": None}})
    expected = _fitted(long)
    process = past_an_epoch(long)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    (newest,) = saved()
    step = int(newest.stem)
    assert err.splitlines()[-1] == f"fit: fault: told to end after step {step}; run again"
    assert _fitted(long) == expected


@pytest.mark.parametrize("line", ["validation rows", "growing trees"])
def test_told_to_end_before_and_after_the_network_it_is_a_fault(long: Checkout, line: str) -> None:
    process = long.start(FIT)
    assert process.stdout is not None
    next(said for said in process.stdout if line in said)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert re.fullmatch(r"fit: fault: told to end( after step \d+)?; run again", err.strip())
    assert not list(fitted.FOLDER.parent.glob(".fit*"))


def test_a_network_that_diverges_names_the_learning_rate(long: Checkout) -> None:
    long.set(fit={"model": "mlp", "learning_rate": 1e30})
    ended = long.run(FIT)
    assert ended.status == 2, ended
    assert "fit: error: fit.learning_rate: with 1e+30 the validation loss is no finite" in ended.err


@pytest.mark.parametrize(("epochs", "batch"), [(1, 64), (50, 10**6)])
def test_told_to_end_in_the_last_moment_it_does_not_end_as_if_it_were_done(
    features: Checkout, epochs: int, batch: int
) -> None:
    """In the last validation, and with one batch an epoch, no batch follows after which it could
    be saved.
    """

    class Told(pl.Callback):
        def on_validation_start(self, *_: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    features.set(fit={"model": "logistic", "max_epochs": epochs, "batch_size": batch})
    params = features.params()
    encoding, train, val = arrays(params)
    with pytest.raises(TransientError, match="told to end after the last step; run again"):
        fit.train_model(encoding, train, val, params.fit, Path("saved"), watching=[Told()])


@pytest.mark.parametrize("damage", ["cut", "byte", "empty"])
def test_a_damaged_newest_falls_back_to_the_one_before(long: Checkout, damage: str) -> None:
    expected = _fitted(long)
    process = long.start(FIT)
    while len(saved()) < checkpoints.KEPT and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    older, newest = saved()[-2:]
    content = newest.read_bytes()
    middle = len(content) // 2
    newest.write_bytes(
        {
            "cut": content[:middle],
            "byte": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "empty": b"",
        }[damage]
    )
    ended = long.run(FIT)
    assert ended.status == 0, ended
    assert f"a damaged checkpoint is left out: {newest}" in ended.out
    assert f"going on after step {int(older.stem)}" in ended.out
    assert stage.digest(fitted.FOLDER) == expected


def test_another_seed_does_not_go_on(long: Checkout) -> None:
    process = long.start(FIT)
    while not saved() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    long.set(fit={"seed": 8})
    ended = long.run(FIT)
    assert ended.status == 0, ended
    assert "going on" not in ended.out


def _fitted(checkout: Checkout) -> str:
    ended = checkout.run(FIT)
    assert ended.status == 0, ended
    made = stage.digest(fitted.FOLDER)
    assert json.loads((fitted.FOLDER / fitted.CURVES).read_text())[-2]["epoch"] == 3
    shutil.rmtree(fitted.FOLDER)
    return made
