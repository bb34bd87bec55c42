"""Which columns go into a column, as the SQL says it."""

import re

import pytest

from pipelines.ingest import datasets as shipped
from pipelines.lineage import columns
from pipelines.lineage.datasets import Dataset, File
from pipelines.params import Params


def table(name: str, *names: str) -> Dataset:
    return Dataset(name, (File("", "", rows=1, columns=tuple((one, "") for one in names)),))


A, B = table("data/raw/a", "k", "x", "t"), table("data/raw/b", "k", "y")


@pytest.mark.parametrize(
    ("sql", "sources"),
    [
        ("select x, x + 1 as more from a", {"x": ["a.x"], "more": ["a.x"]}),
        ("with w as (select *, x * t as p from a) select p from w", {"p": ["a.t", "a.x"]}),
        ("select a.k, y from a left join b on a.k = b.k", {"k": ["a.k"], "y": ["b.y"]}),
        ("select case when x > 0 then t end as c from a", {"c": ["a.t", "a.x"]}),
        ("select x as v from a union all select y from b", {"v": ["a.x", "b.y"]}),
        ("select sum(x) over w as s from a window w as (partition by k)", {"s": ["a.x"]}),
        ("select count(*) as n, 1 as one from a where x > 0", {"n": [], "one": []}),
        ("select x div 10 % 3 as d from a where t < :as_of", {"d": ["a.x"]}),
    ],
)  # fmt: skip
def test_values_are_sources_and_what_chooses_rows_is_none(
    sql: str, sources: dict[str, list[str]]
) -> None:
    found = columns.of_query(sql, [A, B])
    assert {
        column: [f"{name.rpartition('/')[2]}.{field}" for name, field in went]
        for column, went in found.items()
    } == sources


def test_every_feature_is_traced_to_columns_of_the_source(params: Params) -> None:
    raw = [table(f"data/raw/{name}", *one.columns) for name, one in params.dataset.tables.items()]
    events = columns.of_query(shipped.sql(params.dataset.name, "events"), raw)
    accepted = table("data/accepted", *events)
    features = columns.of_query(shipped.sql(params.dataset.name, "features"), [accepted])
    held = {(one.name, column) for one in raw for column in one.columns}
    origins = {
        name: {source for _, column in features[name] for source in events[column]}
        for name in params.dataset.features.names
    }
    assert set().union(*origins.values()) <= held
    # These count rows: no value of any column goes in.
    counts = re.compile(".*_(departed|due|overdue)_.*|flight_arrived_30d")
    assert {name for name in origins if not origins[name]} == set(filter(counts.fullmatch, origins))
    assert origins["tail_slack"] == {
        ("data/raw/airports", "tzone"), ("data/raw/flights", "dep_delay"),
        ("data/raw/flights", "sched_arr_time"), ("data/raw/flights", "sched_dep_time"),
        ("data/raw/flights", "time_hour"),
    }  # fmt: skip


def test_a_table_with_every_column_of_another_has_rows_of_it() -> None:
    chosen, other = table("data/good", "k", "x", "t", "why"), table("data/new", "k", "z")
    assert columns.of_chosen(chosen, [A]) == {c: [("data/raw/a", c)] for c in ("k", "x", "t")}
    assert columns.of_chosen(other, [A, B]) == {}
