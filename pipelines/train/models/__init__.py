"""The models by name: a file each, and its line in this table.

A model maps codes (rows, categories) and numbers (rows, numbers), NaN for missing, to logits (rows,
members, width). Of what it consists, a network learns by gradient and trees are grown.
"""

from collections.abc import Callable
from typing import NamedTuple

from pipelines.errors import UserError
from pipelines.params import Fit
from pipelines.train.models import blend, boosting, logistic, mlp, tabm
from pipelines.train.models.blend import Blend
from pipelines.train.models.boosting import Trees
from pipelines.train.models.inputs import Inputs, Network

Model = Network | Trees | Blend


class Kind(NamedTuple):
    """How a model is built, and the keys of `fit` on which it depends, of those that are tuned."""

    build: Callable[[Inputs, Fit], Model]
    keys: set[str]


_LEARNED = {"batch_size", "max_epochs", "patience", "learning_rate", "weight_decay"}
_LAYERED = _LEARNED | {"dropout", "hidden", "members"}
MODELS = {
    "logistic": Kind(logistic.build, _LEARNED),
    "mlp": Kind(mlp.build, _LAYERED),
    "tabm": Kind(tabm.build, _LAYERED),
    "boosting": Kind(boosting.build, {"boosting"}),
    "blend": Kind(blend.build, _LAYERED | {"boosting"}),
}


def check(name: str) -> None:
    """Raises UserError for a name that is none of a model."""
    if name not in MODELS:
        raise UserError(f"fit.model: {name} is no model; expected one of {', '.join(MODELS)}")


def uses(name: str, key: str) -> bool:
    """Whether the model depends on a key of `fit`, such as boosting.leaves."""
    return key.partition(".")[0] in MODELS[name].keys


def build(inputs: Inputs, fit: Fit) -> Model:
    """The model `fit.model` names, with fresh weights. Raises UserError for an unknown name."""
    check(fit.model)
    return MODELS[fit.model].build(inputs, fit)


def parts(model: Model) -> tuple[Network | None, Trees | None]:
    """Its network and its trees."""
    match model:
        case Blend():
            return model.network, model.trees
        case Trees():
            return None, model
        case Network():
            return model, None
