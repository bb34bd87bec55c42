"""mlp: embeddings of categories and encoded numbers into a few multilayer perceptrons side by side.

The members differ by their random start alone; the mean of their probabilities is better
calibrated and ranks better than any of them (Lakshminarayanan et al., "Deep Ensembles", 2017).
"""

import torch
from torch import nn

from pipelines.params import Fit
from pipelines.train.models.inputs import Dropout, Embeddings, Inputs, Network


def build(inputs: Inputs, fit: Fit) -> Network:
    """fit.members perceptrons on the same inputs."""
    members = nn.ModuleList([Perceptron(inputs, fit) for _ in range(fit.members)])
    return Network(inputs, Members(members))


class Members(nn.Module):
    """Logits of shape (rows, members, width)."""

    def __init__(self, members: nn.ModuleList) -> None:
        super().__init__()
        self.members = members

    def forward(self, codes: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        return torch.stack([member(codes, encoded) for member in self.members], dim=1)


class Perceptron(nn.Module):
    """Logits of shape (rows, width)."""

    def __init__(self, inputs: Inputs, fit: Fit) -> None:
        super().__init__()
        self.embeddings = Embeddings(inputs)
        width = self.embeddings.width
        layers: list[nn.Module] = []
        for hidden in fit.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(), Dropout(fit.dropout)]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, inputs.width))

    def forward(self, codes: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(self.embeddings(codes, encoded))
        return logits
