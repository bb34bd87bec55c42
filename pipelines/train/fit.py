"""fit: the model learns from the train rows.

in:   data/features/
out:  models/fit/: weights.safetensors, fit.json (what rebuilds the network), curves.json (figures
      per epoch)
log:  MLflow, with params, curves, data hash and git commit
run:  dvc repro fit

Lightning trains fit.model until the validation loss has not fallen for fit.patience epochs. The
best epoch's weights are kept, and calibrated on the validation rows. Same data, params and threads
give the same bytes.
"""

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from pipelines import stage, tracking
from pipelines.errors import naming
from pipelines.params import Fit, Params
from pipelines.train import data, fitted, models
from pipelines.train.data import Encoding, Rows
from pipelines.train.fitted import Fitted
from pipelines.train.models.inputs import Inputs
from pipelines.train.module import BinaryModule, FeatureData

Epoch = dict[str, float]


def run(params: Params) -> None:
    features = params.dataset.features
    with stage.scratch("fit") as scratch, stage.fresh(fitted.FOLDER) as out:
        encoding = data.learn(features.categories, features.numbers)
        train, val = (data.materialise(encoding, split, scratch) for split in ("train", "val"))
        stage.say(
            "fit", f"{params.fit.model} on {len(train):,} train and {len(val):,} validation rows"
        )
        with tracking.run(params, "fit") as logger:
            model, epochs = train_network(encoding, train, val, params.fit, scratch, logger)
            fitted.save(model, params.fit, out)
            stage.write_json(out / fitted.CURVES, epochs)
            tracking.tag(
                logger, {"fit": stage.digest(out), "features": stage.digest(data.FEATURES)}
            )
    best = min(epochs, key=lambda epoch: epoch["val_loss"])
    stage.say("fit", f"kept epoch {best['epoch']:.0f}, validation loss {best['val_loss']:.4f}")


def train_network(
    encoding: Encoding, train: Rows, val: Rows, fit: Fit, scratch: Path, logger: Any = False
) -> tuple[Fitted, list[Epoch]]:
    """Train, keep the best epoch, calibrate. Returns the model and the figures of every epoch."""
    _repeatable(fit)
    network = models.build(Inputs.of(encoding, train), fit)
    module = BinaryModule(network.head, fit)
    best = ModelCheckpoint(scratch / "checkpoints", monitor="val_loss", save_weights_only=True)
    progress = _Progress(len(train))
    trainer = pl.Trainer(
        accelerator=fit.trainer.accelerator,
        devices=fit.trainer.devices,
        num_nodes=fit.trainer.nodes,
        precision=fit.trainer.precision,
        max_epochs=fit.max_epochs,
        deterministic=True,
        callbacks=[EarlyStopping("val_loss", patience=fit.patience), best, progress],
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    encoded = [data.encode(network.encoder, rows) for rows in (train, val)]
    with naming(scratch / "checkpoints"):
        try:
            trainer.fit(module, FeatureData(encoded[0], encoded[1], fit.batch_size))
        except SystemExit as error:  # Lightning makes that of Ctrl-C
            raise KeyboardInterrupt from error
    module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    return Fitted(fitted.calibrate(network.cpu(), val), encoding), progress.epochs


def _repeatable(fit: Fit) -> None:
    """Seed everything, and split sums the same way on every machine."""
    import logging
    import warnings

    pl.seed_everything(fit.seed, verbose=False)
    torch.set_num_threads(fit.trainer.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    # More workers would copy batches between processes; they are slices of mapped memory already.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    # Figures are logged by epoch: that an epoch has few batches hides none.
    warnings.filterwarnings("ignore", ".*number of training batches.*")


class _Progress(pl.Callback):
    """One line per epoch, and its figures."""

    def __init__(self, rows: int) -> None:
        self.rows, self.epochs = rows, list[Epoch]()
        self.started = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        figures = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        self.epochs.append({"epoch": trainer.current_epoch + 1} | figures)
        if trainer.is_global_zero:
            speed = self.rows / (time.perf_counter() - self.started)
            stage.say(
                "fit",
                f"epoch {trainer.current_epoch + 1} of at most {trainer.max_epochs}: "
                f"validation loss {figures['val_loss']:.4f}, AUC {figures['val_auc']:.4f}, "
                f"{speed:,.0f} rows/s",
            )


if __name__ == "__main__":
    stage.main(run)
