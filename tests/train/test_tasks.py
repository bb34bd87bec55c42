"""Whether a flight is late, by how many minutes, or early, on time or late: one graph for each."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from world import Checkout

from pipelines import bundle, explain, stage, tables
from pipelines.deploy import drift, gate, score
from pipelines.deploy.serve import model as served
from pipelines.errors import UserError
from pipelines.ingest import featurize, fetch, load, validate
from pipelines.params import Target
from pipelines.train import card, evaluate, fit, fitted, objectives, package

CLASSES = ["early", "on time", "late"]
TARGETS: dict[str, dict[str, Any]] = {
    "regression": {"column": "minutes", "task": "regression", "classes": []},
    "multiclass": {"column": "punctuality", "task": "multiclass", "classes": CLASSES},
}


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    """Where the accepted events are kept, once they are made."""
    return {}


@pytest.fixture
def accepted(checkout: Checkout, made: dict[str, Path]) -> Checkout:
    """A checkout with the accepted events of the small source."""
    checkout.set(evaluate={"resamples": 10, "baseline_iterations": 30})
    if not made:
        for step in (fetch, load, validate):
            step.run(checkout.params())
        made["kept"] = checkout.folder.parent / "kept"
        for name in ("data", "reports"):
            shutil.copytree(name, made["kept"] / name)
    shutil.copytree(made["kept"], checkout.folder, dirs_exist_ok=True)
    return checkout


@pytest.mark.parametrize("task", TARGETS)
def test_the_whole_graph_foretells_another_column(accepted: Checkout, task: str) -> None:
    forms = ["int8", "pruned"] if task == "multiclass" else ["int8", "pruned", "distilled"]
    accepted.set(dataset={"target": TARGETS[task]}, package={"forms": forms})
    params = accepted.params()
    for step in (featurize, fit, evaluate, package, card, score, drift):
        step.run(params)

    events = tables.read(validate.ACCEPTED)
    known = events.filter(pc.is_valid(events["arr_delay"]))
    features = tables.read(featurize.FEATURES)
    label, minutes = features["label"].to_numpy(), _minutes(known, features, params.dataset.key)
    if task == "regression":
        np.testing.assert_array_equal(label, minutes)
    else:
        np.testing.assert_array_equal(label, np.select([minutes < 0, minutes <= 15], [0, 1], 2))

    verdict = stage.read_json(evaluate.VERDICT)
    figures = {name: figure["value"] for name, figure in verdict["metrics"].items()}
    if task == "regression":
        assert figures["unexplained"] < 1  # better than the mean of the test rows
    else:
        share = np.bincount(label.astype(int)) / len(label)
        assert figures["auc"] > 0.6
        assert figures["log_loss"] < -(share * np.log(share)).sum()
    assert set(verdict["baseline"]) == set(figures)
    evaluate.draw(verdict, ["cheap", "$_$"], Path("priced.png"))  # which is no formula
    assert set(stage.read_json(package.VERDICT)["forms"]) == {"plain", *forms}
    text = card.CARD.read_text()
    assert ("early, on time, late" in text) == (task == "multiclass")

    window, scorer = tables.read(score.PREDICTIONS), bundle.load(bundle.FOLDER)
    answers = scorer.predict(window)
    np.testing.assert_array_equal(bundle.answers(window), answers)
    if task == "multiclass":
        assert answers.shape == (window.num_rows, 3)
        np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-5)
        np.testing.assert_array_equal(window["prediction"].to_numpy(), answers[:, 2])
    assert {"loss", "auc", "label_rate"} <= set(stage.read_json(drift.VERDICT))
    reference = tables.read_file(bundle.FOLDER / bundle.REFERENCE)
    found = explain.explain(scorer, window.slice(0, 1), reference, 4)
    told = found.base + found.contributions.sum()
    assert told == pytest.approx(float(window["prediction"][0].as_py()), abs=1e-3)

    if task == "multiclass":
        accepted.set(package={"forms": ["distilled"]})
        with pytest.raises(
            UserError, match=r"distilled .* but dataset\.target\.task is multiclass"
        ):
            accepted.params()
        accepted.set(package={"forms": []})
    with pytest.raises(UserError, match=f"its task is {task}; what is released is binary"):
        gate.run(params)
    named = served.Named(bundle.FOLDER, stage.digest(bundle.FOLDER))
    with pytest.raises(UserError, match=f"its task is {task}; what is served is binary"):
        served.load(named, params.serve)


def _minutes(events: Any, features: Any, key: list[str]) -> Any:
    """The delay of the event of every row of features."""
    held = zip(*(events[name].to_pylist() for name in key), strict=True)
    delay = dict(zip(held, events["arr_delay"].to_pylist(), strict=True))
    asked = zip(*(features[name].to_pylist() for name in key), strict=True)
    return np.array([delay[one] for one in asked], float)


def test_a_label_that_the_task_does_not_know_is_one_line(features: Checkout) -> None:
    features.set(dataset={"target": TARGETS["multiclass"] | {"classes": ["early", "late"]}})
    table = tables.read(featurize.FEATURES)
    wrong = table.set_column(table.column_names.index("label"), "label", pc.add(table["label"], 1))
    tables.write(wrong, next(featurize.FEATURES.glob("*.parquet")))
    with pytest.raises(UserError, match=r"a label is 2\.0; expected 0 to 1, as dataset\.target"):
        fit.run(features.params())
    assert not fitted.FOLDER.exists()


@given(seed=st.integers(0, 99), scale=st.floats(0.5, 2), shift=st.floats(-1, 1))
@settings(max_examples=20, deadline=None)
def test_calibration_finds_what_moved_the_scores(seed: int, scale: float, shift: float) -> None:
    """Labels drawn from scaled and shifted scores: of classes only differences of shifts count."""
    random = np.random.default_rng(seed)
    target = Target.model_validate(TARGETS["multiclass"])
    score = random.normal(size=(20_000, 3))
    shifts = np.array([0, shift, -shift])
    logits = scale * score + shifts
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    label = (p.cumsum(axis=1) < random.random(20_000)[:, None]).sum(axis=1).astype(float)
    found, moved = objectives.of(target).calibrate(score, label)
    assert found == pytest.approx(scale, rel=0.1)
    np.testing.assert_allclose(moved - moved[0], shifts, atol=0.15)


def test_a_class_of_two_learns_as_a_label_does() -> None:
    """The cross-entropy of the difference of two logits is that of one."""
    logits, labels = torch.randn(50, 1, 2), torch.randint(2, (50,)).float()
    two = objectives.Multiclass(2).losses(logits, labels)
    one = objectives.Binary().losses(logits[:, :, 1:] - logits[:, :, :1], labels)
    torch.testing.assert_close(two, one)


def test_a_line_brings_numbers_back_to_their_unit() -> None:
    label = np.random.default_rng(0).normal(7, 40, 1000)
    objective = objectives.of(Target.model_validate(TARGETS["regression"]), label)
    known = objective.known(torch.from_numpy(label))
    assert float(known.mean()) == pytest.approx(0, abs=1e-9)
    assert float(known.std()) == pytest.approx(1, abs=1e-2)
    scale, shift = objective.calibrate(known.numpy(), label)
    np.testing.assert_allclose(scale * known.numpy() + shift, label, atol=1e-9)


@given(
    classes=st.sampled_from([2, 3]),
    seed=st.integers(0, 999),
    spread=st.floats(0.001, 4),
    off=st.floats(-8, 8),
    worth=st.floats(-1, 1),
)
@settings(max_examples=50, deadline=None)
def test_calibration_is_the_best_however_far_off_the_scores_are(
    classes: int, seed: int, spread: float, off: float, worth: float
) -> None:
    """Where the log loss is least, what predictions miss has no mean and says nothing of the
    scores: its slopes are zero there, and nowhere else.
    """
    random = np.random.default_rng(seed)
    truth = random.normal(size=(1000, classes)) * ([0, 1] if classes == 2 else 1)
    logits = worth * truth + np.linspace(1, 0, classes)
    label = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)
    objective = objectives.Binary() if classes == 2 else objectives.Multiclass(classes)
    said = torch.from_numpy(spread * truth + np.linspace(0, off, classes))
    mean = torch.softmax(said, dim=1)[:, 1] if classes == 2 else torch.softmax(said, dim=1)

    made = fitted.calibrate(nn.Identity(), objective, mean, label.astype(float))
    score = objective.score(mean)
    answer = objective.answer(made.scale * score + made.shift)
    wanted = torch.from_numpy(np.eye(classes)[label])
    missed = answer - (wanted[:, 1] if classes == 2 else wanted)
    assert missed.mean(dim=0).abs().max() < 1e-3
    assert abs(((score - score.mean(dim=0)) * missed).sum()) < 1e-3 * 1000 * score.std()
