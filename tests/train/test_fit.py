"""fit learns a known law, repeats byte for byte, and tells MLflow."""

import errno
import json
import os
import shutil
import socket

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from train.fits import GPU, arrays
from world import Checkout

from pipelines import metrics, stage, tracking
from pipelines.errors import UserError
from pipelines.train import data, fit, fitted, models
from pipelines.train.models.inputs import POINTS, Inputs, NumberEncoder


def test_fit_finds_the_law_and_repeats(features: Checkout) -> None:
    params = features.params()
    fit.run(params)
    first = stage.digest(fitted.FOLDER)
    model = fitted.load()
    with stage.scratch("test") as scratch:
        test = data.materialise(model.encoding, "test", scratch)
        prediction = model.predict(test)
    names = model.encoding.numbers
    slack, minute = (
        np.asarray(test.arrays[1][:, names.index(name)])
        for name in ("tail_slack", "departure_minute")
    )
    law = metrics.point(test.labels, 1 / (1 + np.exp(slack - minute)))["auc"]
    assert law > 0.75
    assert metrics.point(test.labels, prediction)["auc"] > law - 0.05
    fit.run(params)
    assert stage.digest(fitted.FOLDER) == first

    store, experiment = tracking.client(params)
    runs = store.search_runs([experiment], f"tags.fit = '{first}'")
    assert len(runs) == 2
    run = runs[0]
    assert run.info.status == "FINISHED"
    assert run.data.params["fit.batch_size"] == "256"
    assert run.data.tags["features"] == stage.digest(data.FEATURES)
    assert {"train_loss", "val_loss", "val_auc"} <= set(run.data.metrics)
    assert "git_commit" in run.data.tags


def test_weights_are_saved_without_pickle_and_come_back(features: Checkout) -> None:
    fit.run(features.params())
    assert sorted(path.name for path in fitted.FOLDER.iterdir()) == [
        fitted.CURVES, fitted.DESCRIPTION, fitted.WEIGHTS,
    ]  # fmt: skip
    *epochs, last = json.loads((fitted.FOLDER / fitted.CURVES).read_text())
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    assert last["trees"] > 0


def test_a_split_without_rows_is_one_line(features: Checkout) -> None:
    table = pq.read_table("data/features/2013.parquet")
    pq.write_table(
        table.filter(np.array(table["split"].to_pylist()) != "val"), "data/features/2013.parquet"
    )
    with pytest.raises(UserError, match="no val row; check featurize"):
        fit.run(features.params())
    assert not fitted.FOLDER.exists()


def test_a_class_without_a_validation_row_is_one_line(features: Checkout) -> None:
    table = pq.read_table("data/features/2013.parquet")
    split, label = (np.array(table[name].to_pylist()) for name in ("split", "label"))
    pq.write_table(table.filter((split != "val") | (label == 0)), "data/features/2013.parquet")
    with pytest.raises(UserError, match=r"none of the \d+ validation rows has the label 1"):
        fit.run(features.params())
    assert not fitted.FOLDER.exists()


def test_a_batch_is_taken_at_once_from_mapped_memory(features: Checkout) -> None:
    dataset = features.params().dataset
    names = dataset.features
    encoding = data.learn(names.categories, names.numbers, dataset.target)
    with stage.scratch("test") as scratch:
        rows = data.materialise(encoding, "train", scratch)
        assert all(isinstance(array, np.memmap) for array in rows.arrays)
        codes, numbers, labels = rows.take(np.array([5, 3, 5]))
        assert codes.shape == (3, len(names.categories))
        assert numbers.shape == (3, len(names.numbers))
        assert torch.equal(numbers[0], numbers[2]) or bool(torch.isnan(numbers[0]).any())
        assert labels.tolist() == [rows.labels[5], rows.labels[3], rows.labels[5]]


def test_a_rank_is_the_share_of_rows_below() -> None:
    values = np.r_[np.zeros(500), np.linspace(1, 2, 500)].astype(np.float32)
    statistics = np.r_[np.quantile(values, np.linspace(0, 1, POINTS)), values.mean(), 1.0, 0.0]
    encoder = NumberEncoder(Inputs([], statistics[None].astype(np.float32), 1))
    asked = torch.tensor([[-1.0], [0.0], [1.5], [3.0], [float("nan")]])
    logit = encoder(asked)[:, 0]
    assert logit[0] < logit[1] < logit[2] < logit[3]
    rank = torch.sigmoid(logit * 1.8)
    assert rank[1].item() == pytest.approx(0.25, abs=0.02)  # the middle of the half that is zero
    assert rank[2].item() == pytest.approx(0.75, abs=0.02)
    assert logit[4].item() == 0


