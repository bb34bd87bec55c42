"""training: rows a second of `fit` beside a bare loop over tensors in memory; in little memory.

Needs data/features (make run), and trains where fit.trainer says (in 32-true or bf16-mixed). In one
process, turn about every few steps, so that both have the same machine: the stage's own training
(Lightning, arrays mapped from disk or held by a GPU, figures of an epoch, a checkpoint where one is
due) and the same network, loss, optimiser and schedule in twenty lines of PyTorch. Turns of the
first epoch warm up and do not count. Then the rows of many years, with less memory for a process's
own data than they take.
Run: python benchmarks/training.py [MODEL …]
"""

import pipelines  # noqa: F401  before torch is: it says how threads wait

# isort: split
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
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
# The epochs of each that take a minute or two.
MODELS = {"mlp": 40, "tabm": 30, "logistic": 300}
STEPS = 20  # of a turn
# The rows so many times over, and the bytes that training may hold of its own.
TIMES, LIMIT = 20, 1_500_000_000
Doubles = npt.NDArray[np.float64]


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
            epochs = MODELS[name] + 1
            one = params.fit.model_copy(
                update={"model": name, "patience": epochs, "max_epochs": epochs}
            )
            spent = turns(encoding, train, val, one)
            rows = STEPS * one.batch_size * len(spent)
            speeds = " ".join(f"{rows / seconds:>10,.0f}" for seconds in spent.sum(axis=0))
            low, high = interval(spent)
            told = f"{ratio(spent):.3f}, {low:.3f} to {high:.3f}"
            print(f"{name:<10} rows/s, bare: {speeds}   {told}", flush=True)
    command = [sys.executable, __file__, "little"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def now() -> float:
    """Seconds, once a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Turns(pl.Callback):
    """Whenever the stage has taken STEPS steps, so many of the bare loop; the seconds of both."""

    def __init__(self, loop: Iterator[None]) -> None:
        self.loop, self.begun, self.spent = loop, now(), list[tuple[float, float]]()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % STEPS:
            return
        between = now()
        for _ in range(STEPS):
            next(self.loop)
        ended = now()
        self.spent.append((between - self.begun, ended - between))
        self.begun = now()


def turns(encoding: Encoding, train: Rows, val: Rows, options: Fit) -> Doubles:
    """Seconds of the stage and of the bare loop, shape (turns, 2), after the first epoch."""
    watching = Turns(bare(encoding, train, options))
    with tempfile.TemporaryDirectory() as saved, redirect_stdout(io.StringIO()):
        fit.train_model(encoding, train, val, options, Path(saved), watching=[watching])
    return np.array(watching.spent)[-(-len(train) // options.batch_size // STEPS) :]


def ratio(spent: Doubles) -> float:
    """Rows a second of the stage over those of the bare loop."""
    stage, bare_ = spent.sum(axis=0)
    return float(bare_ / stage)


def interval(spent: Doubles) -> Doubles:
    """Of the ratio: 95 %, by a bootstrap of the turns."""
    drawn = np.random.default_rng(0).integers(0, len(spent), (2000, len(spent)))
    return np.quantile([ratio(spent[some]) for some in drawn], (0.025, 0.975))


def bare(encoding: Encoding, train: Rows, options: Fit) -> Iterator[None]:
    """Each step that is asked for."""
    network = models.build(Inputs.of(encoding, train), options)
    encoded = data.encode(network.encoder, train)
    alone = options.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    device = "cpu" if alone else "cuda"
    codes, numbers, labels = (torch.from_numpy(np.array(a)).to(device) for a in encoded.arrays)
    network.head.to(device)
    if options.trainer.compile:
        network.head.compile(dynamic=True)
    cast = torch.autocast(device, torch.bfloat16, options.trainer.precision == "bf16-mixed")
    steps = options.max_epochs * -(-len(train) // options.batch_size)
    objective = objectives.of(encoding.target)
    module = TaskModule(network.head, metrics.TASKS["binary"], objective, options, steps)
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]
    while True:
        for batch in torch.randperm(len(train), device=device).split(options.batch_size):
            with cast:
                logits = network.head(codes[batch], numbers[batch])
                wanted = labels[batch][:, None, None].expand_as(logits)
                loss = F.binary_cross_entropy_with_logits(logits, wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            yield


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
        # What a GPU's driver maps would count too.
        trainer = params.fit.trainer.model_copy(update={"accelerator": "cpu"})
        options = params.fit.model_copy(update={"max_epochs": 1, "trainer": trainer})
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
