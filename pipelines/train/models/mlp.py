"""mlp: piecewise-linear embeddings of numbers, embeddings of categories, then a multilayer perceptron.

Numbers are encoded piecewise linearly between quantiles of the train rows and each gets a linear embedding of its
own (Gorishniy et al., "On Embeddings for Numerical Features in Tabular Deep Learning", 2022).
"""

import torch
from torch import nn

from pipelines.params import Fit
from pipelines.train.models.inputs import Inputs


def build(inputs: Inputs, fit: Fit) -> nn.Module:
    """The network for these inputs; its logits have one member."""
    return Perceptron(inputs, fit)


class Numbers(nn.Module):
    """(rows, numbers), NaN for missing -> (rows, numbers * width)."""

    low: torch.Tensor
    scale: torch.Tensor

    def __init__(self, inputs: Inputs, width: int) -> None:
        super().__init__()
        edges = torch.from_numpy(inputs.quantiles)
        spans = edges.diff(dim=1)
        self.register_buffer("low", edges[:, :-1].clone())
        # A span of no width (a value so frequent that it holds several quantiles) carries nothing.
        self.register_buffer("scale", torch.where(spans > 0, 1 / spans, 0.0))
        count, bins = spans.shape
        self.weight = nn.Parameter(torch.randn(count, bins, width) / bins**0.5)
        self.bias = nn.Parameter(torch.randn(count, width) * 0.1)
        self.missing = nn.Parameter(torch.randn(count, width) * 0.1)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        missing = torch.isnan(numbers)
        known = torch.where(missing, 0.0, numbers)
        parts = ((known[:, :, None] - self.low) * self.scale).clamp(0, 1)  # (rows, numbers, bins)
        embedded = torch.einsum("rnb,nbw->rnw", parts, self.weight) + self.bias
        return torch.where(missing[:, :, None], self.missing, embedded).flatten(1)


class Perceptron(nn.Module):
    """Codes (rows, categories) and numbers (rows, numbers) -> logits (rows, 1)."""

    def __init__(self, inputs: Inputs, fit: Fit) -> None:
        super().__init__()
        self.numbers = Numbers(inputs, fit.embedding)
        self.categories = nn.ModuleList(
            [nn.Embedding(count, min(16, round(1.6 * count**0.4))) for count in inputs.cardinalities]
        )
        width = len(inputs.quantiles) * fit.embedding + sum(e.embedding_dim for e in self.categories)
        layers: list[nn.Module] = []
        for hidden in fit.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(fit.dropout)]
            width = hidden
        self.head = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, codes: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        parts = [embed(codes[:, at]) for at, embed in enumerate(self.categories)]
        return self.head(torch.cat([self.numbers(numbers), *parts], dim=1))
