"""Pruning takes away what the loss misses least, and leaves a network that is smaller."""

import numpy as np
import pytest
import torch
from world import Checkout

from pipelines.errors import UserError
from pipelines.params import Fit
from pipelines.train import data, models, objectives, pruning
from pipelines.train.data import Encoding, Rows
from pipelines.train.models.inputs import Inputs, Network

SHARE = 0.5


@pytest.fixture
def learned(features: Checkout) -> tuple[Encoding, Rows]:
    dataset = features.params().dataset
    names = dataset.features
    encoding = data.learn(names.categories, names.numbers, dataset.target)
    return encoding, data.materialise(encoding, "train", features.folder / "rows")


def _network(learned: tuple[Encoding, Rows], fit: Fit) -> Network:
    torch.manual_seed(0)
    return models.build(Inputs.of(*learned), fit).eval()


def _answers(network: Network, rows: Rows) -> torch.Tensor:
    codes, numbers, _ = rows.take(np.arange(500))
    with torch.inference_mode():
        return network.eval()(codes, numbers)


@pytest.mark.parametrize("model", ["mlp", "tabm"])
def test_what_no_output_hears_goes_first(
    features: Checkout, learned: tuple[Encoding, Rows], model: str
) -> None:
    """Half of the units are dead, in places drawn by chance: without them it answers the same."""
    fit = features.params().fit.model_copy(
        update={"model": model, "hidden": [32, 16], "members": 3}
    )
    network, random = _network(learned, fit), np.random.default_rng(0)
    state = network.head.state_dict()
    for one in pruning.UNITS[model](fit):
        dead = random.permutation(fit.hidden[one.depth])[: fit.hidden[one.depth] // 2]
        axis = dict(one.held)[_heard(model, one, fit)]
        state[_heard(model, one, fit)].index_fill_(axis, torch.from_numpy(dead), 0.0)
    made, smaller = pruning.pruned(network, learned[0], fit, learned[1], SHARE)
    assert smaller.hidden == [16, 8]
    torch.testing.assert_close(_answers(made, learned[1]), _answers(network, learned[1]))
    assert _size(made) < 0.7 * _size(network)


def _heard(model: str, one: pruning.Units, fit: Fit) -> str:
    """The weight by which a layer's units are heard in what follows."""
    if model == "mlp":
        return f"{one.layer.rpartition('.')[0]}.{3 * one.depth + 3}.weight"
    return "weight" if one.depth + 1 == len(fit.hidden) else f"layers.{one.depth + 1}.weight"


def _size(network: Network) -> int:
    return sum(values.numel() for values in network.head.state_dict().values())


def test_worth_is_the_loss_that_the_units_absence_makes(
    features: Checkout, learned: tuple[Encoding, Rows]
) -> None:
    """To first order: units are worth, in the same order, about what the loss of a row changes when
    each is taken away alone.
    """
    fit = features.params().fit.model_copy(update={"model": "mlp", "hidden": [8], "members": 1})
    network, rows = _network(learned, fit), learned[1]
    (units,) = pruning.UNITS["mlp"](fit)
    (worth,) = pruning.worths(network, objectives.Binary(), [units], rows)
    before, changes = _losses(network, rows), []
    outgoing = network.head.get_parameter("members.0.layers.3.weight")
    for unit in range(8):
        with torch.no_grad():
            held = outgoing[:, unit].clone()
            outgoing[:, unit] = 0
            changes.append(float(((_losses(network, rows) - before) ** 2).mean()))
            outgoing[:, unit] = held
    assert np.corrcoef(worth.numpy(), changes)[0, 1] > 0.95


def _losses(network: Network, rows: Rows) -> torch.Tensor:
    """Of every row, shape (rows,)."""
    codes, numbers, labels = rows.take(np.arange(len(rows)))
    with torch.inference_mode():
        return torch.nn.functional.binary_cross_entropy_with_logits(
            network(codes, numbers)[:, 0, 0], labels, reduction="none"
        )


def test_a_unit_is_left_in_every_layer_and_the_network_that_was_there(
    features: Checkout, learned: tuple[Encoding, Rows]
) -> None:
    fit = features.params().fit.model_copy(update={"model": "mlp", "hidden": [4, 1]})
    network = _network(learned, fit)
    before = _answers(network, learned[1])
    made, smaller = pruning.pruned(network, learned[0], fit, learned[1], 0.9)
    assert smaller.hidden == [1, 1]
    assert torch.isfinite(_answers(made, learned[1])).all()
    torch.testing.assert_close(_answers(network, learned[1]), before, rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"model": "logistic"}, {"hidden": []}])
def test_where_there_is_nothing_to_prune_it_says_so_in_one_line(
    features: Checkout, learned: tuple[Encoding, Rows], change: dict[str, object]
) -> None:
    fit = features.params().fit.model_copy(update=change)
    with pytest.raises(UserError, match=r"pruned, but .+ has no unit to prune; expected") as error:
        pruning.pruned(_network(learned, fit), learned[0], fit, learned[1], SHARE)
    assert "\n" not in str(error.value)
