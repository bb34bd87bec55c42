"""pruning: whole hidden units go from a head, those that the loss would miss least.

A unit is a row of one layer and a column of the next, so the exported network is smaller, on every
runtime. What a unit is worth: the square of the change of a row's loss that its absence makes, to
first order (its output times the loss's gradient there), and of that the mean over rows (Molchanov
et al., "Importance Estimation for Neural Network Pruning", 2019, with a gate at each unit).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipelines import tables
from pipelines.errors import UserError
from pipelines.params import Fit
from pipelines.train import models, objectives
from pipelines.train.data import BATCH, Encoding, Rows
from pipelines.train.models import Model
from pipelines.train.models.inputs import Inputs, Network
from pipelines.train.objectives import Objective

SAMPLE = 8192  # train rows that tell what a unit is worth, evenly spaced

# Of the learning rate: what was pruned is not far from where it should be.
COOLER = 0.25


@dataclass(frozen=True)
class Units:
    """The units of hidden layer `depth`, outputs of the head's module `layer` along its last axis,
    and every tensor of the head with an entry for each of them, with its axis.
    """

    depth: int
    layer: str
    held: list[tuple[str, int]]


def _mlp(fit: Fit) -> list[Units]:
    """Every member has layers of its own: a ReLU and a dropout stand between two."""
    found = []
    for member in range(fit.members):
        for depth in range(len(fit.hidden)):
            layer, next_ = (f"members.{member}.layers.{3 * at}" for at in (depth, depth + 1))
            held = [(f"{layer}.weight", 0), (f"{layer}.bias", 0), (f"{next_}.weight", 1)]
            found.append(Units(depth, layer, held))
    return found


def _tabm(fit: Fit) -> list[Units]:
    """Members share the units, each with scales of its own; after the last come the outputs."""
    found = []
    for depth in range(len(fit.hidden)):
        layer, next_ = f"layers.{depth}", f"layers.{depth + 1}"
        held = [(f"{layer}.weight", 0), (f"{layer}.bias", 1), (f"{layer}.after", 1)]
        if depth + 1 < len(fit.hidden):
            held += [(f"{next_}.weight", 1), (f"{next_}.before", 1)]
        else:
            held += [("weight", 2)]
        found.append(Units(depth, layer, held))
    return found


UNITS: dict[str, Callable[[Fit], list[Units]]] = {"mlp": _mlp, "tabm": _tabm, "blend": _mlp}


def pruned(
    model: Model, encoding: Encoding, fit: Fit, train: Rows, share: float
) -> tuple[Model, Fit]:
    """A model without `share` of the units of every hidden layer, rounded, one left at least; and
    the `fit` that builds one of that shape.

    Raises UserError where there are no hidden units.
    """
    network, _ = models.parts(model)
    if network is None or fit.model not in UNITS or not fit.hidden:
        raise UserError(
            f"package.forms: pruned, but {fit.model} with fit.hidden {fit.hidden} has no unit to "
            f"prune; expected one of {', '.join(UNITS)}, with hidden units"
        )
    kept = [max(1, round(width * (1 - share))) for width in fit.hidden]
    units = UNITS[fit.model](fit)
    state = model.state_dict()
    head = next(name for name, part in model.named_modules() if part is network.head)
    objective = objectives.of(encoding.target, train.arrays[2])
    for one, worth in zip(units, worths(network, objective, units, train), strict=True):
        best = torch.argsort(worth, descending=True, stable=True)[: kept[one.depth]]
        for name, axis in one.held:
            weights = state[f"{head}.{name}"]
            state[f"{head}.{name}"] = weights.index_select(axis, best.sort().values)
    smaller = fit.model_copy(update={"hidden": kept})
    made = models.build(Inputs.blank(encoding), smaller)
    made.load_state_dict(state)
    return made, smaller


def shorter(fit: Fit, epochs: int) -> Fit:
    """How the network that is left is trained."""
    cooler = COOLER * fit.learning_rate
    return fit.model_copy(update={"max_epochs": epochs, "learning_rate": cooler})


def worths(
    network: Network, objective: Objective, units: Sequence[Units], train: Rows
) -> list[torch.Tensor]:
    """What each of the units is worth, shape (units,), by SAMPLE of the train rows."""
    network.eval()
    every = tables.spaced(len(train), SAMPLE)
    outputs: dict[str, torch.Tensor] = {}
    hooks = [
        network.head.get_submodule(one.layer).register_forward_hook(
            lambda _, __, output, name=one.layer: outputs.update({name: output})
        )
        for one in units
    ]
    sums = [torch.zeros(()) for _ in units]
    for at in range(0, len(every), BATCH):
        codes, numbers, labels = train.take(every[at : at + BATCH])
        logits = network(codes, numbers)
        loss = objective.losses(logits, objective.known(labels))
        layers = [outputs[one.layer] for one in units]
        # Before the ReLU: where it lets nothing through, the gradient is zero.
        for to, (output, gradient) in enumerate(
            zip(layers, torch.autograd.grad(loss, layers), strict=True)
        ):
            change = (output * gradient).detach()
            # Members that share a unit lose it together.
            by_row = change.reshape(len(labels), -1, change.shape[-1]).sum(dim=1)
            sums[to] = sums[to] + (by_row**2).sum(dim=0)
    for hook in hooks:
        hook.remove()
    return [one / len(every) for one in sums]
