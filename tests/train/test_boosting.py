"""Trees answer as those that scikit-learn grew, and are the same from any number of threads."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from world import Checkout

from pipelines.errors import UserError
from pipelines.params import Fit, Target
from pipelines.train import fit, fitted, models, objectives
from pipelines.train.data import Encoding, Rows
from pipelines.train.models import boosting
from pipelines.train.models.boosting import Trees
from pipelines.train.models.inputs import Inputs

ROWS = 4000
CLASSES = ["low", "middle", "high"]
TARGETS = {
    "binary": Target(column="y", task="binary", classes=[]),
    "regression": Target(column="y", task="regression", classes=[]),
    "multiclass": Target(column="y", task="multiclass", classes=CLASSES),
}


@pytest.fixture
def grown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The learners of scikit-learn, as they are made."""
    made: list[Any] = []
    learner = boosting._learner

    def kept(*arguments: Any) -> Any:
        made.append(learner(*arguments))
        return made[-1]

    monkeypatch.setattr(boosting, "_learner", kept)
    return made


@pytest.fixture
def options(checkout: Checkout) -> Fit:
    return checkout.params().fit.changed({"boosting.leaf_rows": 20, "boosting.rounds": 60})


def _rows(checkout: Checkout, name: str, labels: npt.NDArray[Any], **numbers: Any) -> Rows:
    """One category of three values, and numbers."""
    folder = checkout.folder / name
    folder.mkdir()
    random = np.random.default_rng(len(name))
    np.save(folder / "codes.npy", random.integers(0, 4, (len(labels), 1)).astype(np.int32))
    np.save(folder / "numbers.npy", np.stack(list(numbers.values()), axis=1).astype(np.float32))
    np.save(folder / "labels.npy", labels.astype(np.float32))
    return Rows(folder)


def _drawn(checkout: Checkout, name: str, task: str) -> Rows:
    """Numbers smooth, tied, of few values, often missing, and never known."""
    random = np.random.default_rng(len(name))
    smooth, tied = random.normal(size=ROWS), random.normal(size=ROWS).round(1)
    few, often = random.integers(0, 3, ROWS).astype(float), random.normal(size=ROWS)
    often[random.random(ROWS) < 0.4] = np.nan
    law = smooth + tied * few + np.isnan(often) + random.normal(size=ROWS)
    labels = {
        "binary": law > 0.5,
        "regression": 100 + 20 * law,
        "multiclass": np.digitize(law, [-0.5, 1.5]),
    }
    never = np.full(ROWS, np.nan)
    numbers = {"smooth": smooth, "tied": tied, "few": few, "often": often, "never": never}
    return _rows(checkout, name, labels[task], **numbers)


def _trees(rows: tuple[Rows, Rows], task: str, options: Fit) -> tuple[Trees, objectives.Objective]:
    names = [f"x{at}" for at in range(rows[0].arrays[1].shape[1])]
    encoding = Encoding({"category": ["a", "b", "c"]}, names, TARGETS[task])
    trees = boosting.build(Inputs.of(encoding, rows[0]), options)
    objective = objectives.of(encoding.target, rows[0].arrays[2])
    trees.grow(*rows, objective, options)
    return trees, objective


@torch.inference_mode()
def _said(trees: Trees, rows: Rows) -> npt.NDArray[np.float32]:
    """Shape (rows, width)."""
    codes, numbers, _ = rows.take(np.arange(len(rows)))
    return trees(codes, numbers)[:, 0].numpy()


@pytest.mark.parametrize("task", TARGETS)
def test_they_answer_as_the_ones_that_grew(
    checkout: Checkout, options: Fit, grown: list[Any], task: str
) -> None:
    rows = _drawn(checkout, "train", task), _drawn(checkout, "val", task)
    trees, objective = _trees(rows, task, options)
    (learner,), asked = grown, _drawn(checkout, "asked", task)
    best = len(trees) // objective.width
    assert best == np.argmax(learner.validation_score_) > 5
    matrix = boosting._matrix(asked, np.arange(len(asked)), trees.means.numpy())
    staged = learner.staged_predict if task == "regression" else learner.staged_decision_function
    expected = list(staged(matrix))[best - 1].reshape(len(asked), -1)
    np.testing.assert_allclose(_said(trees, asked), expected, rtol=1e-5, atol=1e-5)


def test_a_number_that_matters_only_where_it_is_missing_is_found(
    checkout: Checkout, options: Fit
) -> None:
    """Then scikit-learn's cut is above every number."""
    sets = []
    for name in ("train", "val"):
        x = np.where(np.random.default_rng(len(name)).random(ROWS) < 0.3, np.nan, 1.0)
        sets.append(_rows(checkout, name, np.isnan(x), x=x))
    trees, _ = _trees((sets[0], sets[1]), "binary", options)
    said = _said(trees, sets[1])[:, 0]
    assert (said > 0).tolist() == (sets[1].labels == 1).tolist()


def test_of_many_rows_as_many_are_seen_as_were_asked_for(
    checkout: Checkout, options: Fit, grown: list[Any]
) -> None:
    rows = _drawn(checkout, "train", "binary"), _drawn(checkout, "val", "binary")
    _trees(rows, "binary", options.changed({"boosting.rows": 500}))
    assert grown[0]._predictors[0][0].nodes["count"][0] == 500


def test_a_class_without_a_row_is_one_line(checkout: Checkout, options: Fit) -> None:
    rows = _drawn(checkout, "train", "binary"), _drawn(checkout, "val", "binary")
    with pytest.raises(UserError, match=r"train rows that trees see .* has the label 2"):
        _trees(rows, "multiclass", options)


def test_the_number_of_threads_changes_no_byte(checkout: Checkout, options: Fit) -> None:
    rows = _drawn(checkout, "train", "binary"), _drawn(checkout, "val", "binary")
    grown = []
    for threads in (1, 2, 3):
        trainer = options.trainer.model_copy(update={"threads": threads})
        trees, _ = _trees(rows, "binary", options.model_copy(update={"trainer": trainer}))
        grown.append(trees.state_dict())
    assert all(torch.equal(grown[0][name], one[name]) for one in grown for name in one)


def test_a_blend_is_the_mean_of_its_network_and_its_trees(features: Checkout) -> None:
    params = features.params()
    fit.run(params)
    model = fitted.load().network.model
    assert isinstance(model, models.Blend)
    codes = torch.zeros(50, len(model.network.head.members[0].embeddings), dtype=torch.int32)
    numbers = torch.randn(50, len(model.network.encoder.edges))
    numbers[::5, ::3] = torch.nan
    objective = objectives.Binary()
    with torch.inference_mode():
        both, network, trees = (
            objective.mean(one(codes, numbers)) for one in (model, model.network, model.trees)
        )
    torch.testing.assert_close(both, (network + trees) / 2)
