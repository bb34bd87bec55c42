"""tabm: many multilayer perceptrons that share their weights but for scales of their own.

Each member multiplies what goes into a shared layer and what comes out of it by vectors of its own
(Wen et al., "BatchEnsemble", 2020), so that fit.members of them have few more weights than one. It
starts from random signs, and has a last layer to itself (Gorishniy et al., "TabM", 2024).
"""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F

from pipelines.params import Fit
from pipelines.train.models.inputs import Dropout, Embeddings, Inputs, Network


def build(inputs: Inputs, fit: Fit) -> Network:
    """fit.members members of fit.hidden units."""
    return Network(inputs, Tabm(inputs, fit))


class Tabm(nn.Module):
    """Logits of shape (rows, members, width)."""

    def __init__(self, inputs: Inputs, fit: Fit) -> None:
        super().__init__()
        self.embeddings = Embeddings(inputs)
        widths = [self.embeddings.width, *fit.hidden]
        self.layers = nn.ModuleList(
            Shared(*layer, fit.members) for layer in itertools.pairwise(widths)
        )
        signs = torch.randint(2, (fit.members, widths[0])) * 2.0 - 1.0
        self.signs = nn.Parameter(signs)
        self.dropout = Dropout(fit.dropout)
        self.weight = nn.Parameter(_uniform(fit.members, inputs.width, widths[-1], fan=widths[-1]))
        self.bias = nn.Parameter(_uniform(fit.members, inputs.width, fan=widths[-1]))

    def forward(self, codes: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(codes, encoded)[:, None, :] * self.signs
        for layer in self.layers:
            hidden = self.dropout(F.relu(layer(hidden)))
        logits: torch.Tensor = (hidden[:, :, None, :] * self.weight).sum(dim=3) + self.bias
        return logits


class Shared(nn.Module):
    """A linear layer of all members: (rows, members, inputs) -> (rows, members, outputs)."""

    def __init__(self, inputs: int, outputs: int, members: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_uniform(outputs, inputs, fan=inputs))
        self.bias = nn.Parameter(_uniform(members, outputs, fan=inputs))
        self.before = nn.Parameter(torch.ones(members, inputs))
        self.after = nn.Parameter(torch.ones(members, outputs))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden * self.before, self.weight) * self.after + self.bias


def _uniform(*shape: int, fan: int) -> torch.Tensor:
    """As torch begins a linear layer of so many inputs."""
    bound = 1 / math.sqrt(fan)
    return torch.empty(shape).uniform_(-bound, bound)
