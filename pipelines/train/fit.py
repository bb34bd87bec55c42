"""fit: the model learns from the train rows.

in:   data/features/
out:  models/fit/: weights.safetensors, fit.json (what rebuilds the model), curves.json (figures
      per epoch of a network, and of all once there are trees)
log:  MLflow, with params, curves, data hash and git commit
run:  dvc repro fit

Lightning trains the network of fit.model until the validation loss has not fallen for fit.patience
epochs. The best epoch's weights are kept. Trees are grown after it, by the first process. What is
there then is calibrated on the validation rows. Same data, params and threads give the same bytes,
also where it was killed and goes on (pipelines/train/checkpoints.py). SIGTERM saves, and is a
fault: a scheduler tries again.
"""

import math
import os
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import EarlyStopping

from pipelines import metrics, stage, tracking
from pipelines.errors import UserError
from pipelines.params import Fit, Params
from pipelines.train import checkpoints, data, fitted, models, objectives
from pipelines.train.checkpoints import Checkpoints, Plain
from pipelines.train.data import Encoding, Rows
from pipelines.train.fitted import Fitted
from pipelines.train.models import Model
from pipelines.train.models.inputs import Inputs, Network
from pipelines.train.module import FeatureData, TaskModule
from pipelines.train.objectives import Objective

# In the environment of ranks that the first one starts: its process. torchrun starts all ranks.
FIRST = "HEADRACE_FIRST_RANK"
Figures = dict[str, float]


def run(params: Params) -> None:
    features = params.dataset.features
    models.check(params.fit.model)
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    ranks = params.fit.trainer.devices * params.fit.trainer.nodes
    if params.fit.trainer.nodes > 1 and not torchrun:
        raise UserError("fit.trainer.nodes: several are started by torchrun, one on each node")
    if torchrun and (started := int(os.environ["WORLD_SIZE"])) != ranks:
        raise UserError(
            f"torchrun started {started} processes; expected {ranks}, as fit.trainer has devices "
            "and nodes"
        )
    if stage.RANK:
        starter = os.getppid() if torchrun else int(os.environ[FIRST])
        threading.Thread(target=_end_with, args=(starter,), daemon=True).start()
    elif not torchrun:
        os.environ[FIRST] = str(os.getpid())
    with stage.scratch(f"fit{stage.RANK or ''}") as scratch:
        encoding = data.learn(features.categories, features.numbers, params.dataset.target)
        train, val = (data.materialise(encoding, split, scratch) for split in ("train", "val"))
        stage.say(
            "fit", f"{params.fit.model} on {len(train):,} train and {len(val):,} validation rows"
        )
        saved = checkpoints.sweep(_key(params))
        if stage.RANK:
            train_model(encoding, train, val, params.fit, saved)
            return
        with stage.fresh(fitted.FOLDER) as out, tracking.run(params, "fit") as logger:
            trained = train_model(encoding, train, val, params.fit, saved, logger)
            fitted.save(trained.model, params.fit, out)
            stage.write_json(out / fitted.CURVES, trained.curves)
            tracking.tag(
                logger, {"fit": stage.digest(out), "features": stage.digest(data.FEATURES)}
            )
    shutil.rmtree(saved, ignore_errors=True)


def _end_with(starter: int) -> None:
    """Where who started this rank dies before they have met, it would ask for it for minutes."""
    while os.getppid() == starter:
        time.sleep(1)
    os._exit(1)


def _key(params: Params) -> str:
    """The name of all that the weights depend on."""
    made_of = code()
    made_of["features"] = stage.digest(data.FEATURES)
    made_of["fit"] = params.fit.model_dump_json(exclude={"checkpoint"})
    made_of["columns"] = params.dataset.features.model_dump_json()
    made_of["target"] = params.dataset.target.model_dump_json()
    return stage.digest_of(made_of)[:32]


LIBRARIES = ("torch", "pytorch-lightning", "numpy", "scikit-learn")


def code() -> dict[str, str]:
    """What trains, each file by its digest and each library by its version."""
    here, package = Path(__file__).parent, Path(metrics.__file__).parent
    files = [*here.rglob("*.py"), Path(metrics.__file__)]
    made_of = {str(path.relative_to(package)): stage.sha256(path) for path in sorted(files)}
    return made_of | {name: version(name) for name in LIBRARIES}


@dataclass(frozen=True)
class Trained:
    """curves: figures of every epoch of the network, and then of all with its trees. loss: of the
    validation rows, before calibration, of what was kept.
    """

    model: Fitted
    curves: list[Figures]
    loss: float


def train_model(
    encoding: Encoding,
    train: Rows,
    val: Rows,
    fit: Fit,
    folder: Path,
    logger: Any = False,
    watching: Sequence[pl.Callback] = (),
    begin: Model | None = None,
) -> Trained:
    """Train a new model, or `begin` where one is given, which `fit` describes, whose trees stay;
    calibrate.

    Goes on from the newest checkpoint in `folder`. Raises TransientError where it was told to end,
    and what one who is `watching` raises.
    """
    repeatable(fit)
    model = models.build(Inputs.of(encoding, train), fit) if begin is None else begin
    objective = objectives.of(encoding.target, train.arrays[2])
    if absent := objectives.absent(objective, val.labels):
        raise UserError(
            f"{data.FEATURES}: none of the {len(val):,} validation rows has the label "
            f"{min(absent)}; expected each class, so that its probability can be calibrated"
        )
    task = metrics.TASKS[encoding.target.task]
    network, trees = models.parts(model)
    grown = None if stage.RANK else trees
    curves, loss = list[Figures](), math.inf
    if network is not None:
        curves = _descend(network, task, objective, (train, val), fit, folder, logger, watching)
        best = min(curves, key=lambda epoch: epoch["val_loss"])
        loss = best["val_loss"]
        stage.say("fit", f"kept epoch {best['epoch']:.0f}, validation loss {loss:.4f}")
    if grown is not None and not len(grown):
        stage.say("fit", f"growing trees on {len(train):,} rows")
        grown.grow(train, val, objective, fit)
    mean = fitted.said(model, objective, val)
    if grown is not None:
        figures = fitted.judged(mean, val.labels, task, objective)
        loss = figures["val_loss"]
        curves.append({"trees": len(grown)} | figures)
        if logger:
            logger.log_metrics(figures, step=_steps(train, fit))
        stage.say("fit", f"with {len(grown)} trees the validation loss is {loss:.4f}")
    calibrated = fitted.calibrate(model, objective, mean, val.labels)
    return Trained(Fitted(calibrated, encoding), curves, loss)


