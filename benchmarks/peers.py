"""The stages load, validate and featurize, as other engines do them, for benchmarks/scale.py.

DuckDB runs the dataset's own SQL, transpiled by sqlglot when it starts. Polars has no SQL that
could (no RANGE frame): its expressions stand in polars_peer.py. Each reads the same CSV, asks the
same expectations and writes the same months, sorted, with zstd.
Run in a workspace: python benchmarks/peers.py duckdb|polars load|validate|featurize
"""

import sys
from pathlib import Path
from typing import Any

from pipelines import months
from pipelines import params as parameters
from pipelines.ingest import datasets, featurize, load, validate
from pipelines.params import Params, Suite

# The months whose features are asked for.
ALL = {"first": "1900-01-01T00:00:00Z", "until": "2900-01-01T00:00:00Z"}
TYPES = {
    "int": "INTEGER", "long": "BIGINT", "float": "DOUBLE", "string": "VARCHAR",
    "timestamp": "TIMESTAMPTZ",
}  # fmt: skip
BROKEN = {
    "expect_column_values_to_not_be_null": "{column} is null",
    "expect_column_values_to_be_between": "{column} < {min_value} or {column} > {max_value}",
    "expect_column_values_to_match_regex": "not regexp_matches({column}, '{regex}')",
    "expect_column_values_to_be_in_set": "{column} not in {value_set}",
}


def main() -> None:
    engine, stage = sys.argv[1:]
    params = parameters.load()
    if engine == "polars":
        import polars_peer

        getattr(polars_peer, stage)(params)
    else:
        getattr(Duck(params), stage)()


