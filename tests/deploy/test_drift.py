"""The verdict weighs performance, predictions and labels; features alone raise no alarm."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.deploy import drift
from pipelines.params import Params

CALM: dict[str, Any] = {
    "rows": {"reference": 100, "window": 100},
    "auc": {"reference": 0.75, "window": 0.75},
    "log_loss": {"reference": 0.4, "window": 0.4},
    "label_rate": {"reference": 0.2, "window": 0.2},
    "prediction_drift": 0.0,
    "drifted_features": {},
}


def test_no_move_is_no_drift(params: Params) -> None:
    assert drift.judge(CALM, params.drift)["drift"] is False


@pytest.mark.parametrize(
    ("moved", "said"),
    [
        ({"auc": {"reference": 0.75, "window": 0.6}}, "AUC fell from 0.75 to 0.6"),
        ({"log_loss": {"reference": 0.4, "window": 0.6}}, "log loss rose from 0.4 to 0.6"),
        ({"prediction_drift": 0.9}, "predictions moved by 0.9"),
        ({"label_rate": {"reference": 0.17, "window": 0.33}}, "label rate moved from 0.17 to 0.33"),
    ],
)
def test_each_move_is_a_reason(params: Params, moved: dict[str, Any], said: str) -> None:
    verdict = drift.judge(CALM | moved, params.drift)
    assert verdict["drift"] is True
    assert len(verdict["reasons"]) == 1
    assert said in verdict["reasons"][0]


@given(scores=st.dictionaries(st.sampled_from(["temp", "dewp", "humid"]), st.floats(0.1, 9)))
def test_weather_alone_is_no_drift(params: Params, scores: dict[str, float]) -> None:
    assert drift.judge(CALM | {"drifted_features": scores}, params.drift)["drift"] is False


def test_a_window_of_one_class_has_no_auc_and_still_a_verdict(params: Params) -> None:
    verdict = drift.judge(CALM | {"auc": {"reference": 0.75, "window": None}}, params.drift)
    assert verdict["drift"] is False
