"""blend: the multilayer perceptrons of mlp and the trees of boosting, each half of the prediction.

They err on other rows, the ones by drawing too smooth a line and the others by drawing it in steps:
the mean of both is better than either (docs/benchmarks.md).
"""

import torch
from torch import nn

from pipelines.params import Fit
from pipelines.train.models import boosting, mlp
from pipelines.train.models.boosting import Trees
from pipelines.train.models.inputs import Inputs, Network


def build(inputs: Inputs, fit: Fit) -> "Blend":
    """As mlp and boosting have it."""
    return Blend(mlp.build(inputs, fit), boosting.build(inputs, fit))


class Blend(nn.Module):
    """codes (rows, categories), numbers (rows, numbers) -> logits (rows, 2 * members, width)."""

    def __init__(self, network: Network, trees: Trees) -> None:
        super().__init__()
        self.network, self.trees = network, trees

    def forward(self, codes: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        learned = self.network(codes, numbers)
        grown = self.trees(codes, numbers).expand_as(learned)
        return torch.cat([learned, grown], dim=1)
