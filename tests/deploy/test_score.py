"""score: the answers are the bundle's own, the same bytes on every engine, held to a contract."""

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from train.synthetic import make_features
from world import Checkout

from pipelines import bundle, engine, stage, tables
from pipelines import params as parameters
from pipelines.deploy import expected, score
from pipelines.errors import UserError
from pipelines.ingest import validate
from pipelines.params import Bounds, Params, Suite
from pipelines.train import fit, package

SUITES = Path(__file__).parent.parent.parent / expected.SUITES
PLACE = expected.SUITES / "binary.json"
MONTH = Path("data/predictions/2013-05.parquet")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where features and bundle are kept, once a test has made them."""
    return {"kept": tmp_path_factory.mktemp("made") / "kept"}


@pytest.fixture
def ready(checkout: Checkout, made: dict[str, Path]) -> Checkout:
    """A checkout with features and a bundle."""
    if not made["kept"].exists():
        make_features(checkout)
        checkout.set(fit={"batch_size": 256, "max_epochs": 1})
        fit.run(checkout.params())
        stage.write_json(package.EVALUATION, {"metrics": {}, "passed": True})
        package.run(checkout.params())
        for name in ("data", "models"):
            shutil.copytree(name, made["kept"] / name)
    for name in ("data", "models"):
        shutil.copytree(made["kept"] / name, name, dirs_exist_ok=True)
    return checkout


def test_every_row_of_the_window_has_the_bundles_answer_bit_for_bit(ready: Checkout) -> None:
    params = ready.params()
    score.run(params)
    found = tables.read(score.PREDICTIONS)
    scorer = bundle.load(bundle.FOLDER)
    np.testing.assert_array_equal(found[bundle.PREDICTION].to_numpy(), scorer.predict(found))
    times = tables.read(score.FEATURES)[params.dataset.time].to_pylist()
    assert found[params.dataset.time].to_pylist() == [t for t in times if t >= params.window_from]
    keys = list(zip(*(found[name].to_pylist() for name in params.dataset.key), strict=True))
    assert keys == sorted(keys)
    assert found.column_names == [
        *params.dataset.key,
        "label",
        *(n for n in params.dataset.features.names if n not in params.dataset.key),
        bundle.PREDICTION,
    ]


def test_told_again_it_writes_the_same_bytes(ready: Checkout) -> None:
    assert _bytes(ready) == _bytes(ready)


@pytest.mark.jvm
@pytest.mark.skipif(not shutil.which("java"), reason="the JVM engine needs Java")
def test_the_same_bytes_on_the_jvm_engine(ready: Checkout) -> None:
    embedded = _bytes(ready)
    ready.set(engine="local[2]")
    assert _bytes(ready) == embedded


def _bytes(ready: Checkout) -> dict[str, bytes]:
    """What the stage writes, in a process of its own: a process holds one engine."""
    ended = ready.run("pipelines.deploy.score")
    assert ended.status == 0, ended
    return {file.name: file.read_bytes() for file in sorted(score.PREDICTIONS.iterdir())}


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(cuts=st.lists(st.integers(0, 700), max_size=6))
def test_an_answer_does_not_depend_on_the_rows_beside_it(ready: Checkout, cuts: list[int]) -> None:
    rows = tables.read(score.FEATURES).slice(0, 700).combine_chunks()
    scorer = bundle.load(bundle.FOLDER)
    ask = score.asking((bundle.FOLDER / bundle.MODEL).read_bytes(), scorer.contract)
    edges = sorted({0, 700, *cuts})
    pieces = itertools.pairwise(edges)
    batches = [rows.slice(a, b - a).to_batches()[0] for a, b in pieces]
    answers = pa.Table.from_batches(ask(iter(batches)))[bundle.PREDICTION].to_numpy()
    np.testing.assert_array_equal(answers, scorer.predict(rows))


def test_one_row_as_the_service_asks_it_is_the_same_but_for_the_last_digit(ready: Checkout) -> None:
    """A call with one row takes other instructions: see bundle.REGISTER."""
    rows = tables.read(score.FEATURES).slice(0, 50)
    scorer = bundle.load(bundle.FOLDER)
    bulk = scorer.predict(rows)
    for at in range(rows.num_rows):
        row = rows.slice(at, 1)
        feed = {
            c["name"]: bundle._tensor(row[c["name"]], c["type"]) for c in scorer.contract["columns"]
        }
        assert scorer.session.run(None, feed)[0][0] == pytest.approx(bulk[at], abs=1e-6)


def test_a_window_without_rows_is_the_users_mistake(ready: Checkout) -> None:
    ready.set(as_of="2015-01-01")
    with pytest.raises(UserError, match="no row in the 30 days before as_of 2015-01-01"):
        score.run(ready.params())
    assert not score.PREDICTIONS.exists()


def test_a_month_that_lacks_a_column_is_named(ready: Checkout) -> None:
    (file,) = tables.months(score.FEATURES)
    tables.write(tables.read(score.FEATURES).drop_columns(["temp"]), file)
    with pytest.raises(UserError, match=r"2013\.parquet: column temp is missing"):
        score.run(ready.params())


def test_a_damaged_month_is_named(ready: Checkout) -> None:
    (file,) = tables.months(score.FEATURES)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"2013\.parquet is no whole Parquet file"):
        score.run(ready.params())
    assert not score.PREDICTIONS.exists()


def test_answers_that_break_the_contract_are_not_written(ready: Checkout) -> None:
    text = PLACE.read_text().replace('"max_value": 0.9', '"max_value": 0.011')
    PLACE.write_text(text)
    with pytest.raises(UserError, match=r"predictions/2013-05\.parquet: prediction: column_mean"):
        score.run(ready.params())
    assert not score.PREDICTIONS.exists()


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([], "table_row_count_to_be_between: 0 rows; expected 1 to inf"),
        ([0.2, None], "values_to_not_be_null: 1 of 2 rows, the first is row 1 with None"),
        ([0.2, 0.3, 1.5], "values_to_be_between: 1 of 3 rows, the first is row 2 with 1.5"),
        ([math.nan, 0.3], "values_to_be_between: 1 of 2 rows, the first is row 0 with nan"),
        ([0.0, 0.0], "mean_to_be_between: mean 0.0; expected 0.01 to 0.9"),
    ],
)
def test_each_breach_is_one_line(
    monkeypatch: pytest.MonkeyPatch, answers: list[float | None], said: str
) -> None:
    monkeypatch.setattr(expected, "SUITES", SUITES)
    with pytest.raises(UserError) as raised:
        expected.check(_table(answers), expected.suite("binary", ["prediction"]), MONTH)
    assert str(raised.value).startswith(f"{MONTH}: ")
    assert said in str(raised.value)


MEAN = "expect_column_mean_to_be_between"


@pytest.mark.parametrize(
    ("suite", "said"),
    [
        ("[]", "is no mapping; expected the keys name, meta, expectations"),
        ("{", "is not JSON: Expecting property name"),
        ("\xff", "is not JSON: 'utf-8' codec"),
        ({}, "expectations: list should have at least 1 item"),
        (("expect_magic", {}), "expect_magic is not known; allowed: expect_table_row"),
        ((MEAN, {}), f"{MEAN}: column is None; expected one of prediction"),
        ((MEAN, {"column": "predictoin"}), f"{MEAN}: column is predictoin; expected one of"),
        ((MEAN, {"min": 0}), "expectations.0.kwargs.min: unknown key; allowed here: column, min_"),
        ((MEAN, {"min_value": "x"}), "kwargs.min_value: input should be a valid number; got 'x'"),
    ],
)
def test_a_mistake_in_a_suite_is_one_line(
    checkout: Checkout, suite: str | dict[str, Any] | tuple[str, dict[str, Any]], said: str
) -> None:
    if isinstance(suite, str):
        PLACE.write_bytes(suite.encode("latin-1"))
    else:
        one = [{"type": suite[0], "kwargs": suite[1]}] if isinstance(suite, tuple) else []
        stage.write_json(PLACE, {"name": "predictions", "meta": {}, "expectations": one})
    with pytest.raises(UserError) as raised:
        expected.suite("binary", ["prediction"])
    assert str(raised.value).startswith(f"{PLACE}")
    assert said in str(raised.value)


def test_great_expectations_itself_says_the_same(tmp_path: Path, params: Params) -> None:
    suite = parameters.checked(SUITES / "binary.json", Suite)
    tried = [[0.1, 0.5], [0.2, None], [0.3, 1.5, -0.5], [math.nan, 0.3], [0.0, 0.0], [1.0]]
    with engine.session("embedded") as spark:
        for answers in tried:
            frame = spark.createDataFrame(_table(answers))
            result = validate.check(frame, suite, tmp_path / "docs")
            for item in result.results:
                assert item.expectation_config is not None
                kind = item.expectation_config.type
                kwargs: dict[str, Any] = item.expectation_config.kwargs
                bounds = {name: kwargs[name] for name in Bounds.model_fields if name in kwargs}
                broken = expected.KINDS[kind](_table(answers), Bounds(**bounds))
                assert (broken == "") == item.success, (kind, answers, item)


def _table(answers: list[float | None]) -> pa.Table:
    rows = pa.array(range(len(answers)), pa.int64())
    return pa.table({"row": rows, bundle.PREDICTION: pa.array(answers, pa.float32())})
