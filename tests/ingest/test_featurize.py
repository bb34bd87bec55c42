"""featurize: point in time. What comes later changes nothing that was."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from world import Checkout

from pipelines import tables
from pipelines.ingest import datasets, featurize, fetch, load, validate

DATASETS = Path("pipelines/ingest/datasets")


def _loaded(checkout: Checkout) -> pa.Table:
    """The events, taken as accepted as they are."""
    fetch.run(checkout.params())
    load.run(checkout.params())
    return tables.read(load.EVENTS)


def _featurized(checkout: Checkout, events: pa.Table) -> pa.Table:
    """features of `events`, cut to what was known at the checkout's clock."""
    shutil.rmtree(validate.ACCEPTED, ignore_errors=True)
    month = pc.strftime(events["scheduled_at"], "%Y-%m")
    for name in pc.unique(month).to_pylist():
        held = events.filter(pc.equal(month, name))
        tables.write(held, validate.ACCEPTED / f"{name}.parquet")
    featurize.run(checkout.params())
    return tables.read(featurize.FEATURES)


@pytest.mark.parametrize("cut", ["2013-02-04T13:00", "2013-02-15", "2013-02-27T22:00"])
def test_cutting_the_future_off_changes_nothing_in_the_past(checkout: Checkout, cut: str) -> None:
    """The features of a flight with a label at the earlier clock are the same at a later one."""
    checkout.set(as_of="2013-03-01", featurize={"test_days": 5, "val_days": 5})
    key = checkout.params().dataset.key
    later = _by_key(_featurized(checkout, _loaded(checkout)), key)
    checkout.set(as_of=cut)
    past = _by_key(_featurized(checkout, _loaded(checkout)), key)
    assert past
    for name, row in past.items():
        assert repr(row) == repr(later[name])


def _by_key(features: pa.Table, key: list[str]) -> dict[tuple[object, ...], dict[str, Any]]:
    rows = features.drop_columns(["split"]).to_pylist()
    return {tuple(row[column] for column in key): row for row in rows}


# Moments in the morning's rush, on a grid of ten minutes and off it, and in the evening.
MOMENTS = [
    datetime(2013, 2, 4, 13, tzinfo=UTC),
    datetime(2013, 2, 15, 20, 25, tzinfo=UTC),
    datetime(2013, 2, 21, 1, 3, tzinfo=UTC),
]


def test_no_feature_holds_an_outcome_of_after_it_was_asked(checkout: Checkout) -> None:
    """Outcomes of after a moment may be anything, a row's own included: its features stay."""
    checkout.set(as_of="2013-03-01", featurize={"test_days": 5, "val_days": 5})
    events = _loaded(checkout)
    assert _told_by_the_future(checkout, events) == set()


@pytest.mark.parametrize("leak", ["f.air_time - f.block_minutes", "f.dep_delay"])
def test_a_feature_that_holds_its_own_outcome_is_found(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch, leak: str
) -> None:
    checkout.set(as_of="2013-03-01", featurize={"test_days": 5, "val_days": 5})
    events = _loaded(checkout)
    monkeypatch.setattr(datasets, "__file__", str(checkout.folder / DATASETS / "__init__.py"))
    sql = checkout.folder / DATASETS / "flights" / "features.sql"
    line = "t.delay as tail_delay"
    assert line in sql.read_text()
    sql.write_text(sql.read_text().replace(line, f"{leak} as tail_delay"))
    assert _told_by_the_future(checkout, events) == {"tail_delay"}


def _told_by_the_future(checkout: Checkout, events: pa.Table) -> set[str]:
    """The features that change where only outcomes of after a moment change, in rows asked by
    then.
    """
    key, names = checkout.params().dataset.key, checkout.params().dataset.features.names
    right = _by_key(_featurized(checkout, events), key)
    told = set()
    for moment in MOMENTS:
        changed = _by_key(_featurized(checkout, _altered(events, moment)), key)
        assert any(repr(changed[name]["label"]) != repr(right[name]["label"]) for name in right)
        asked = [name for name, row in right.items() if row["prediction_time"] <= moment]
        assert any(moment - right[name]["prediction_time"] < timedelta(hours=2) for name in asked)
        told |= {
            feature
            for name in asked
            for feature in (*names, "known_at")
            if repr(right[name][feature]) != repr(changed[name][feature])
        }
    return told


def _altered(events: pa.Table, moment: datetime) -> pa.Table:
    """Every outcome that became known after `moment` is another, known later than before."""
    rows = events.to_pylist()
    for row in rows:
        for at, outcomes in (
            ("departed_at", ["dep_delay"]),
            ("arrived_at", ["arr_delay", "air_time"]),
        ):
            if row[at] is not None and row[at] > moment:
                row[at] += timedelta(minutes=53)
                for name in outcomes:
                    row[name] += 53
    return pa.Table.from_pylist(rows, events.schema)


def test_no_row_knows_what_comes_after_its_prediction_time(checkout: Checkout) -> None:
    features = _featurized(checkout, _loaded(checkout))
    for row in features.select(["known_at", "prediction_time", "scheduled_at"]).to_pylist():
        assert row["known_at"] is None or row["known_at"] <= row["prediction_time"]
        assert (row["scheduled_at"] - row["prediction_time"]).total_seconds() == 7200


def test_the_split_is_by_time(checkout: Checkout) -> None:
    params = checkout.params()
    for row in _featurized(checkout, _loaded(checkout)).to_pylist():
        at = row["scheduled_at"]
        expected = "test" if at >= params.test_from else "val" if at >= params.val_from else "train"
        assert row["split"] == expected


def test_levels_equal_a_plain_count(checkout: Checkout) -> None:
    """A rolling level, counted again in Python, on the grid that features.sql names."""
    events = _loaded(checkout)
    features = _featurized(checkout, events).to_pylist()
    flights = events.to_pylist()
    for row in features[:: len(features) // 12]:
        asked = int(row["prediction_time"].timestamp()) // 600
        seen = [
            e
            for e in flights
            if e["origin"] == row["origin"]
            and e["departed_at"]
            and asked - 17 <= -(-int(e["departed_at"].timestamp()) // 600) <= asked
        ]
        delays = [min(e["dep_delay"], 180) for e in seen]
        expected = sum(delays) / len(delays) if delays else None
        assert row["origin_delay_3h"] == (pytest.approx(expected, rel=1e-6) if delays else None)
        assert row["label"] in (0, 1)


def test_a_column_the_sql_does_not_give_is_named(checkout: Checkout) -> None:
    from pipelines.errors import UserError

    events = _loaded(checkout)
    checkout.set(dataset={"slices": ["terminal"]})
    with pytest.raises(UserError, match=r"features\.sql of flights gives no column terminal"):
        _featurized(checkout, events)
