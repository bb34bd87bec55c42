"""The bundle answers like torch, from raw columns, and repeats byte for byte."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from world import Checkout

from pipelines import bundle, stage, tables
from pipelines.errors import UserError
from pipelines.train import evaluate, fit, fitted, package

NUMBER = st.none() | st.floats(
    width=32, allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6
)
TEXT = st.none() | st.sampled_from(["EWR", "JFK", "UA", "a", "b", "", "never seen"])


@pytest.fixture
def packaged(features: Checkout) -> Checkout:
    """A checkout with a bundle."""
    params = features.params()
    fit.run(params)
    evaluate.run(params)
    package.run(params)
    return features


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.data())
def test_onnx_equals_torch_on_any_row(packaged: Checkout, rows: st.DataObject) -> None:
    scorer, model = _loaded()
    row = {
        column["name"]: [rows.draw(TEXT if column["type"] == "string" else NUMBER)]
        for column in scorer.contract["columns"]
    }
    table = pa.table(
        {
            c["name"]: pa.array(
                row[c["name"]], pa.string() if c["type"] == "string" else pa.float32()
            )
            for c in scorer.contract["columns"]
        }
    )
    codes = torch.from_numpy(model.encoding.codes(table))
    numbers = torch.from_numpy(model.encoding.floats(table))
    with torch.inference_mode():
        expected = model.network(codes, numbers).numpy()
    found = scorer.predict(table)
    assert found.shape == (1,)
    assert 0 <= found[0] <= 1
    np.testing.assert_allclose(found, expected, atol=1e-4)


_cache: dict[str, tuple[bundle.Scorer, fitted.Fitted]] = {}


def _loaded() -> tuple[bundle.Scorer, fitted.Fitted]:
    key = stage.digest(bundle.FOLDER)
    if key not in _cache:
        _cache[key] = bundle.load(bundle.FOLDER), fitted.load()
    return _cache[key]


def test_the_bundle_repeats_and_names_its_contract(packaged: Checkout) -> None:
    params = packaged.params()
    digest = stage.digest(bundle.FOLDER)
    package.run(params)
    assert stage.digest(bundle.FOLDER) == digest
    contract = json.loads((bundle.FOLDER / bundle.CONTRACT).read_text())
    assert [column["name"] for column in contract["columns"]] == params.dataset.features.names
    assert contract["as_of"] == "2013-06-01T00:00:00+00:00"
    content = (bundle.FOLDER / bundle.MODEL).read_bytes()
    assert str(packaged.folder).encode() not in content
    assert b".py" not in content


def test_the_reference_holds_what_drift_needs(packaged: Checkout) -> None:
    reference = pq.read_table(bundle.FOLDER / bundle.REFERENCE)
    assert {"label", "prediction"} <= set(reference.column_names)
    scorer, _ = _loaded()
    np.testing.assert_allclose(
        scorer.predict(reference), reference["prediction"].to_numpy(), atol=1e-6
    )


def test_a_missing_or_damaged_file_is_named(packaged: Checkout) -> None:
    readers = {
        bundle.FOLDER / bundle.CONTRACT: lambda _: bundle.load(bundle.FOLDER),
        bundle.FOLDER / bundle.MODEL: lambda _: bundle.load(bundle.FOLDER),
        bundle.FOLDER / bundle.REFERENCE: tables.read_file,
        fitted.FOLDER / fitted.DESCRIPTION: lambda _: fitted.load(),
        fitted.FOLDER / fitted.WEIGHTS: lambda _: fitted.load(),
        package.EVALUATION: stage.read_json,
    }
    for file, read in readers.items():
        content = file.read_bytes()
        read(file)
        for damaged in (content[: len(content) // 2], b"", b"\xff" * 1000):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=f"^{file}.* is no (whole|contract)"):
                read(file)
        file.unlink()
        with pytest.raises(UserError, match=f"^{file} is missing; run the stage that writes it"):
            read(file)
        file.mkdir()
        with pytest.raises(UserError, match=f"^{file} (cannot be read|is no whole)"):
            read(file)
        file.rmdir()
        file.write_bytes(content)


def test_a_gap_between_onnx_and_torch_fails_the_stage(
    packaged: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stage.digest(bundle.FOLDER)
    right = fitted.Fitted.predict
    monkeypatch.setattr(fitted.Fitted, "predict", lambda self, rows: right(self, rows) + 0.001)
    with pytest.raises(RuntimeError, match=r"differ by 1\.\d+e-03 on a test row"):
        package.run(packaged.params())
    assert stage.digest(bundle.FOLDER) == before


def test_what_no_replica_would_open_is_told_at_once(
    features: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where very many trees grew."""
    fit.run(features.params())
    evaluate.run(features.params())
    monkeypatch.setattr(bundle, "ELEMENTS", 1000)
    with pytest.raises(UserError, match="there are over 1,000 elements for a row"):
        package.run(features.params())
    assert not bundle.FOLDER.exists()
