"""What every network shares: how numbers are encoded, and the frame around a head of its own."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from pipelines.train import objectives
from pipelines.train.data import Encoding, Rows

SAMPLE = 100_000  # rows from which statistics are read, evenly spaced
POINTS = 65  # quantiles of a number: enough for its shape, few enough for one matrix of comparisons
OFTEN = 0.01  # a number missing more seldom than this has no flag: too few rows to learn its weight
STEP = 1e6  # the slope of a step
CHANNELS = 3  # encoded values of one number


@dataclass(frozen=True)
class Inputs:
    """cardinalities: codes per category, the one for missing included. width: logits of a member.

    statistics: shape (numbers, POINTS + 3): quantiles of the known values, their mean, their
    standard deviation, and the share of rows that miss the number.
    """

    cardinalities: list[int]
    statistics: npt.NDArray[np.float32]
    width: int

    @classmethod
    def of(cls, encoding: Encoding, train: Rows) -> "Inputs":
        """Read from the train rows. A number that is never known counts as always zero."""
        numbers = train.arrays[1]
        sample = np.asarray(numbers[:: max(1, len(numbers) // SAMPLE)], dtype=np.float64)
        lines = [_statistics(column) for column in sample.T]
        statistics = np.array(lines, np.float32).reshape(-1, POINTS + 3)
        return cls(_cardinalities(encoding), statistics, _width(encoding))

    @classmethod
    def blank(cls, encoding: Encoding) -> "Inputs":
        """The right shapes, to be filled from saved weights."""
        shape = (len(encoding.numbers), POINTS + 3)
        return cls(_cardinalities(encoding), np.zeros(shape, np.float32), _width(encoding))


def _cardinalities(encoding: Encoding) -> list[int]:
    return [len(values) + 1 for values in encoding.vocabulary.values()]


def _width(encoding: Encoding) -> int:
    return objectives.of(encoding.target).width


def _statistics(column: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    known = column[~np.isnan(column)]
    missing = 1 - len(known) / max(1, len(column))
    if len(known) == 0:
        known = np.zeros(1)
    spread = known.std() or 1.0
    return np.append(np.quantile(known, np.linspace(0, 1, POINTS)), [known.mean(), spread, missing])


class NumberEncoder(nn.Module):
    """(rows, numbers), NaN for missing -> (rows, numbers * CHANNELS), nothing learned by gradient.

    Each number becomes its rank among the train rows on a logit scale (ties in the middle), its
    standard score clipped at four, and a flag where it is missing; a missing number is the median
    and the mean.
    """

    edges: torch.Tensor
    moments: torch.Tensor

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        statistics = torch.from_numpy(inputs.statistics)
        self.register_buffer("edges", statistics[:, :POINTS].clone())
        self.register_buffer("moments", statistics[:, POINTS:].clone())

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        missing = torch.isnan(numbers)
        known = torch.where(missing, 0.0, numbers)
        rank = self._rank(known).clamp(0.001, 0.999)
        mean, spread, share = self.moments.unbind(dim=1)
        # 1.8 brings the logit of a rank to about unit variance.
        logit = torch.where(missing, 0.0, (torch.log(rank) - torch.log1p(-rank)) / 1.8)
        score = torch.where(missing, 0.0, ((known - mean) / spread).clamp(-4, 4))
        flag = missing.float() * (share > OFTEN).float()
        return torch.cat([logit, score, flag], dim=1)

    def _rank(self, known: torch.Tensor) -> torch.Tensor:
        """The share of train rows below, linear between quantiles.

        A span of no width, which a frequent value leaves, is a step with its middle at that value.
        """
        low, span = self.edges[:, :-1], self.edges[:, 1:] - self.edges[:, :-1]
        flat = (span == 0).float()
        steepness = torch.where(span == 0, STEP, 1 / torch.where(span == 0, 1.0, span))
        above = known[:, :, None] - low
        return torch.addcmul(flat / 2, above, steepness).clamp(0, 1).mean(dim=2)


class Embeddings(nn.ModuleList):
    """codes (rows, categories), encoded numbers (rows, numbers * CHANNELS) -> (rows, width): the
    numbers, and beside them a learned vector for the value of every category.
    """

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(
            nn.Embedding(count, min(16, round(1.6 * count**0.4))) for count in inputs.cardinalities
        )
        for embedding in self:
            nn.init.normal_(embedding.weight, std=0.3)  # type: ignore[arg-type]
        self.width = CHANNELS * len(inputs.statistics)
        self.width += sum(embedding.embedding_dim for embedding in self)  # type: ignore[misc]

    def forward(self, codes: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        embedded = [embedding(codes[:, at]) for at, embedding in enumerate(self)]
        return torch.cat([encoded, *embedded], dim=1)


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose mask costs a CPU a quarter: torch draws a float for
    each unit, by one thread, here it is a byte. The share is rounded to 1/256.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.gone = min(round(256 * share), 255)

    def forward(self, units: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.gone):
            return units
        if units.device.type != "cpu":
            return F.dropout(units, self.share)
        words = torch.empty(math.ceil(units.numel() / 8), dtype=torch.int64)
        drawn = words.random_(-(2**63), None).view(torch.uint8)[: units.numel()]
        kept = (drawn >= self.gone).to(units.dtype).mul_(256 / (256 - self.gone))
        return units * kept.view(units.shape)


class Network(nn.Module):
    """codes (rows, categories), numbers (rows, numbers) -> logits (rows, members, width).

    The head maps codes and encoded numbers to logits. Training encodes every row once and feeds
    the head.
    """

    def __init__(self, inputs: Inputs, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = NumberEncoder(inputs), head

    def forward(self, codes: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(codes, self.encoder(numbers))
        return logits
