"""evaluate measures on the test rows, compares, and stops at a leak."""

import json
from pathlib import Path

import numpy as np
import pytest
from train.synthetic import make_features
from world import Checkout

from pipelines.errors import UserError
from pipelines.params import Params
from pipelines.train import evaluate, fit
from pipelines.train.data import Encoding, Rows


def _evaluated(params: Params) -> dict[str, object]:
    fit.run(params)
    evaluate.run(params)
    return json.loads(evaluate.VERDICT.read_text())  # type: ignore[no-any-return]


def test_the_verdict_is_whole_and_repeats(features: Checkout) -> None:
    params = features.params()
    first = _evaluated(params)
    assert set(first["metrics"]) == set(first["baseline"]) == set(evaluate.metrics.NAMES)
    assert set(first["slices"]) == {"origin", "carrier", "part_of_day"}
    assert sum(cut["rows"] for cut in first["slices"]["origin"].values()) == first["rows"]["test"]
    names = {*params.dataset.behaviour.raises, *params.dataset.behaviour.missing}
    assert {check["name"] for check in first["behaviour"]} == names
    assert evaluate.PAGE.stat().st_size > 10_000
    evaluate.run(params)
    assert json.loads(evaluate.VERDICT.read_text()) == first


def test_a_model_not_good_enough_is_told_why(features: Checkout) -> None:
    features.set(evaluate={"min_auc": 0.99})
    verdict = _evaluated(features.params())
    assert verdict["passed"] is False
    assert any("is below evaluate.min_auc = 0.99" in reason for reason in verdict["reasons"])


def test_a_behaviour_that_does_not_hold_is_told(features: Checkout) -> None:
    features.set(dataset={"behaviour": {"raises": {"more slack": {"tail_slack": 2.0}}}})
    verdict = _evaluated(features.params())
    assert "behaviour: more slack" in verdict["reasons"]


@pytest.mark.parametrize(
    ("leak", "said"),
    [
        ("dest_delay_6h", "feature dest_delay_6h alone reaches AUC"),
        ("temp", "feature temp alone reaches AUC"),
    ],
)
def test_a_feature_that_holds_the_outcome_fails_the_stage(
    features: Checkout, leak: str, said: str
) -> None:
    make_features(features, leak=leak)
    fit.run(features.params())
    with pytest.raises(UserError, match=said):
        evaluate.run(features.params())
    assert not evaluate.VERDICT.exists()


def test_a_canary_that_sings_fails_the_stage(features: Checkout) -> None:
    """Two features, harmless alone and too good together, in groups that should know little."""
    features.set(
        dataset={"canary": ["schedule", "aircraft"]},
        evaluate={"leak_auc": 0.75, "canary_epochs": 3},
    )
    fit.run(features.params())
    with pytest.raises(UserError, match="schedule and aircraft features alone reach AUC"):
        evaluate.run(features.params())


def test_knowledge_of_after_the_prediction_time_fails_the_stage(features: Checkout) -> None:
    make_features(features, late=True)
    fit.run(features.params())
    with pytest.raises(UserError, match=r"2013\.parquet: row 1 knows something of"):
        evaluate.run(features.params())


def test_chance_in_few_rows_is_no_leak(features: Checkout) -> None:
    """Of many numbers one orders a dozen labels well by chance; a thousand rows it does not."""
    encoding = Encoding({}, ["a"], features.params().dataset.target)
    label = np.array([0] * 9 + [1] * 3)
    score = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9, 0.95, 0.8, 0.97, 0.99])

    def rows(times: int) -> Rows:
        Path("few").mkdir(exist_ok=True)
        for name, array in (
            ("codes", label[:, None]),
            ("numbers", score[:, None]),
            ("labels", label),
        ):
            np.save(f"few/{name}.npy", np.repeat(array, times, axis=0))
        return Rows(Path("few"))

    evaluate.stop_on_single_leak(rows(1), encoding, allowed=0.78)
    with pytest.raises(UserError, match=r"feature a alone reaches AUC 0\.926; surely above"):
        evaluate.stop_on_single_leak(rows(100), encoding, allowed=0.78)
