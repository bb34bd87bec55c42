"""Trials by worker processes side by side: each fits, is pruned or judged, and is an MLflow run.

A worker maps the arrays that the first process wrote. It ends with the first process, however that
ended; one that is killed leaves a trial that `study` queues again.
"""

import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch

from pipelines import stage, tracking
from pipelines.errors import TransientError
from pipelines.params import Fit, Params
from pipelines.train import fit as fitting
from pipelines.train import study
from pipelines.train.data import Encoding, Rows

if TYPE_CHECKING:
    from optuna import Study, Trial

SPLITS = ("train", "val")


class LateError(Exception):
    """As many trials as were asked for have begun already."""


@dataclass(frozen=True)
class Job:
    """What a worker needs: arrays of `SPLITS` in `rows`, the study's name, the id of its run."""

    params: Params
    encoding: Encoding
    rows: Path
    study: str
    run: str


def search(job: Job, held: "Study") -> None:
    """Have workers make what is missing of the trials. Raises TransientError where one died and
    trials are missing.
    """
    missing = job.params.tune.trials - len(study.trials(held, study.FINISHED))
    spawn = multiprocessing.get_context("spawn")  # threads of torch outlive no fork
    numbers = range(1, min(job.params.tune.workers, missing) + 1)
    workers = [spawn.Process(target=work, args=(job, number)) for number in numbers]
    try:
        with _deaf_to_ctrl_c():
            for worker in workers:
                worker.start()
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()
        study.free_dead(held)
    done = len(study.trials(held, study.FINISHED))
    if done < job.params.tune.trials:
        ended = ", ".join(str(worker.exitcode) for worker in workers)
        raise TransientError(
            f"{done} of {job.params.tune.trials} trials are done, and workers ended with status "
            f"{ended}: run again, it goes on"
        )


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal; what is started here leaves it to the first."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def work(job: Job, number: int) -> None:
    """The life of worker `number`; exits with a stage's status."""
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    sys.exit(stage.guarded(f"tune, worker {number}", lambda _: _work(job)))


def _end_with_the_first() -> None:
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()
    os._exit(1)


def _work(job: Job) -> None:
    held, asked = study.opened(job.params, job.study), job.params.tune.trials
    while len(study.trials(held, study.BEGUN)) < asked:
        held.optimize(partial(_objective, job), n_trials=1, catch=(LateError,))


def _objective(job: Job, trial: "Trial") -> float:
    """The lowest validation loss of an epoch: what fit keeps."""
    from optuna import TrialPruned
    from optuna.samplers import TPESampler

    trial.set_user_attr("owner", study.owner())
    rank = study.rank(trial.study, trial.number)
    if rank >= job.params.tune.trials:
        raise LateError
    # Anew for each: what is drawn depends on the trials before, not on how often work began.
    trial.study.sampler = TPESampler(seed=(job.params.fit.seed + rank) % 2**32)
    values = study.suggested(trial, job.params)
    trial.set_user_attr("values", values)
    fit = job.params.fit.changed(values)
    pruned: TrialPruned | None = None
    try:
        loss = fitted_loss(job, fit, f"trial {rank + 1}", [Watch(trial)])
    except TrialPruned as error:
        pruned = error
    except TransientError:
        os._exit(1)  # told to end: as if killed, so that these values are tried again
    best = study.best(trial.study)
    lowest = min(math.inf if pruned else loss, math.inf if best is None else study.loss(best))
    said = f"pruned: {pruned}" if pruned else f"{loss:.4f}"
    stage.say("tune", f"trial {rank + 1} of {job.params.tune.trials}: {said}; best {lowest:.4f}")
    if pruned:
        raise pruned
    return loss


def fitted_loss(job: Job, fit: Fit, name: str, watching: Sequence[pl.Callback] = ()) -> float:
    """Fit on the train rows as an MLflow run below the study's; the lowest validation loss."""
    from optuna import TrialPruned

    params = job.params.model_copy(update={"fit": fit})
    # Of its own: several processes that write beside the same arrays would tear them.
    folder = job.rows / f"{os.getpid()}"
    tags = {"mlflow.parentRunId": job.run}
    pruned: TrialPruned | None = None
    try:
        with tracking.run(params, "fit", name, tags) as logger:
            train, val = (_linked(job.rows / split, folder / split) for split in SPLITS)
            try:
                # What the epochs of several trials say at once tells nobody anything.
                with redirect_stdout(None):
                    trained = fitting.train_model(
                        job.encoding, train, val, fit, folder / "saved", logger, watching
                    )
            except TrialPruned as error:
                pruned = error
            tracking.tag(logger, {"state": "pruned" if pruned else "complete"})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if pruned:
        raise pruned
    return trained.loss


def _linked(arrays: Path, folder: Path) -> Rows:
    folder.mkdir(parents=True)
    for file in sorted(arrays.glob("*.npy")):
        (folder / file.name).symlink_to(file.resolve())
    return Rows(folder)


class Watch(pl.Callback):
    """Ends a trial that falls behind the median of the others at the same epoch, or diverges."""

    def __init__(self, trial: "Trial") -> None:
        self.trial = trial

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from optuna import TrialPruned

        if not all(bool(torch.isfinite(one).all()) for one in pl_module.parameters()):
            raise TrialPruned("it diverged")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from optuna import TrialPruned

        epoch, loss = trainer.current_epoch + 1, float(trainer.callback_metrics["val_loss"])
        if not math.isfinite(loss):
            raise TrialPruned("it diverged")
        self.trial.report(loss, epoch)
        # The last epoch costs no more, and its value is the trial's.
        if epoch < (trainer.max_epochs or 0) and self.trial.should_prune():
            raise TrialPruned(f"{loss:.4f} after epoch {epoch} is behind the median")