def broken(suite: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """The expectations of rows, each with the condition in SQL that a row breaks."""
    found = []
    for one in suite:
        if one["type"] in BROKEN:
            kwargs = dict(one["kwargs"])
            if "value_set" in kwargs:
                kwargs["value_set"] = f"({', '.join(repr(value) for value in kwargs['value_set'])})"
            found.append((one, BROKEN[one["type"]].format(**kwargs)))
    return found


def suite(params: Params) -> list[dict[str, Any]]:
    path = validate.SUITES / f"{params.dataset.name}.json"
    return [one.model_dump(by_alias=True) for one in parameters.checked(path, Suite).expectations]


# Functions of Spark that DuckDB lacks.
MACROS = ("pmod(a, b) as (a % b + b) % b", "timestamp_seconds(s) as to_timestamp(s)")


class Duck:
    def __init__(self, params: Params) -> None:
        import duckdb

        self.params, self.dataset = params, params.dataset
        self.sql = duckdb.connect(":memory:").execute
        for setting in ("threads = 2", "TimeZone = 'UTC'", "preserve_insertion_order = false"):
            self.sql(f"set {setting}")
        for setting in ("memory_limit = '14GB'", "temp_directory = '.spilled'"):
            self.sql(f"set {setting}")

        for macro in MACROS:
            self.sql(f"create macro {macro}")

    def load(self) -> None:
        for name, table in self.dataset.tables.items():
            files = [str(path) for path in load.files(name, table)]
            columns = {column: TYPES[kind] for column, kind in table.columns.items()}
            self.sql(
                f"create table {name} as select * from read_csv({files}, header = true, "
                f"columns = {columns}, nullstr = ['', 'NA'])"
            )
            key = ", ".join(table.key)
            twice = f"select 1 from {name} group by {key} having count(*) > 1 limit 1"
            assert not self.sql(twice).fetchall(), f"{name}: a key stands twice"
        self._months("events", load.EVENTS)

    def validate(self) -> None:
        """Counts of what breaks each expectation, in one query; the rows, in another."""
        rules = broken(suite(self.params))
        self.sql(f"create view events as from read_parquet('{load.EVENTS}/*.parquet')")
        counts = ", ".join(f"count(*) filter ({rule})" for _, rule in rules)
        (*found, _, _) = self.sql(
            f"select {counts}, avg(dep_delay), count(*) from events"
        ).fetchone()
        about_rows = [
            (one, rule)
            for (one, rule), count in zip(rules, found, strict=True)
            if "mostly" not in one["kwargs"] and count
        ]
        bad = " or ".join(f"coalesce({rule}, false)" for _, rule in about_rows) or "false"
        for folder, where in ((validate.ACCEPTED, f"not ({bad})"), (validate.QUARANTINE, bad)):
            folder.mkdir(parents=True)
            for file in sorted(load.EVENTS.glob("*.parquet")):
                order = ", ".join(self.dataset.key)
                self._copy(
                    f"from read_parquet('{file}') where {where} order by {order}",
                    folder / file.name,
                )
        print({one["type"]: count for (one, _), count in zip(rules, found, strict=True) if count})

    def featurize(self) -> None:
        self.sql(f"create view accepted as from read_parquet('{validate.ACCEPTED}/*.parquet')")
        features = self.dataset.features
        plain = [*self.dataset.key, "prediction_time", "known_at"]
        slices = [name for name in self.dataset.slices if name not in features.names]
        test, val = self.params.test_from, self.params.val_from
        typed = [
            *(f'"{name}"' for name in plain if name not in features.names),
            f'"{self.dataset.target.column}" as label',
            *(f'"{name}"' for name in slices),
            f"case when {self.dataset.time} >= '{test}' then 'test' "
            f"when {self.dataset.time} >= '{val}' then 'val' else 'train' end as split",
            *(f'"{name}"::varchar as "{name}"' for name in features.categories),
            *(f'"{name}"::float as "{name}"' for name in features.numbers),
        ]
        self._months("features", featurize.FEATURES, ", ".join(typed))

    def _months(self, query: str, folder: Path, columns: str = "*") -> None:
        """What the dataset's query gives, in order of its key, a file for each month."""
        order, time = ", ".join(self.dataset.key), self.dataset.time
        text = transpiled(datasets.sql(self.dataset.name, query), self.params)
        self.sql(f"create table made as select {columns} from ({text}) order by {order}")
        first, last = self.sql(f"select min({time}), max({time}) from made").fetchone()
        folder.mkdir(parents=True)
        for month in months.between(first, last):
            begin, end = months.begin(month), months.end(month)
            rows = f"from made where {time} >= '{begin}' and {time} < '{end}' order by {order}"
            self._copy(rows, folder / f"{month}.parquet")

    def _copy(self, query: str, path: Path) -> None:
        self.sql(f"copy ({query}) to '{path}' (format parquet, compression zstd)")


def transpiled(sql: str, params: Params) -> str:
    """The dataset's Spark SQL for DuckDB. What sqlglot does not know of times is said here."""
    import sqlglot
    from sqlglot import exp

    values = {
        **{
            name: exp.cast(exp.Literal.string(text), "timestamptz")
            for name, text in (("as_of", params.as_of.isoformat()), *ALL.items())
        },
        **{
            name: exp.Literal.number(getattr(params.dataset, name))
            for name in ("horizon_minutes", "lookback_days", "settle_days")
        },
    }
    tree = sqlglot.parse_one(sql, read="spark")
    for node in list(tree.find_all(exp.Placeholder)):
        node.replace(values[node.name].copy())
    for node in list(tree.find_all(exp.StrToUnix, exp.TimeStrToUnix)):
        node.replace(exp.cast(exp.func("epoch", node.this), "bigint"))
    for node in list(tree.find_all(exp.AtTimeZone)):
        node.set("this", node.this.this if isinstance(node.this, exp.Cast) else node.this)
    for node in list(tree.find_all(exp.DayOfWeek)):
        # Spark's Sunday is 1, DuckDB's 0.
        node.replace(exp.paren(exp.Anonymous(this="dayofweek", expressions=[node.this]) + 1))
    return tree.sql("duckdb", identify=True)


if __name__ == "__main__":
    main()
