"""The models by name: a file each, and its line in this table.

A model maps codes (rows, categories) and numbers (rows, numbers), NaN for missing, to logits (rows,
members, width). Of what it consists, a network learns by gradient and trees are grown.
"""

from collections.abc import Callable

from pipelines.errors import UserError
from pipelines.params import Fit
from pipelines.train.models import blend, boosting, logistic, mlp, tabm
from pipelines.train.models.blend import Blend
from pipelines.train.models.boosting import Trees
from pipelines.train.models.inputs import Inputs, Network

Model = Network | Trees | Blend

MODELS: dict[str, Callable[[Inputs, Fit], Model]] = {
    "logistic": logistic.build,
    "mlp": mlp.build,
    "tabm": tabm.build,
    "boosting": boosting.build,
    "blend": blend.build,
}


# What each makes of the keys of `fit` that can be tuned: with others it is the same model.
_LEARNED = {"batch_size", "max_epochs", "patience", "learning_rate", "weight_decay"}
_LAYERED = _LEARNED | {"dropout", "hidden", "members"}
USED = {
    "logistic": _LEARNED,
    "mlp": _LAYERED,
    "tabm": _LAYERED,
    "boosting": {"boosting"},
    "blend": _LAYERED | {"boosting"},
}


def check(name: str) -> None:
    """Raises UserError for a name that is none of a model."""
    if name not in MODELS:
        raise UserError(f"fit.model: {name} is no model; expected one of {', '.join(MODELS)}")


def uses(name: str, key: str) -> bool:
    """Whether the model depends on a key of `fit`, such as boosting.leaves."""
    return key.partition(".")[0] in USED[name]


def build(inputs: Inputs, fit: Fit) -> Model:
    """The model `fit.model` names, with fresh weights. Raises UserError for an unknown name."""
    check(fit.model)
    return MODELS[fit.model](inputs, fit)


def parts(model: Model) -> tuple[Network | None, Trees | None]:
    """Its network and its trees."""
    match model:
        case Blend():
            return model.network, model.trees
        case Trees():
            return None, model
        case Network():
            return model, None
