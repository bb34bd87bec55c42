"""mlp: embeddings of categories and encoded numbers into a few multilayer perceptrons side by side.

The members differ by their random start alone; the mean of their probabilities is better
calibrated and ranks better than any of them (Lakshminarayanan et al., "Deep Ensembles", 2017).
"""

import torch
from torch import nn

from pipelines.params import Fit
from pipelines.train.models.inputs import CHANNELS, Inputs


def build(inputs: Inputs, fit: Fit) -> nn.Module:
    """fit.members perceptrons on the same inputs."""
    return Members(nn.ModuleList([Perceptron(inputs, fit) for _ in range(fit.members)]))


class Members(nn.Module):
    """Logits of shape (rows, members)."""

    def __init__(self, members: nn.ModuleList) -> None:
        super().__init__()
        self.members = members

    def forward(self, codes: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        return torch.cat([member(codes, encoded) for member in self.members], dim=1)


class Perceptron(nn.Module):
    """Logits of shape (rows, 1)."""

    def __init__(self, inputs: Inputs, fit: Fit) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(
            [
                nn.Embedding(count, min(16, round(1.6 * count**0.4)))
                for count in inputs.cardinalities
            ]
        )
        for embedding in self.embeddings:
            nn.init.normal_(embedding.weight, std=0.3)  # type: ignore[arg-type]
        width = CHANNELS * len(inputs.statistics)
        width += sum(embedding.embedding_dim for embedding in self.embeddings)  # type: ignore[misc]
        layers: list[nn.Module] = []
        for hidden in fit.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(fit.dropout)]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, codes: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        parts = [embed(codes[:, at]) for at, embed in enumerate(self.embeddings)]
        logits: torch.Tensor = self.layers(torch.cat([encoded, *parts], dim=1))
        return logits
