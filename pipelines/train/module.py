"""Lightning: the loss, optimiser and schedule around any head of the model table, and its batches.

A head maps codes (rows, categories) and encoded numbers (rows, width) to logits as
pipelines/train/objectives.py has them.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from pipelines import metrics
from pipelines.params import Fit
from pipelines.train.data import BATCH, Batch, Rows
from pipelines.train.objectives import Objective


class TaskModule(pl.LightningModule):
    """The task's loss of every member."""

    def __init__(
        self, head: nn.Module, task: metrics.Task, objective: Objective, fit: Fit, steps: int
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.task, self.objective = task, objective
        # Lightning's own estimate of the steps would read the data before a checkpoint is loaded,
        # and the place in the epoch would be lost.
        self.head, self.options, self.steps = head, fit, steps
        # Of the epoch so far: the sum of the rows' losses, and their number.
        self.lost, self.rows = torch.zeros((), dtype=torch.float64), 0
        self._seen: list[torch.Tensor] = []

    def training_step(self, batch: Batch, _: int) -> None:
        codes, numbers, labels = batch
        logits = self.head(codes, numbers)
        losses = self.objective.losses(logits, self.objective.known(labels))
        members = logits.shape[1]
        self.lost = self.lost + losses.detach() / members
        self.rows += len(labels)
        # DDP takes the mean over processes, whose parts of the last batch differ by a row.
        batches = cast(Batches, self.trainer.train_dataloader)
        mean: torch.Tensor = losses / (members * batches.given / self.trainer.world_size)
        # By hand: in a small network's step Lightning's closure shows.
        optimizer = cast(LightningOptimizer, self.optimizers())
        schedule = cast(OneCycleLR, self.lr_schedulers())
        optimizer.zero_grad()
        self.manual_backward(mean)
        optimizer.step()
        schedule.step()

    def validation_step(self, batch: Batch, _: int) -> None:
        codes, numbers, labels = batch
        predicted = self.objective.mean(self.head(codes, numbers))
        self._seen.append(torch.column_stack([self.objective.known(labels), predicted]))

    def on_fit_start(self) -> None:
        if self.global_rank:  # or all would drop out the same units
            torch.manual_seed(self.options.seed + self.global_rank)

    def on_validation_epoch_end(self) -> None:
        # NumPy has no bfloat16, which a mixed precision gives.
        seen = torch.cat(self._seen).float().cpu().numpy()
        self._seen.clear()
        columns = np.concatenate(self._gathered(seen))
        labels, predicted = columns[:, 0], columns[:, 1:]
        if self.objective.width == 1:
            predicted = predicted[:, 0]
        figures = metrics.point(labels, predicted, self.task.name)
        # Equal in all processes already; Lightning warns where it is not told to make them so.
        self.log("val_loss", figures[self.task.loss], sync_dist=True)
        self.log(f"val_{self.task.told}", figures[self.task.told], sync_dist=True)
        # Here, since callbacks read it before the hook for the end of an epoch.
        mine = np.array([float(self.lost), self.rows])
        losses, rows = np.sum(self._gathered(mine), axis=0)
        self.log("train_loss", losses / rows, sync_dist=True)
        self.lost, self.rows = torch.zeros_like(self.lost), 0

    def _gathered(self, mine: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """The arrays of all processes, of any lengths."""
        if self.trainer.world_size == 1:
            return [mine]
        all_ = [mine] * self.trainer.world_size
        torch.distributed.all_gather_object(all_, mine)
        return all_

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, weight decay on matrices only, one cycle of the learning rate (Smith & Topin
        2019).
        """
        embeddings = {
            id(p)
            for m in self.head.modules()
            if isinstance(m, nn.Embedding)
            for p in m.parameters()
        }
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, p in self.head.named_parameters():
            # Of members that share their layers biases are matrices too.
            matrix = p.ndim >= 2 and not name.endswith("bias") and id(p) not in embeddings
            (decayed if matrix else plain).append(p)
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self.options.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=self.options.learning_rate,
        )
        schedule = OneCycleLR(
            optimizer,
            self.options.learning_rate,
            total_steps=self.steps,
            # A rise of one step ends where it begins, and its length of none would divide.
            pct_start=0.2 if self.steps > 5 else 0.0,
            cycle_momentum=False,
            final_div_factor=100,
        )
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class FeatureData(pl.LightningDataModule):
    """Train and validation batches from memory-mapped arrays."""

    def __init__(self, train: Rows, val: Rows, fit: Fit) -> None:
        super().__init__()
        self.train, self.val, self.fit = train, val, fit

    def train_dataloader(self) -> "Batches":
        return Batches(self.train, self.fit.batch_size, self._part, self.fit.seed)

    def val_dataloader(self) -> "Batches":
        return Batches(self.val, BATCH, self._part)

    @property
    def _part(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


class Batches:
    """Batches of rows in order, or with a seed shuffled anew in each epoch; of several processes
    each takes its part (which, of how many) of every batch. Its state is its place. A thread takes
    the next batch, whose rows lie anywhere on the disk, while the one before is learned.
    """

    def __init__(
        self, rows: Rows, size: int, part: tuple[int, int] = (0, 1), seed: int | None = None
    ) -> None:
        self.rows, self.size, self.seed = rows, size, seed
        self.which, self.parts = part
        self.epoch, self.place = 0, 0

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.size)

    @property
    def given(self) -> int:
        """The rows of the batch that came last, all parts together."""
        return min(self.size, len(self.rows) - (self.place - 1) * self.size)

    def __iter__(self) -> Iterator[Batch]:
        # Who takes all batches need not ask for one more: an epoch ends where the next begins.
        if self.place == len(self):
            self.epoch, self.place = self.epoch + 1, 0
        order, ahead = self._order(), ThreadPoolExecutor(1)
        coming = ahead.submit(self._take, order, self.place)
        while self.place < len(self):
            batch = coming.result()
            self.place += 1
            if self.place < len(self):
                coming = ahead.submit(self._take, order, self.place)
            else:
                ahead.shutdown()
            yield batch

    def _take(self, order: npt.NDArray[np.int64], place: int) -> Batch:
        batch = order[place * self.size : (place + 1) * self.size]
        return self.rows.take(batch[self.which :: self.parts])

    def _order(self) -> npt.NDArray[np.int64]:
        if self.seed is None:
            return np.arange(len(self.rows))
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.rows))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]
