"""load types every file at the door: what is wrong is one line with file, line and column."""

import shutil
from collections.abc import Callable

import pyarrow.parquet as pq
import pytest
from world import Checkout

from pipelines import stage, tables
from pipelines.errors import UserError
from pipelines.ingest import fetch, load

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
        (_cell(5, "soon"), "line 4, column dep_delay: expected int64: invalid value 'soon'"),
        (_cell(18, "yesterday"), r"line 4, column time_hour: expected timestamp"),
        (_cell(1, "6"), "line 4 is of month 2013-6; expected 2013-05"),
        (_cell(9, ""), "line 4: carrier is missing; it is part of the key"),
        (
            lambda t: "\n".join([*t.split("\n")[:4], t.split("\n")[3], ""]),
            r"lines 4 and 5 have the same key",
        ),
        (lambda t: t.split("\n")[0] + "\n", "no rows; expected at least one"),
        (lambda t: "", "it is empty"),
        (_cell(11, '"N1'), "line 4: expected 19 columns, got 12"),
        (lambda t: t.replace("\n", "\n\n", 3), "line 2 has no year and month; is it empty?"),
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
