"""The models by name: a file each, and its line in this table."""

from collections.abc import Callable

from torch import nn

from pipelines.params import Fit
from pipelines.train.models import mlp
from pipelines.train.models.inputs import Inputs

# A builder gives a network: codes (rows, categories), numbers (rows, numbers) -> logits (rows, members).
MODELS: dict[str, Callable[[Inputs, Fit], nn.Module]] = {"mlp": mlp.build}
