"""The verdict weighs performance, predictions and labels; features alone raise no alarm."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from world import Checkout

from pipelines import bundle, stage, tables
from pipelines.deploy import drift
from pipelines.params import Params

CALM: dict[str, Any] = {
    "rows": {"reference": 100, "window": 100},
    "auc": {"reference": 0.75, "window": 0.75},
    "loss": {"reference": 0.4, "window": 0.4},
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
        ({"loss": {"reference": 0.4, "window": 0.6}}, "loss rose from 0.4 to 0.6"),
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


def test_a_feature_that_is_empty_in_one_table_is_named(checkout: Checkout) -> None:
    """A sensor that fell silent is no fault of the stage."""
    random = np.random.default_rng(0)
    columns: dict[str, Any] = {
        name: random.normal(size=400) for name in ("temp", "humid", "precip", bundle.PREDICTION)
    }
    columns |= {"carrier": random.choice(["UA", "B6"], 400), "plane": ["A320"] * 400}
    columns |= {"label": random.integers(0, 2, 400), bundle.PREDICTION: random.random(400)}
    reference = pa.table(columns | {"plane": pa.nulls(400, pa.string())})
    window = pa.table(columns | {"temp": pa.nulls(400, pa.float32()), "precip": [np.nan] * 400})
    tables.write(reference, bundle.FOLDER / bundle.REFERENCE)
    tables.write(window, drift.PREDICTIONS / "2013-05.parquet")
    kinds = {"temp": "float32", "humid": "float32", "precip": "float32", "carrier": "string",
             "plane": "string"}  # fmt: skip
    contract = {
        "columns": [{"name": name, "type": kind} for name, kind in kinds.items()],
        "dataset": "flights", "label": "label", "threshold": 0.5,
    }  # fmt: skip
    stage.write_json(bundle.FOLDER / bundle.CONTRACT, contract)
    drift.run(checkout.params())
    verdict = stage.read_json(drift.VERDICT)
    assert verdict["empty_features"] == ["temp", "precip", "plane"]
    assert verdict["drifted_features"] == {}
    assert verdict["drift"] is False