def _descend(
    network: Network,
    task: metrics.Task,
    objective: Objective,
    rows: tuple[Rows, Rows],
    fit: Fit,
    folder: Path,
    logger: Any,
    watching: Sequence[pl.Callback],
) -> list[Figures]:
    """Train the network on the first rows, and keep the epoch that is best on the second."""
    train, val = rows
    module = TaskModule(network.head, task, objective, fit, _steps(train, fit))
    best, saving = _Best(), Checkpoints(folder, fit.checkpoint)
    progress = _Progress(len(train), task.told)
    ours = [EarlyStopping("val_loss", patience=fit.patience), best, progress, saving]
    trainer = _trainer(fit, [*ours, *watching], logger)
    if fit.trainer.compile:
        network.head.compile(dynamic=True)  # the last batch is smaller
    device = trainer.strategy.root_device
    encoded = [data.near(data.encode(network.encoder, rows), device) for rows in (train, val)]
    try:
        trainer.fit(module, FeatureData(encoded[0], encoded[1], fit), ckpt_path=saving.newest())
    except SystemExit as error:
        if isinstance(error.code, str):  # the stage was told to end
            raise
        raise KeyboardInterrupt from error  # Lightning makes the other of Ctrl-C
    if not best.weights:
        raise UserError(
            f"fit.learning_rate: with {fit.learning_rate:g} the validation loss is no finite "
            "number after any epoch; expected less"
        )
    network.head.load_state_dict(best.weights)
    network.cpu()
    return progress.epochs


def _trainer(fit: Fit, callbacks: list[pl.Callback], logger: Any) -> pl.Trainer:
    """Raises UserError where the hardware is not there."""
    if fit.trainer.precision == "16-mixed" and not torch.accelerator.is_available():
        raise UserError("fit.trainer.precision: 16-mixed needs a GPU, and there is none")
    try:
        return pl.Trainer(
            accelerator=fit.trainer.accelerator,
            devices=fit.trainer.devices,
            num_nodes=fit.trainer.nodes,
            precision=fit.trainer.precision,
            max_epochs=fit.max_epochs,
            deterministic=True,
            callbacks=callbacks,
            plugins=[Plain()],
            enable_checkpointing=False,
            logger=logger,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
        )
    except MisconfigurationException as error:
        asked = f"{fit.trainer.devices} {fit.trainer.accelerator}"
        raise UserError(f"fit.trainer asks for {asked}: {' '.join(str(error).split())}") from None


def _steps(train: Rows, fit: Fit) -> int:
    """Of the optimiser, at most."""
    return fit.max_epochs * math.ceil(len(train) / fit.batch_size)


def repeatable(fit: Fit) -> None:
    """Seed everything, and split sums the same way on every machine."""
    import logging
    import warnings

    pl.seed_everything(fit.seed, verbose=False)
    torch.set_num_threads(fit.trainer.threads)
    # Deterministic torch would fill whatever is made to be written next.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Lightning, and the processes that it starts, would choose another number.
    os.environ["OMP_NUM_THREADS"] = str(fit.trainer.threads)
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # More workers would copy batches between processes; they are slices of mapped memory already.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    # Figures are logged by epoch: that an epoch has few batches hides none.
    warnings.filterwarnings("ignore", ".*number of training batches.*")


class _Best(pl.Callback):
    """The weights of the epoch with the smallest validation loss."""

    def __init__(self) -> None:
        self.loss, self.weights = math.inf, dict[str, torch.Tensor]()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = float(trainer.callback_metrics["val_loss"])
        if loss < self.loss:
            self.loss = loss
            held = pl_module.head.state_dict()  # type: ignore[union-attr]
            self.weights = {name: value.clone() for name, value in held.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss, self.weights = state["loss"], state["weights"]


class _Progress(pl.Callback):
    """One line per epoch, and its figures."""

    def __init__(self, rows: int, told: str) -> None:
        self.rows, self.told, self.epochs = rows, told, list[Figures]()
        self.begun, self.steps = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = state["epochs"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)  # perhaps in the middle of an epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)

    def _begin(self, trainer: pl.Trainer) -> None:
        self.begun, self.steps = time.perf_counter(), trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        figures = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        self.epochs.append({"epoch": trainer.current_epoch + 1} | figures)
        if trainer.is_global_zero:
            done = (trainer.global_step - self.steps) / trainer.num_training_batches
            speed = done * self.rows / (time.perf_counter() - self.begun)
            stage.say(
                "fit",
                f"epoch {trainer.current_epoch + 1} of at most {trainer.max_epochs}: "
                f"validation loss {figures['val_loss']:.4f}, "
                f"{metrics.title(self.told)} {figures[f'val_{self.told}']:.4f}, "
                f"{speed:,.0f} rows/s",
            )


if __name__ == "__main__":
    stage.main(run)
