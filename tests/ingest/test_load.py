"""load types every file at the door: what is wrong is one line with file, line and column."""

import re
import shutil
from collections.abc import Callable

import pyarrow.parquet as pq
import pytest
from world import Checkout

from pipelines import engine, stage, tables
from pipelines.errors import UserError
from pipelines.ingest import datasets, fetch, load

MAY = "flights/2013-05.csv"


def _line(text: str, number: int, edit: Callable[[list[str]], list[str]]) -> str:
    lines = text.split("\n")
    lines[number - 1] = ",".join(edit(lines[number - 1].split(",")))
    return "\n".join(lines)


def _cell(column: int, value: str) -> Callable[[str], str]:
    return lambda text: _line(text, 4, lambda cells: [*cells[:column], value, *cells[column + 1 :]])


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda t: t.replace(",arr_delay,", ",delay,", 1),
            "column arr_delay is missing; expected year,",
        ),
        (lambda t: t.replace("dep_time,", "arr_delay,", 1), "column dep_time is missing"),
        (
            lambda t: t.replace("\n", ",x\n").replace(",x\n", ",year\n", 1),
            "column year stands twice",
        ),
        (lambda t: t.replace(",", ";"), "line 1 has no comma"),
        (lambda t: t[:-30], "the last line does not end; the file was cut short"),
        (lambda t: _line(t, 4, lambda c: c[:7]), "line 4: expected 19 columns, got 7"),
        (_cell(5, "soon"), "line 4, column dep_delay: expected int32: invalid value 'soon'"),
        (_cell(18, "yesterday"), r"line 4, column time_hour: expected timestamp"),
        (
            _cell(18, "2013-06-02T10:00:00Z"),
            "line 4: time_hour is 2013-06-02 06:00 in America/New_York; expected a time of 2013-05",
        ),
        (_cell(9, ""), "line 4: carrier is missing; it is part of the key"),
        (
            lambda t: "\n".join([*t.split("\n")[:4], t.split("\n")[3], ""]),
            r"lines 4 and 5 have the same key",
        ),
        (lambda t: t.split("\n")[0] + "\n", "no rows; expected at least one"),
        (lambda t: "", "it is empty"),
        (_cell(11, '"N1'), "line 4: expected 19 columns, got 12"),
        (lambda t: t.replace("\n", "\n\n", 3), "line 2 has no time_hour; is it empty?"),
    ],
)
def test_a_broken_file_is_one_line_and_no_output(
    checkout: Checkout, edit: Callable[[str], str], said: str
) -> None:
    path = checkout.source / MAY
    path.write_text(edit(path.read_text()))
    fetch.run(checkout.params())
    with pytest.raises(UserError) as raised:
        load.run(checkout.params())
    assert said in str(raised.value)
    assert f"data/raw/{MAY}" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not load.EVENTS.exists()


