"""The models by name: a file each, and its line in this table."""

from collections.abc import Callable

from torch import nn

from pipelines.errors import UserError
from pipelines.params import Fit
from pipelines.train.models import logistic, mlp, tabm
from pipelines.train.models.inputs import Inputs, Network, NumberEncoder

# A builder gives a head: codes (rows, categories), encoded numbers (rows, their width) -> logits
# (rows, members, inputs.width).
HEADS: dict[str, Callable[[Inputs, Fit], nn.Module]] = {
    "logistic": logistic.build,
    "mlp": mlp.build,
    "tabm": tabm.build,
}


def build(inputs: Inputs, fit: Fit) -> Network:
    """The network `fit.model` names, with fresh weights. Raises UserError for an unknown name."""
    if fit.model not in HEADS:
        raise UserError(f"fit.model: {fit.model} is no model; expected one of {', '.join(HEADS)}")
    return Network(NumberEncoder(inputs), HEADS[fit.model](inputs, fit))
