"""Every model of the table learns, and gives the same kind of bundle."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from sklearn.metrics import roc_auc_score
from train.fits import arrays
from world import Checkout

from pipelines import bundle, stage
from pipelines.params import Fit, Target
from pipelines.train import data, evaluate, fit, fitted, models, package
from pipelines.train.data import Encoding
from pipelines.train.models.inputs import Dropout, Inputs, Network


@pytest.mark.parametrize("model", sorted(models.MODELS))
def test_it_learns_and_its_bundle_answers_as_it_does(features: Checkout, model: str) -> None:
    features.set(fit={"model": model, "max_epochs": 3})
    params = features.params()
    fit.run(params)
    evaluate.run(params)
    package.run(params)
    learned, scorer = fitted.load(), bundle.load(bundle.FOLDER)
    test = data.materialise(learned.encoding, "test", features.folder / "rows")
    expected = learned.predict(test)
    assert roc_auc_score(test.labels, expected) > 0.7
    rows = package.split(learned.encoding, "test")
    found = scorer.predict(rows)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    parts = [scorer.predict(rows.slice(at, 37)) for at in range(0, rows.num_rows, 37)]
    np.testing.assert_array_equal(np.concatenate(parts), found)  # whatever rows are beside


# Another value of every key of fit that a table of models may name. patience shows only where the
# loss rises.
OTHER: dict[str, Any] = {
    "batch_size": 1024,
    "max_epochs": 2,
    "learning_rate": 0.02,
    "weight_decay": 0.1,
    "dropout": 0.5,
    "hidden": [16],
    "members": 3,
    "boosting.rounds": 3,
    "boosting.learning_rate": 0.3,
    "boosting.leaves": 4,
    "boosting.leaf_rows": 300,
    "boosting.l2": 50,
    "boosting.features": 0.9,
    "boosting.rows": 1000,
}


@pytest.mark.parametrize("model", sorted(models.MODELS))
def test_it_depends_on_the_keys_that_the_table_names_and_on_no_other(
    features: Checkout, model: str
) -> None:
    small = {"batch_size": 2048, "max_epochs": 1, "hidden": [8], "boosting": {"rounds": 2}}
    features.set(fit=small | {"model": model})
    params = features.params()
    encoding, train, val = arrays(params)

    def learned(**changes: Any) -> bytes:
        options = params.fit.changed(changes)
        trained = fit.train_model(encoding, train, val, options, Path("saved", str(changes)))
        return save(trained.model.network.state_dict())

    plain = learned()
    depends = {key for key, value in OTHER.items() if learned(**{key: value}) != plain}
    assert depends == {key for key in OTHER if models.uses(model, key)}


@pytest.mark.parametrize("steps", range(1, 12))
def test_few_steps_are_learned_as_many_are(features: Checkout, steps: int) -> None:
    features.set(fit={"model": "logistic", "max_epochs": steps, "batch_size": 100_000})
    fit.run(features.params())
    assert len(stage.read_json(fitted.FOLDER / fitted.CURVES)) == steps


@pytest.fixture
def inputs() -> Inputs:
    vocabulary = {"origin": ["EWR", "JFK"], "carrier": ["UA"]}
    target = Target(column="late", task="binary", classes=[])
    return Inputs.blank(Encoding(vocabulary, ["x", "y"], target))


def _head(inputs: Inputs, fit: Fit, model: str, **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    network = models.build(inputs, fit.model_copy(update={"model": model} | changes))
    assert isinstance(network, Network)
    return network.head.eval()


def test_the_members_of_tabm_share_a_layer_and_differ(inputs: Inputs, features: Checkout) -> None:
    options = features.params().fit
    few, many = (
        _head(inputs, options, "tabm", members=count, hidden=[256, 256]) for count in (1, 16)
    )
    codes, numbers = torch.zeros(5, 2, dtype=torch.int32), torch.randn(5, 6)
    assert many(codes, numbers).shape == (5, 16, 1)
    assert len(torch.unique(many(codes, numbers)[0])) == 16
    sizes = [sum(p.numel() for p in head.parameters()) for head in (few, many)]
    assert sizes[1] < 3 * sizes[0]


def test_logistic_is_linear_in_every_number(inputs: Inputs, features: Checkout) -> None:
    head = _head(inputs, features.params().fit, "logistic")
    codes = torch.zeros(5, 2, dtype=torch.int32)
    one, other = torch.randn(2, 5, 6)
    middle = (head(codes, one) + head(codes, other)) / 2
    torch.testing.assert_close(head(codes, (one + other) / 2), middle)


@given(st.integers(0, 400), st.integers(1, 30), st.floats(0, 0.999), st.integers(0, 2**32))
def test_dropout_takes_whole_units_and_keeps_their_mean(
    rows: int, width: int, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    dropout = Dropout(share)
    units = torch.full((rows, width), 3.0, requires_grad=True)
    kept = dropout(units)
    kept.sum().backward()
    assert units.grad is not None
    assert torch.equal(units.grad * 3, kept)
    assert len(kept.unique()) <= 2
    gone = kept == 0
    # Five standard errors of what is told of a share.
    assert abs(float(gone.sum()) - share * gone.numel()) <= (
        5 * math.sqrt(gone.numel() / 4) + gone.numel() / 256
    )
    if not gone.all():
        assert kept.max().item() == pytest.approx(3 / (1 - share), rel=1 / 256 / (1 - share))
    assert dropout.eval()(units) is units
