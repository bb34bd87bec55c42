"""featurize: point in time. What comes later changes nothing that was."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from world import Checkout

from pipelines import tables
from pipelines.ingest import featurize, fetch, load

JAVA = shutil.which("java") is not None


def _loaded(checkout: Checkout) -> pa.Table:
    """The events, taken as accepted as they are."""
    fetch.run(checkout.params())
    load.run(checkout.params())
    return tables.read(load.EVENTS)


def _featurized(checkout: Checkout, events: pa.Table) -> pa.Table:
    """features of `events`, cut to what was known at the checkout's clock."""
    shutil.rmtree("data/accepted", ignore_errors=True)
    tables.write(events, Path("data/accepted/all.parquet"))
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


def _by_key(features: pa.Table, key: list[str]) -> dict[tuple[object, ...], dict[str, object]]:
    rows = features.drop_columns(["split"]).to_pylist()
    return {tuple(row[column] for column in key): row for row in rows}


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


@pytest.mark.jvm
@pytest.mark.skipif(not JAVA, reason="the JVM engine needs Java")
def test_the_same_bytes_on_the_jvm_engine(checkout: Checkout) -> None:
    """Stages as processes: a process holds one engine."""
    checkout.set(as_of="2013-03-01", featurize={"test_days": 5, "val_days": 5})
    fetch.run(checkout.params())

    def made() -> dict[str, bytes]:
        for folder in ("data/events", "data/accepted", "data/features"):
            shutil.rmtree(folder, ignore_errors=True)
        assert checkout.run("pipelines.ingest.load").status == 0
        shutil.copytree(load.EVENTS, "data/accepted")
        assert checkout.run("pipelines.ingest.featurize").status == 0
        folders = (load.EVENTS, featurize.FEATURES)
        return {str(p): p.read_bytes() for folder in folders for p in sorted(folder.iterdir())}

    embedded = made()
    checkout.set(engine="local[2]")
    assert made() == embedded
