"""Lightning: the loss, optimiser and schedule around any head of the model table, and its batches.

A head maps codes (rows, categories) and encoded numbers (rows, width) to logits (rows, members).
"""

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pipelines import metrics
from pipelines.params import Fit
from pipelines.train.data import BATCH, Batch, Rows
from pipelines.train.fitted import probability


class BinaryModule(pl.LightningModule):
    """Binary cross-entropy of every member; the prediction is the members' mean probability."""

    def __init__(self, head: nn.Module, fit: Fit) -> None:
        super().__init__()
        self.head, self.options = head, fit
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        codes, numbers, labels = batch
        logits = self.head(codes, numbers)
        loss = F.binary_cross_entropy_with_logits(logits, labels[:, None].expand_as(logits))
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        codes, numbers, labels = batch
        self._seen.append((probability(self.head(codes, numbers)), labels))

    def on_validation_epoch_end(self) -> None:
        predicted, labels = (torch.cat(part) for part in zip(*self._seen, strict=True))
        self._seen.clear()
        # NumPy has no bfloat16, which a mixed precision gives.
        figures = metrics.point(labels.cpu().numpy().astype(int), predicted.float().cpu().numpy())
        # Each device sees its own rows; the mean over devices is what stops training.
        self.log("val_loss", figures["log_loss"], sync_dist=True)
        self.log("val_auc", figures["auc"], sync_dist=True)

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
        parameters = list(self.head.parameters())
        decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
        plain = [p for p in parameters if p.ndim < 2 or id(p) in embeddings]
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self.options.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=self.options.learning_rate,
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            self.options.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=0.2,
            cycle_momentum=False,
            final_div_factor=100,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class FeatureData(pl.LightningDataModule):
    """Train and validation batches from memory-mapped arrays."""

    def __init__(self, train: Rows, val: Rows, batch_size: int) -> None:
        super().__init__()
        self.train, self.val, self.batch_size = train, val, batch_size

    def train_dataloader(self) -> DataLoader[Batch]:
        return _loader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return _loader(self.val, BATCH, shuffle=False)


def _loader(rows: Rows, size: int, *, shuffle: bool) -> DataLoader[Batch]:
    # Rows gives whole batches: there is nothing to collate.
    return DataLoader(rows, batch_size=size, shuffle=shuffle, collate_fn=lambda batch: batch)
