"""training: rows a second of `fit` beside a bare loop over tensors in memory; in little memory.

Needs data/features (make run). In one run, turn about: the stage's own training (Lightning, arrays
mapped from disk, figures of an epoch) and the same network, loss, optimiser and schedule in twenty
lines of PyTorch. The first epoch of each warms up and does not count. Then the rows of many
years, with less memory for a process's own data than they take.
Run: python benchmarks/training.py [MODEL …]
"""

import io
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch.nn import functional as F

from pipelines import metrics
from pipelines import params as parameters
from pipelines.params import Fit
from pipelines.train import data, fit, models, objectives
from pipelines.train.data import Encoding, Rows
from pipelines.train.models.inputs import Inputs
from pipelines.train.module import TaskModule

ROOT = Path(__file__).parent.parent
# The epochs of each that take some seconds.
MODELS = {"mlp": 4, "tabm": 3, "logistic": 40}
ROUNDS = 5
# The rows so many times over, and the bytes that training may hold of its own.
TIMES, LIMIT = 20, 1_500_000_000


def main() -> None:
    os.chdir(ROOT)
    if sys.argv[1:] == ["little"]:
        little()
        return
    params = parameters.load()
    features = params.dataset.features
    with tempfile.TemporaryDirectory() as folder:
        encoding = data.learn(features.categories, features.numbers, params.dataset.target)
        train, val = (data.materialise(encoding, s, Path(folder)) for s in ("train", "val"))
        val = first(val, 2048)  # judging the epoch is no training
        for name in sys.argv[1:] or MODELS:
            one = params.fit.model_copy(update={"model": name, "patience": 99})
            speeds: dict[str, list[float]] = {"fit": [], "bare": []}
            whole, loop = (
                partial(ours, encoding, train, val, one),
                partial(bare, encoding, train, one),
            )
            for _ in range(ROUNDS):
                speeds["fit"].append(MODELS[name] * len(train) / whole(1 + MODELS[name]))
                speeds["bare"].append(MODELS[name] * len(train) / loop(1 + MODELS[name]))
            ours_, bare_ = (statistics.median(speeds[who]) for who in ("fit", "bare"))
            ratios = [a / b for a, b in zip(speeds["fit"], speeds["bare"], strict=True)]
            told = f"{statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
            print(f"{name:<10}{ours_:>10,.0f} rows/s{bare_:>10,.0f} bare   {told}", flush=True)
    command = [sys.executable, __file__, "little"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


class Stopwatch(pl.Callback):
    """When each epoch began, and the last ended."""

    def __init__(self) -> None:
        self.times = list[float]()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.times.append(time.perf_counter())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.times.append(time.perf_counter())


def ours(encoding: Encoding, train: Rows, val: Rows, options: Fit, epochs: int) -> float:
    """Seconds of the epochs after the first."""
    options = options.model_copy(update={"max_epochs": epochs})
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as saved, redirect_stdout(io.StringIO()):
        fit.train_model(encoding, train, val, options, Path(saved), watching=[watch])
    return watch.times[-1] - watch.times[1]


def bare(encoding: Encoding, train: Rows, options: Fit, epochs: int) -> float:
    """Seconds of the epochs after the first."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.trainer.threads)
    network = models.build(Inputs.of(encoding, train), options)
    encoded = data.encode(network.encoder, train)
    codes, numbers, labels = (torch.from_numpy(np.array(array)) for array in encoded.arrays)
    steps = epochs * -(-len(train) // options.batch_size)
    objective = objectives.of(encoding.target)
    module = TaskModule(network.head, metrics.TASKS["binary"], objective, options, steps)
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for epoch in range(epochs):
        if epoch == 1:
            begun = time.perf_counter()
        for batch in torch.randperm(len(train)).split(options.batch_size):
            logits = network.head(codes[batch], numbers[batch])
            wanted = labels[batch][:, None, None].expand_as(logits)
            loss = F.binary_cross_entropy_with_logits(logits, wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return time.perf_counter() - begun


def first(rows: Rows, count: int) -> Rows:
    folder = rows.folder / "first"
    folder.mkdir()
    for name, array in zip(("codes", "numbers", "labels"), rows.arrays, strict=True):
        np.save(folder / f"{name}.npy", array[:count])
    return Rows(folder)


def little() -> None:
    """One epoch of many years' rows, under a cap on what the process holds of its own."""
    params = parameters.load()
    features = params.dataset.features
    encoding = data.learn(features.categories, features.numbers, params.dataset.target)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as years:
        for number in range(TIMES):
            for file in sorted(data.FEATURES.glob("*.parquet")):
                (Path(years) / f"{number}-{file.name}").symlink_to(file.resolve())
        # Beyond what is held by now: it counts what Arrow reserves and does not use.
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        limit = pages * resource.getpagesize() + LIMIT
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        train, val = (
            data.materialise(encoding, split, Path(folder), Path(years))
            for split in ("train", "val")
        )
        options = params.fit.model_copy(update={"max_epochs": 1})
        begun = time.perf_counter()
        with redirect_stdout(io.StringIO()):
            fit.train_model(encoding, train, val, options, Path(folder) / "saved")
        seconds = time.perf_counter() - begun
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.npy"))
    print(
        f"{len(train):,} rows, {size / 1e9:.1f} GB of arrays: an epoch in {seconds:.0f} s with at "
        f"most {LIMIT / 1e9:.1f} GB of its own"
    )


if __name__ == "__main__":
    main()
