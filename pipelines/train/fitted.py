"""A fitted model: its calibrated network, the encoding of its inputs, and the folder that holds
both.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parsed
from safetensors.torch import save as serialised
from torch import nn

from pipelines import metrics, stage
from pipelines.errors import intact
from pipelines.params import Fit, Target
from pipelines.train import models, objectives
from pipelines.train.data import Encoding, Rows
from pipelines.train.models import Model
from pipelines.train.models.inputs import Inputs
from pipelines.train.objectives import Floats, Objective

FOLDER = Path("models/fit")
WEIGHTS, DESCRIPTION, CURVES = "weights.safetensors", "fit.json", "curves.json"


class Calibrated(nn.Module):
    """A model whose score is scaled and shifted as its objective has it: what a bundle computes,
    a prediction as in pipelines/metrics.py.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: Model, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        shape = () if objective.width == 1 else (objective.width,)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(shape))

    def forward(self, codes: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        score = self.objective.score(self.objective.mean(self.model(codes, numbers)))
        return self.objective.answer(self.scale * score + self.shift)


@dataclass(frozen=True)
class Fitted:
    """A calibrated network and the encoding of its inputs."""

    network: Calibrated
    encoding: Encoding

    @torch.inference_mode()
    def predict(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Calibrated predictions."""
        return torch.cat(
            [self.network(codes, numbers) for codes, numbers, _ in rows.batches()]
        ).numpy()


@torch.inference_mode()
def said(model: Model, objective: Objective, rows: Rows) -> torch.Tensor:
    """What the members say in the mean of every row, before calibration."""
    model.eval()
    return torch.cat(
        [objective.mean(model(codes, numbers)) for codes, numbers, _ in rows.batches()]
    )


def judged(
    mean: torch.Tensor, labels: Floats, task: metrics.Task, objective: Objective
) -> dict[str, float]:
    """The figures that are told of every epoch, of what was `said`."""
    known = objective.known(torch.from_numpy(labels)).numpy()
    found = metrics.point(known, mean.numpy(), task.name)
    return {
        f"val_{name}": found[figure] for name, figure in (("loss", task.loss), (task.told,) * 2)
    }


def calibrate(model: Model, objective: Objective, mean: torch.Tensor, labels: Floats) -> Calibrated:
    """Fit scale and shift of the score to the labels of rows of which the model said `mean`."""
    calibrated = Calibrated(model.eval(), objective)
    score = objective.score(mean).double().numpy()
    # As standard scores, which are as easy to fit however near to each other they lie. What
    # differs by less than a float32 can say is one score.
    centre = score.mean(axis=0)
    spread = max(float((score - centre).std()), 1e-6)
    scale, shift = objective.calibrate((score - centre) / spread, labels)
    scale = scale / spread
    calibrated.scale.fill_(scale)
    calibrated.shift.copy_(torch.as_tensor(shift - scale * centre))
    return calibrated


def save(fitted: Fitted, fit: Fit, folder: Path) -> None:
    """Write weights without pickle, and what rebuilds the network around them."""
    (folder / WEIGHTS).write_bytes(serialised(fitted.network.state_dict()))
    description = {
        "fit": fit.model_dump(),
        "vocabulary": fitted.encoding.vocabulary,
        "numbers": fitted.encoding.numbers,
        "target": fitted.encoding.target.model_dump(),
    }
    # The order of the columns counts: not sorted.
    stage.write_json(folder / DESCRIPTION, description | {"columns": fitted.encoding.columns})


def load(folder: Path = FOLDER) -> Fitted:
    """Read what `save` wrote. Raises UserError where a file is missing or damaged."""
    description: dict[str, Any] = stage.read_json(folder / DESCRIPTION)
    vocabulary, numbers = description["vocabulary"], description["numbers"]
    encoding = Encoding(
        {name: vocabulary[name] for name in description["columns"] if name in vocabulary},
        numbers,
        Target.model_validate(description["target"]),
    )
    fit = Fit.model_validate(description["fit"])
    network = Calibrated(models.build(Inputs.blank(encoding), fit), objectives.of(encoding.target))
    # torch tells of another network's weights by a RuntimeError.
    with intact(folder / WEIGHTS, "safetensors file", SafetensorError, RuntimeError):
        network.load_state_dict(parsed((folder / WEIGHTS).read_bytes()))
    return Fitted(network.eval(), encoding)
