"""The comparison: equal models are equal, a worse one is found, days are drawn and not rows."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, log_loss

from pipelines.deploy import comparison
from pipelines.deploy.comparison import Rows
from pipelines.params import Params

DAYS, A_DAY = 40, 100


def _rows(seed: int = 0, skill: float = 1.0, of_day: float = 0.0) -> Rows:
    """A champion that knows the odds, and a challenger that knows a share `skill` of them.

    `of_day` makes the champion err by that much more in odd days, the challenger in even ones.
    """
    random = np.random.default_rng(seed)
    day = np.repeat(np.arange(DAYS), A_DAY)
    odds = random.normal(-1, 1.5, DAYS * A_DAY)
    off = of_day * np.where(day % 2 == 0, 1, -1)
    return Rows(
        label=(random.random(DAYS * A_DAY) < _sigmoid(odds)).astype(np.int64),
        champion=_sigmoid(odds + np.minimum(off, 0)),
        challenger=_sigmoid(skill * odds - (1 - skill) + np.maximum(off, 0)),
        day=day,
        slices={"origin": random.choice(["EWR", "JFK"], DAYS * A_DAY)},
    )


def _sigmoid(odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-odds))


def test_equal_models_differ_by_nothing(params: Params) -> None:
    rows = _rows()
    found, reasons = comparison.compare(rows, params.gate)
    assert found["log_loss"] == {"value": 0, "low": 0, "high": 0}
    assert (found["days"], found["worse_slices"], reasons) == (DAYS, {}, [])


def test_the_figures_are_those_of_scikit_learn(params: Params) -> None:
    rows = _rows(skill=0.5)
    found, _ = comparison.compare(rows, params.gate)
    loss = log_loss(rows.label, rows.challenger) - log_loss(rows.label, rows.champion)
    ap = average_precision_score(rows.label, rows.challenger) - average_precision_score(
        rows.label, rows.champion
    )
    assert found["log_loss"]["value"] == pytest.approx(loss, abs=1e-6)
    assert found["ap"]["value"] == pytest.approx(ap, abs=1e-6)
    assert found["log_loss"]["low"] < loss < found["log_loss"]["high"]


def test_a_worse_challenger_is_found_and_says_by_how_much(params: Params) -> None:
    rows = _rows(skill=0.5)
    _, reasons = comparison.compare(rows, params.gate)
    assert reasons[0].startswith("log loss may rise by 0.0")
    turned = Rows(rows.label, rows.champion, 1 - rows.champion, rows.day, rows.slices)
    _, reasons = comparison.compare(turned, params.gate)
    assert any(reason.startswith("average precision may fall by 0.") for reason in reasons)


def test_a_slice_that_is_surely_worse_is_named(params: Params) -> None:
    rows = _rows()
    worse = np.where(rows.slices["origin"] == "JFK", 1 - rows.champion, rows.champion)
    found, reasons = comparison.compare(
        Rows(rows.label, rows.champion, worse, rows.day, rows.slices), params.gate
    )
    assert list(found["worse_slices"]) == ["origin JFK"]
    assert any(reason.startswith("origin JFK: log loss rises by at least") for reason in reasons)


def test_days_that_err_together_widen_the_interval(params: Params) -> None:
    """Drawing rows would take 4,000 flights of 40 days for 4,000 witnesses."""
    rows = _rows(of_day=1.5)
    of_days = comparison.compare(rows, params.gate)[0]["log_loss"]
    shuffled = np.random.default_rng(1).permutation(rows.day)
    alone = Rows(rows.label, rows.champion, rows.challenger, shuffled, rows.slices)
    of_rows = comparison.compare(alone, params.gate)[0]["log_loss"]
    assert of_days["high"] - of_days["low"] > 2 * (of_rows["high"] - of_rows["low"])
    assert of_days["value"] == of_rows["value"]