def test_the_table_of_models_names_the_default(features: Checkout) -> None:
    assert features.params().fit.model in models.MODELS


def test_a_disk_too_small_for_the_arrays_is_an_error_that_names_the_file(
    features: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a byte of the array is written: mapped memory the disk cannot hold kills a process."""
    dataset = features.params().dataset
    names = dataset.features
    encoding = data.learn(names.categories, names.numbers, dataset.target)

    def full(file: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with stage.scratch("test") as scratch, pytest.raises(OSError, match="space") as raised:
        data.materialise(encoding, "train", scratch)
    assert raised.value.filename.endswith("train/codes.npy")


def test_a_mixed_precision_trains(features: Checkout) -> None:
    features.set(fit={"max_epochs": 1, "trainer": {"precision": "bf16-mixed"}})
    fit.run(features.params())
    assert fitted.FOLDER.exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_learns_the_same(features: Checkout) -> None:
    losses = []
    for compiled in (False, True):
        # Compiled, the same seed drops out other units.
        options = {"model": "logistic", "dropout": 0.0, "max_epochs": 2}
        features.set(fit={**options, "trainer": {"compile": compiled}})
        fit.run(features.params())
        losses.append([one["val_loss"] for one in stage.read_json(fitted.FOLDER / fitted.CURVES)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(features: Checkout) -> None:
    features.set(fit={"trainer": {"accelerator": "gpu"}})
    with pytest.raises(UserError, match=r"^fit\.trainer asks for 1 gpu: No supported gpu"):
        fit.run(features.params())
    assert not fitted.FOLDER.exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_half_floats_where_no_gpu_is_found_are_the_users_mistake(features: Checkout) -> None:
    features.set(fit={"trainer": {"precision": "16-mixed", "accelerator": "auto"}})
    with pytest.raises(UserError, match="16-mixed needs a GPU, and there is none"):
        fit.run(features.params())


@GPU
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_gpu_learns_what_the_processor_learns(features: Checkout, precision: str) -> None:
    losses = []
    for accelerator, exact in (("cpu", "32-true"), ("gpu", precision)):
        trainer = {"accelerator": accelerator, "precision": exact}
        features.set(fit={"max_epochs": 2, "trainer": trainer})
        fit.run(features.params())
        losses.append([one["val_loss"] for one in stage.read_json(fitted.FOLDER / fitted.CURVES)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-2)


def test_rows_that_a_device_holds_give_the_same_batches(features: Checkout) -> None:
    _, train, _ = arrays(features.params())
    held = data.Held(train, torch.device("cpu"))
    some = np.random.default_rng(7).permutation(len(train))[:300]
    for sent, taken in zip(train.take(some), held.take(some), strict=True):
        assert sent.dtype == taken.dtype
        assert torch.equal(sent.nan_to_num(), taken.nan_to_num())


def test_from_rows_that_a_device_holds_the_same_is_learned(
    features: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    features.set(fit={"model": "mlp"})
    fit.run(features.params())
    sent = stage.digest(fitted.FOLDER)
    monkeypatch.setattr(data, "near", data.Held)
    fit.run(features.params())
    assert stage.digest(fitted.FOLDER) == sent


def test_a_killed_fit_does_not_run_for_ever_in_the_store(features: Checkout) -> None:
    params = features.params()
    store, experiment = tracking.client(params)
    killed, working, elsewhere = (
        store.create_run(experiment, tags={"host": host, "process": process}).info.run_id
        for host, process in (
            (socket.gethostname(), f"{os.getpid()} 17"),
            (socket.gethostname(), stage.me()),
            ("elsewhere", "1 17"),
        )
    )
    with tracking.run(params, "fit"):
        pass
    assert store.get_run(killed).info.status == "KILLED"
    assert store.get_run(working).info.status == "RUNNING"
    assert store.get_run(elsewhere).info.status == "RUNNING"
