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


def build(inputs: Inputs, fit: Fit) -> Model:
    """The model `fit.model` names, with fresh weights. Raises UserError for an unknown name."""
    if fit.model not in MODELS:
        raise UserError(f"fit.model: {fit.model} is no model; expected one of {', '.join(MODELS)}")
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
