"""The figures are scikit-learn's, weights are repetitions, and the intervals hold the value."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    log_loss,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    root_mean_squared_error,
)

from pipelines import metrics

ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 19)), min_size=4, max_size=60).filter(
    lambda rows: 0 < sum(label for label, _ in rows) < len(rows)
)


@given(rows=ROWS)
def test_figures_equal_scikit_learn(rows: list[tuple[int, int]]) -> None:
    label = np.array([label for label, _ in rows])
    probability = np.array([p / 20 for _, p in rows])
    found = metrics.point(label, probability)
    assert found["auc"] == pytest.approx(roc_auc_score(label, probability), abs=1e-5)
    assert found["ap"] == pytest.approx(average_precision_score(label, probability), abs=1e-5)
    assert found["log_loss"] == pytest.approx(log_loss(label, probability), abs=1e-5)
    assert found["brier"] == pytest.approx(brier_score_loss(label, probability), abs=1e-5)


@given(rows=ROWS, weights=st.data())
@settings(max_examples=50)
def test_a_weight_is_a_repetition(rows: list[tuple[int, int]], weights: st.DataObject) -> None:
    times = weights.draw(
        st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)).filter(any)
    )
    label = np.array([label for label, _ in rows])
    probability = np.array([p / 20 for _, p in rows])
    weighted = metrics.measurer(label, probability)(np.array(times, float))
    repeated = metrics.measurer(np.repeat(label, times), np.repeat(probability, times))
    # The bins of the calibration error are cut on the rows as they are: the last figure may differ.
    np.testing.assert_allclose(weighted[:4], repeated(np.ones(sum(times)))[:4], atol=1e-9)


def test_intervals_hold_the_value_and_shrink_with_rows() -> None:
    random = np.random.default_rng(0)
    widths = []
    for rows in (500, 20_000):
        probability = random.random(rows)
        label = (random.random(rows) < probability).astype(int)
        found = metrics.with_intervals(label, probability, resamples=100, seed=1)
        for name in metrics.NAMES:
            assert found[name]["low"] < found[name]["value"] < found[name]["high"]
        widths.append(found["auc"]["high"] - found["auc"]["low"])
        assert found == metrics.with_intervals(label, probability, resamples=100, seed=1)
    assert widths[1] < widths[0] / 3


@given(auc=st.floats(0.5, 0.99), rows=st.integers(5, 2000))
def test_an_auc_is_surer_with_more_rows(auc: float, rows: int) -> None:
    few, many = (metrics.auc_at_least(auc, n, 3 * n) for n in (rows, 10 * rows))
    assert few < many < auc


def test_the_error_of_an_auc_is_that_of_the_bootstrap() -> None:
    random = np.random.default_rng(0)
    label = np.repeat([0, 1], [600, 200])
    score = 1 / (1 + np.exp(-random.normal(size=800) - label))
    drawn = metrics.with_intervals(label, score, resamples=400, seed=1)["auc"]
    low = metrics.auc_at_least(drawn["value"], 200, 600)
    assert low == pytest.approx(drawn["low"], abs=0.01)


def test_a_calibrated_score_has_no_calibration_error_and_a_shifted_one_has_its_shift() -> None:
    random = np.random.default_rng(0)
    probability = random.uniform(0.2, 0.7, 200_000)
    label = (random.random(200_000) < probability).astype(int)
    assert metrics.point(label, probability)["calibration_error"] < 0.01
    assert metrics.point(label, probability + 0.2)["calibration_error"] == pytest.approx(
        0.2, abs=0.01
    )


@given(
    rows=st.lists(
        st.tuples(st.integers(-90, 400), st.integers(-60, 200)), min_size=30, max_size=90
    ).filter(lambda rows: len({label for label, _ in rows}) > 1)
)
def test_figures_of_numbers_equal_scikit_learn(rows: list[tuple[int, int]]) -> None:
    label, value = np.array(rows, float).T
    found = metrics.point(label, value, "regression")
    assert found["rmse"] == pytest.approx(root_mean_squared_error(label, value), abs=1e-5)
    assert found["mae"] == pytest.approx(mean_absolute_error(label, value), abs=1e-5)
    assert found["unexplained"] == pytest.approx(1 - r2_score(label, value), rel=1e-5, abs=1e-5)
    # The mean error of each bin is at most the mean absolute error.
    assert abs((value - label).mean()) - 1e-5 <= found["calibration_error"] <= found["mae"] + 1e-5


@given(seed=st.integers(0, 999))
def test_figures_of_classes_equal_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    probability = random.dirichlet(np.ones(3), 80)
    label = np.array([*range(3), *(random.choice(3, p=one) for one in probability[3:])])
    found = metrics.point(label, probability, "multiclass")
    each = (label[:, None] == np.arange(3)).astype(int)
    assert found["log_loss"] == pytest.approx(log_loss(label, probability), abs=1e-5)
    assert found["auc"] == pytest.approx(roc_auc_score(each, probability), abs=1e-5)
    assert found["ap"] == pytest.approx(average_precision_score(each, probability), abs=1e-5)
    assert found["accuracy"] == pytest.approx((probability.argmax(1) == label).mean(), abs=1e-5)
    squared = ((probability - each) ** 2).sum(axis=1).mean()
    assert found["brier"] == pytest.approx(squared, abs=1e-5)


@given(seed=st.integers(0, 999))
def test_two_classes_are_judged_as_one_label(seed: int) -> None:
    random = np.random.default_rng(seed)
    p = random.random(60)
    label = np.array([0, 1, *random.integers(0, 2, 58)])
    one = metrics.point(label, p)
    both = metrics.point(label, np.column_stack([1 - p, p]), "multiclass")
    assert both["log_loss"] == pytest.approx(one["log_loss"], abs=2e-6)
    assert both["auc"] == pytest.approx(one["auc"], abs=2e-6)
    assert both["brier"] == pytest.approx(2 * one["brier"], abs=2e-6)


@pytest.mark.parametrize("task", sorted(metrics.TASKS))
def test_a_weight_is_a_repetition_for_every_task(task: str) -> None:
    random = np.random.default_rng(1)
    label = random.integers(0, 2, 50) if task != "regression" else random.normal(size=50)
    prediction = random.random(50)
    if task == "multiclass":
        prediction = np.column_stack([1 - prediction, prediction])
    times = random.integers(0, 4, 50)
    measurer = metrics.TASKS[task].measurer
    weighted = measurer(label, prediction)(times.astype(float))
    repeated = measurer(np.repeat(label, times, axis=0), np.repeat(prediction, times, axis=0))
    # The bins of the calibration error are cut on the rows as they are.
    np.testing.assert_allclose(weighted[:-1], repeated(np.ones(times.sum()))[:-1], atol=1e-9)