@pytest.fixture(params=["embedded", "local[2]"])
def written(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tables are written as from this engine; what makes them is the embedded one."""
    session = engine.session
    monkeypatch.setattr(engine, "session", lambda _: session("embedded"))
    return str(request.param)


def test_two_events_of_one_key_are_one_line(checkout: Checkout, written: str) -> None:
    """Their raw keys differ, and yet they are one departure."""
    path = checkout.source / MAY
    lines = path.read_text().splitlines()
    fields = dict(zip(lines[0].split(","), lines[3].split(","), strict=True))
    fields["sched_dep_time"] = str((int(fields["sched_dep_time"]) + 100) % 2400)
    path.write_text("\n".join([*lines, ",".join(fields.values()), ""]))
    checkout.set(engine=written)
    fetch.run(checkout.params())
    with pytest.raises(UserError) as raised:
        load.run(checkout.params())
    said = f"origin={fields['origin']}, carrier={fields['carrier']}, flight={fields['flight']};"
    assert re.search(f"2013-05: two rows have scheduled_at=.*, {said}", str(raised.value))
    assert not load.EVENTS.exists()


def test_an_event_without_a_time_is_not_lost(
    checkout: Checkout, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = datasets.sql("flights", "events")
    sometimes = "case when e.flight % 100 > 0 then e.scheduled_at end as scheduled_at"
    broken = text.replace("    e.scheduled_at,", f"    {sometimes},")
    assert broken != text
    monkeypatch.setattr(datasets, "sql", lambda *_: broken)
    checkout.set(engine=written)
    fetch.run(checkout.params())
    with pytest.raises(UserError, match="a row has no scheduled_at; expected the time of each"):
        load.run(checkout.params())
    assert not load.EVENTS.exists()


def test_a_query_that_is_wrong_is_one_line(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "sql", lambda *_: "select nonsense from flights")
    fetch.run(checkout.params())
    with pytest.raises(UserError, match=r"flights/events\.sql: .*nonsense"):
        load.run(checkout.params())


def test_a_quote_that_swallows_rows_is_one_line(checkout: Checkout) -> None:
    path = checkout.source / "airlines.csv"
    path.write_text(path.read_text().replace("American", '"American'))
    fetch.run(checkout.params())
    with pytest.raises(
        UserError, match=r"airlines\.csv: 17 lines hold 2 rows; a quote is not closed"
    ):
        load.run(checkout.params())


def test_text_that_is_no_utf8_is_one_line(checkout: Checkout) -> None:
    path = checkout.source / MAY
    path.write_bytes(path.read_bytes().replace(b"JFK", b"J\xff\xfe"))
    fetch.run(checkout.params())
    with pytest.raises(UserError, match=r"column origin: expected string: invalid UTF8"):
        load.run(checkout.params())


def test_a_mended_file_goes_on(checkout: Checkout) -> None:
    path = checkout.source / MAY
    good = path.read_text()
    path.write_text(good.replace(",", ";"))
    fetch.run(checkout.params())
    with pytest.raises(UserError):
        load.run(checkout.params())
    path.write_text(good)
    fetch.run(checkout.params())
    load.run(checkout.params())
    assert tables.count(load.EVENTS) > 0


def test_events_are_in_key_order_by_month_and_repeat(checkout: Checkout) -> None:
    params = checkout.params()
    fetch.run(params)
    load.run(params)
    first = {path.name: path.read_bytes() for path in load.EVENTS.iterdir()}
    shutil.rmtree(stage.STATE / "months")
    load.run(params)
    assert {path.name: path.read_bytes() for path in load.EVENTS.iterdir()} == first
    assert sorted(first) == [f"2013-0{month}.parquet" for month in range(1, 6)]
    for path in tables.months(load.EVENTS):
        rows = pq.read_table(path, columns=params.dataset.key).to_pylist()
        keys = [tuple(row.values()) for row in rows]
        assert keys == sorted(keys)
        assert len(set(keys)) == len(keys)
        assert {f"{row['scheduled_at']:%Y-%m}" for row in rows} == {path.stem}


def test_nothing_at_or_after_the_clock_is_known(checkout: Checkout) -> None:
    checkout.set(as_of="2013-03-15T18:00:00Z")
    params = checkout.params()
    fetch.run(params)
    load.run(params)
    events = tables.read(load.EVENTS)
    for column in ("scheduled_at", "departed_at", "arrived_at", "reading_at"):
        assert max(value for value in events[column].to_pylist() if value) < params.as_of
    open_rows = [row for row in events.to_pylist() if row["departed_at"] and not row["arrived_at"]]
    assert open_rows
    assert all(row["arr_delay"] is None for row in open_rows)


def test_a_clock_that_no_zone_has_is_the_users(checkout: Checkout) -> None:
    file = checkout.source / "airports.csv"
    file.write_text(file.read_text().replace("America/Chicago", "America/Nowhere"))
    fetch.run(checkout.params())
    with pytest.raises(UserError, match=r"events\.sql: .*America/Nowhere"):
        load.run(checkout.params())


@pytest.mark.parametrize(
    "change", [{"key": ["scheduled_at", "gate"]}, {"time": "gate"}], ids=["key", "time"]
)
def test_a_column_the_sql_does_not_give_is_named(
    checkout: Checkout, change: dict[str, object]
) -> None:
    checkout.set(dataset=change)
    fetch.run(checkout.params())
    with pytest.raises(UserError, match=r"events\.sql of flights gives no column gate; dataset"):
        load.run(checkout.params())
    assert not load.EVENTS.exists()
