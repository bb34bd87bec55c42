"""The gate: the run's own verdicts, the budget, and the champion on the same rows."""

import json
import shutil
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from deploy.tiny import make_bundle
from world import Checkout

from pipelines import bundle, stage, tables, tracking
from pipelines.deploy import gate, register, registry
from pipelines.errors import UserError

ROWS = 3000


@pytest.fixture
def judged(checkout: Checkout) -> Checkout:
    """Test rows of May, the verdicts of a good run, and a champion that knows the law."""
    random = np.random.default_rng(0)
    begin = datetime(2013, 5, 3, tzinfo=UTC)
    x = random.normal(size=ROWS).astype(np.float32)
    table = pa.table({
        "scheduled_at": [begin + timedelta(minutes=13 * row) for row in range(ROWS)],
        "label": (random.random(ROWS) < 1 / (1 + np.exp(-x))).astype(np.int64),
        "x": x,
        "origin": random.choice(["EWR", "JFK"], ROWS),
        "carrier": ["UA"] * ROWS,
        "part_of_day": ["morning"] * ROWS,
        "split": ["test"] * ROWS,
    })  # fmt: skip
    tables.write(table, gate.FEATURES / "2013-05.parquet")
    _verdicts()
    make_bundle()
    register.run(checkout.params())
    gate.run(checkout.params())
    return checkout


def _verdicts(quarantined: int = 0, reasons: tuple[str, ...] = (), parity: float = 1e-7) -> None:
    for name, verdict in {
        "validate": {"rows": 100, "quarantined": quarantined},
        "evaluate": {"passed": not reasons, "reasons": list(reasons)},
        "package": {"parity": parity},
    }.items():
        stage.write_json(stage.Path(f"reports/{name}/verdict.json"), verdict)


def _tags(checkout: Checkout, version: int) -> dict[str, str]:
    store, _ = tracking.client(checkout.params())
    return dict(store.get_model_version("flights", str(version)).tags)


def test_the_first_version_has_nobody_to_beat(judged: Checkout) -> None:
    tags = _tags(judged, 1)
    assert (tags["gate"], tags["gate_against"]) == ("passed", "none")
    assert "there is no other champion" in tags["gate_reason"]
    assert json.loads(tags["gate_evidence"]) == stage.read_json(gate.RECORD)["evidence"]


def test_an_equal_challenger_passes_with_its_evidence(judged: Checkout) -> None:
    make_bundle(shift=0.01)
    register.run(judged.params())
    gate.run(judged.params())
    record = json.loads(gate.RECORD.read_text())
    assert (record["gate"], record["against"]) == ("passed", 1)
    compared = record["evidence"]["comparison"]
    assert (compared["rows"], compared["days"]) == (ROWS, 28)
    assert set(record["evidence"]["cost"]) == {"row_ms", "thousand_rows_ms", "bundle_mb"}
    assert "against the champion on 3,000 rows of 28 days" in _tags(judged, 2)["gate_reason"]


def test_a_worse_challenger_may_not_be_released(judged: Checkout) -> None:
    """Each fault alone keeps a version out, and stands on it as the reason."""
    budget = judged.params().gate.model_dump()
    cases: list[tuple[dict, dict, dict, str]] = [
        ({"slope": -1.0}, {}, {}, "log loss may rise by "),
        ({"shift": 0.01}, {"quarantined": 50}, {}, "validate: 50.00% of the rows are in quarant"),
        ({"shift": 0.02}, {"reasons": ("AUC 0.5",)}, {}, "evaluate: AUC 0.5"),
        ({"shift": 0.03}, {"parity": 0.1}, {}, "package: parity is 0.1; allowed 0.0001"),
        ({"shift": 0.04}, {}, {"max_bundle_mb": 0.0001}, "bundle_mb is "),
        ({"shift": 0.05}, {}, {"max_row_ms": 1e-6}, "row_ms is "),
    ]
    for version, (worse, verdicts, limits, reason) in enumerate(cases, 2):
        make_bundle(**worse)
        _verdicts(**verdicts)
        judged.set(gate=budget | limits)
        register.run(judged.params())
        with pytest.raises(UserError, match=f"version {version} may not be released: .*{reason}"):
            gate.run(judged.params())
        tags = _tags(judged, version)
        assert tags["gate"] == "failed"
        assert reason in tags["gate_reason"]


def test_rows_that_the_champion_was_fitted_on_prove_nothing(judged: Checkout) -> None:
    store, _ = tracking.client(judged.params())
    store.delete_registered_model("flights")
    make_bundle(as_of="2013-09-01T00:00:00Z")
    register.run(judged.params())
    make_bundle(shift=0.01)
    register.run(judged.params())
    with pytest.raises(UserError, match="version 1 was fitted on every one of the test rows"):
        gate.run(judged.params())


def test_a_champion_of_features_that_are_gone_is_no_rival(judged: Checkout) -> None:
    table = tables.read(gate.FEATURES)
    renamed = ["z" if name == "x" else name for name in table.schema.names]
    tables.write(table.rename_columns(renamed), gate.FEATURES / "2013-05.parquet")
    make_bundle(column="z")
    register.run(judged.params())
    gate.run(judged.params())
    assert "the champion wants x, a feature no more" in _tags(judged, 2)["gate_reason"]


def test_a_damaged_month_of_features_is_one_line(judged: Checkout) -> None:
    make_bundle(shift=0.01)
    register.run(judged.params())
    file = gate.FEATURES / "2013-05.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"2013-05\.parquet is no whole Parquet file"):
        gate.run(judged.params())


def test_without_a_bundle_it_is_one_line(judged: Checkout) -> None:
    shutil.rmtree(bundle.FOLDER)
    with pytest.raises(UserError, match="models/bundle is missing; make it: make run"):
        gate.run(judged.params())


def test_a_damaged_champion_is_one_line(judged: Checkout) -> None:
    make_bundle(shift=0.01)
    register.run(judged.params())
    for kept in judged.folder.glob(".state/mlflow/**/extra_files/model.onnx"):
        kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="flights version 1 is damaged: its bundle is "):
        gate.run(judged.params())


def test_a_champion_that_another_key_signed_is_not_opened(judged: Checkout) -> None:
    """Who can write to the registry can give a version another bundle, and the tag that fits."""
    make_bundle(shift=0.01)
    register.run(judged.params())
    held = registry.of(judged.params())
    held.tag(1, {"bundle": "ab" * 32})
    with pytest.raises(UserError, match="flights version 1: its signature is not of"):
        gate.run(judged.params())
    held.store.delete_model_version_tag("flights", "1", "signature")
    with pytest.raises(UserError, match="flights version 1 is not signed"):
        gate.run(judged.params())
