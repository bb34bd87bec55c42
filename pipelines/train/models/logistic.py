"""logistic: a weight for every encoded number and every value of a category; one member.

What the other models have to be worth their cost against.
"""

import torch
from torch import nn

from pipelines.params import Fit
from pipelines.train.models.inputs import CHANNELS, Inputs, Network


def build(inputs: Inputs, fit: Fit) -> Network:
    """fit.hidden, fit.members and fit.dropout say nothing here."""
    return Network(inputs, Logistic(inputs))


class Logistic(nn.Module):
    """Logits of shape (rows, 1, width)."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.numbers = nn.Linear(CHANNELS * len(inputs.statistics), inputs.width)
        self.values = nn.ModuleList(
            [nn.Embedding(count, inputs.width) for count in inputs.cardinalities]
        )
        for values in self.values:
            nn.init.zeros_(values.weight)  # type: ignore[arg-type]

    def forward(self, codes: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.numbers(encoded)
        for at, values in enumerate(self.values):
            logits = logits + values(codes[:, at])
        return logits[:, None, :]
