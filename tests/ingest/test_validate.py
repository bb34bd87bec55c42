"""validate: broken rows go to quarantine with their reasons, a broken table stops the run."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from world import Checkout

from pipelines import stage, tables
from pipelines.errors import UserError
from pipelines.ingest import fetch, load, validate


@pytest.fixture
def events(checkout: Checkout) -> Checkout:
    """A checkout that is loaded."""
    fetch.run(checkout.params())
    load.run(checkout.params())
    return checkout


def _expect(checkout: Checkout, kind: str, **kwargs: Any) -> None:
    path = checkout.folder / "expectations" / "flights.json"
    suite = json.loads(path.read_text())
    suite["expectations"].append({"type": kind, "kwargs": kwargs})
    path.write_text(json.dumps(suite))


def test_every_row_is_in_exactly_one_place(events: Checkout) -> None:
    _expect(events, "expect_column_values_to_be_between", column="dep_delay", max_value=200)
    events.set(validate={"max_quarantine": 0.2})
    params = events.params()
    validate.run(params)
    accepted, broken = tables.read(validate.ACCEPTED), tables.read(validate.QUARANTINE)
    late = [row for row in tables.read(load.EVENTS).to_pylist() if (row["dep_delay"] or 0) > 200]
    reason = "dep_delay: column_values_to_be_between"
    assert {row["scheduled_at"] for row in late} <= set(broken["scheduled_at"].to_pylist())
    assert sum(reason in reasons for reasons in broken["reasons"].to_pylist()) == len(late) > 0
    keys = [
        tuple(row.values())
        for table in (accepted, broken)
        for row in table.select(params.dataset.key).to_pylist()
    ]
    assert len(keys) == len(set(keys)) == tables.count(load.EVENTS)
    verdict = json.loads((validate.VERDICT).read_text())
    assert verdict["accepted"] + verdict["quarantined"] == verdict["rows"] == len(keys)
    assert stage.is_page_of(validate.DOCS, validate.VERDICT)
    (page,) = validate.DOCS.glob("validations/**/*.html")
    assert reason.partition(":")[0] in page.read_text()


def test_a_row_is_found_in_an_hour_that_comes_twice_on_the_clock_here(
    events: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    hour = [datetime(2013, 4, 6, at, tzinfo=UTC) for at in (13, 16)]
    (file,) = (path for path in tables.months(load.EVENTS) if path.stem == "2013-04")
    month = pq.read_table(file)
    at = month["scheduled_at"]
    there = pc.and_(pc.greater_equal(at, hour[0]), pc.less(at, hour[1]))
    distance = pc.if_else(there, pa.scalar(99_999, pa.int32()), month["distance"])
    place = month.schema.get_field_index("distance")
    tables.write(month.set_column(place, "distance", distance), file)
    monkeypatch.setenv("TZ", "Pacific/Auckland")  # where 14 to 16 in UTC are one hour, twice
    ended = events.run("pipelines.ingest.validate")
    assert ended.status == 0, ended
    assert f"{pc.sum(there).as_py():,} in quarantine" in ended.out


@pytest.mark.parametrize(
    ("kind", "kwargs", "said"),
    [
        (
            "expect_table_row_count_to_be_between",
            {"min_value": 10**9},
            "table_row_count_to_be_between",
        ),
        (
            "expect_column_mean_to_be_between",
            {"column": "distance", "max_value": 1},
            "distance: column_mean",
        ),
        (
            "expect_column_values_to_be_between",
            {"column": "distance", "max_value": 1, "mostly": 0.9},
            "distance",
        ),
        (
            "expect_column_values_to_be_between",
            {"column": "distance", "max_value": 500},
            "max_quarantine",
        ),
    ],
)
def test_a_broken_table_stops_the_run(
    events: Checkout, kind: str, kwargs: dict[str, Any], said: str
) -> None:
    _expect(events, kind, **kwargs)
    with pytest.raises(UserError, match=said):
        validate.run(events.params())
    assert not validate.ACCEPTED.exists()
    assert not validate.QUARANTINE.exists()


def test_an_expectation_that_raised_is_a_fault(events: Checkout) -> None:
    _expect(events, "expect_column_values_to_match_regex", column="origin", regex="(")
    with pytest.raises(RuntimeError, match=r"origin: .* could not be computed"):
        validate.run(events.params())
    assert not validate.ACCEPTED.exists()


def test_a_column_that_is_none_is_the_suites_mistake(events: Checkout) -> None:
    _expect(events, "expect_column_values_to_be_between", column="no_such_column", max_value=1)
    with pytest.raises(UserError, match=r"flights\.json: data/events has no column no_such_column"):
        validate.run(events.params())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON: Expecting property name"),
        ("5", "is no mapping; expected the keys name, expectations"),
        ('{"name": "flights", "expectations": []}', "expectations: list should have at least 1"),
        ('{"name": "flights", "expectations": [{"kwargs": {}}]}', "expectations.0.type: missing"),
        ('{"name": "flights", "expectations": [{"type": "expect_magic"}]}', "expect_magic not"),
    ],
)
def test_a_suite_that_is_none_is_one_line(events: Checkout, text: str, said: str) -> None:
    Path("expectations/flights.json").write_text(text)
    with pytest.raises(UserError) as raised:
        validate.run(events.params())
    assert str(raised.value).startswith("expectations/flights.json")
    assert said in str(raised.value)


def test_an_expectation_that_is_not_known_is_not_left_out(events: Checkout) -> None:
    """Great Expectations would go on with the others."""
    _expect(events, "expect_column_values_to_be_in_sett", column="origin", value_set=["EWR"])
    with pytest.raises(UserError, match=r"flights\.json: expect_column_values_to_be_in_sett not"):
        validate.run(events.params())
    assert not validate.ACCEPTED.exists()


def test_what_a_share_tolerates_is_counted_and_not_listed(
    events: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the result would grow with the table."""
    _expect(
        events, "expect_column_values_to_be_between", column="distance", max_value=700, mostly=0.1
    )
    check, seen = validate.check, []
    monkeypatch.setattr(validate, "check", lambda *given: seen.append(check(*given)) or seen[0])
    validate.run(events.params())
    (item,) = (
        item for item in seen[0].results if item.expectation_config.kwargs.get("mostly") == 0.1
    )
    assert item.success
    assert item.result["unexpected_count"] > 1000
    assert len(str(item.to_json_dict())) < 10_000
