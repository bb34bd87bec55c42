"""A fitted model: its calibrated network, the encoding of its inputs, and the folder that holds
both.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines import stage
from pipelines.params import Fit
from pipelines.train import models
from pipelines.train.data import Encoding, Rows
from pipelines.train.models.inputs import Inputs, Network

FOLDER = Path("models/fit")
WEIGHTS, DESCRIPTION, CURVES = "weights.safetensors", "fit.json", "curves.json"


def probability(logits: torch.Tensor) -> torch.Tensor:
    """The mean probability of the members: logits (rows, members) -> (rows,)."""
    return torch.sigmoid(logits).mean(dim=1)


class Calibrated(nn.Module):
    """A network with Platt's scaling (1999) of its log odds: what a bundle computes, (rows,) in
    [0, 1].
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, codes: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.scale * self.log_odds(codes, numbers) + self.shift)

    def log_odds(self, codes: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Before calibration, shape (rows,)."""
        mean = probability(self.network(codes, numbers)).clamp(1e-6, 1 - 1e-6)
        return torch.log(mean) - torch.log1p(-mean)


@dataclass(frozen=True)
class Fitted:
    """A calibrated network and the encoding of its inputs."""

    network: Calibrated
    encoding: Encoding

    @torch.inference_mode()
    def predict(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Calibrated probability, shape (rows,)."""
        return torch.cat(
            [self.network(codes, numbers) for codes, numbers, _ in rows.batches()]
        ).numpy()


@torch.inference_mode()
def calibrate(network: Network, rows: Rows) -> Calibrated:
    """Fit scale and shift of the log odds on `rows` by Newton's method on the log loss."""
    calibrated = Calibrated(network.eval())
    odds = torch.cat([calibrated.log_odds(codes, numbers) for codes, numbers, _ in rows.batches()])
    x = np.stack([odds.double().numpy(), np.ones(len(rows))], axis=1)
    y = rows.arrays[2].astype(np.float64)
    weights = np.array([1.0, 0.0])
    for _ in range(20):
        p = 1 / (1 + np.exp(-x @ weights))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-6 * np.eye(2)
        weights = weights - np.linalg.solve(hessian, x.T @ (p - y))
    calibrated.scale.fill_(float(weights[0]))
    calibrated.shift.fill_(float(weights[1]))
    return calibrated


def save(fitted: Fitted, fit: Fit, folder: Path) -> None:
    """Write weights without pickle, and what rebuilds the network around them."""
    save_file(fitted.network.state_dict(), folder / WEIGHTS)
    description = {
        "fit": fit.model_dump(),
        "vocabulary": fitted.encoding.vocabulary,
        "numbers": fitted.encoding.numbers,
    }
    # The order of the columns counts: not sorted.
    stage.write_json(folder / DESCRIPTION, description | {"columns": fitted.encoding.columns})


def load(folder: Path = FOLDER) -> Fitted:
    """Read what `save` wrote."""
    description: dict[str, Any] = stage.read_json(folder / DESCRIPTION)
    vocabulary, numbers = description["vocabulary"], description["numbers"]
    encoding = Encoding(
        {name: vocabulary[name] for name in description["columns"] if name in vocabulary}, numbers
    )
    fit = Fit.model_validate(description["fit"])
    weights = load_file(folder / WEIGHTS)
    network = Calibrated(models.build(Inputs.blank(encoding), fit))
    network.load_state_dict(weights)
    return Fitted(network.eval(), encoding)
