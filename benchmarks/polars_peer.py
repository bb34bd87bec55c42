"""What events.sql, the suite and features.sql say of the flights, in Polars' expressions.

For benchmarks/scale.py alone. Written once more by hand, so a change of the SQL wants one here: the
comparison of all values tells. Polars' window over (t - w, t] of whole numbers is the SQL's RANGE
frame, and its join_asof is what the SQL says as a union of readings and questions.
"""

from collections.abc import Sequence
from pathlib import Path

import peers
import polars as pl

from pipelines import months
from pipelines.ingest import featurize as features
from pipelines.ingest import load as events
from pipelines.ingest import validate as checked
from pipelines.params import Params

TYPES = {
    "int": pl.Int32,
    "long": pl.Int64,
    "float": pl.Float64,
    "string": pl.String,
    "timestamp": pl.String,
}
UTC = pl.Datetime("us", "UTC")
Levels = list[tuple[str, list[str], list[tuple[int, str, list[str]]]]]


def load(params: Params) -> None:
    dataset = params.dataset
    raw = {}
    for name, table in dataset.tables.items():
        kinds = {column: TYPES[kind] for column, kind in table.columns.items()}
        files = events.files(name, table)
        rows = pl.read_csv(files, schema_overrides=kinds, null_values=["", "NA"])
        assert not rows.select(table.key).is_duplicated().any(), f"{name}: a key stands twice"
        times = [column for column, kind in table.columns.items() if kind == "timestamp"]
        stamp = "%Y-%m-%dT%H:%M:%SZ"
        raw[name] = rows.with_columns(
            pl.col(times).str.to_datetime(stamp, time_unit="us").dt.replace_time_zone("UTC")
        )
    as_of = pl.lit(params.as_of).cast(UTC)
    span = pl.duration
    at = pl.col("time_hour") + span(minutes="minute")
    rows = (
        raw["flights"]
        .with_columns(scheduled_at=at, prediction_time=at - span(minutes=dataset.horizon_minutes))
        .filter(pl.col("scheduled_at") < as_of)
        .join(raw["airports"].select("faa", "tzone"), left_on="dest", right_on="faa", how="left")
        .with_columns(pl.col("tzone").fill_null("America/Puerto_Rico"))
    )
    rows = pl.concat(
        part.with_columns(
            clock=pl.col("scheduled_at").dt.convert_time_zone(zone).dt.hour().cast(pl.Int64) * 60
            + pl.col("scheduled_at").dt.convert_time_zone(zone).dt.minute()
        )
        for (zone,), part in rows.partition_by("tzone", as_dict=True).items()
    )
    arrival = pl.col("sched_arr_time") // 100 * 60 + pl.col("sched_arr_time") % 100
    settled = pl.col("scheduled_at") + span(days=dataset.settle_days)
    rows = (
        rows.with_columns(
            block_minutes=(arrival - pl.col("clock")) % 1440,
            told_before=pl.min_horizontal(as_of, settled),
            settled_at=settled,
        )
        .with_columns(
            departed_at=pl.col("scheduled_at") + span(minutes=pl.col("dep_delay")),
            arrived_at=pl.col("scheduled_at")
            + span(minutes=pl.col("block_minutes") + pl.col("arr_delay")),
        )
        .with_columns(
            elapsed_minutes=(pl.col("arrived_at") - pl.col("departed_at")).dt.total_minutes()
        )
        .with_columns(
            *(_until(name, "departed_at") for name in ("departed_at", "dep_delay")),
            *(_until(name, "arrived_at") for name in ("arrived_at", *OUTCOME)),
        )
    )
    planes = raw["planes"].select(
        "tailnum", "manufacturer", "seats", plane_year="year", plane_model="model"
    )
    weather = raw["weather"].select(
        "origin", *WEATHER, reading_at="time_hour", time_hour="time_hour"
    )
    rows = (
        rows.drop("time_hour")
        .join(planes, on="tailnum", how="left")
        .sort("prediction_time")
        .join_asof(
            check_sortedness=False,
            other=weather.sort("time_hour"),
            left_on="prediction_time",
            right_on="time_hour",
            by="origin",
            allow_exact_matches=False,
        )
    )
    known = pl.col("reading_at") >= pl.col("scheduled_at") - span(days=dataset.lookback_days)
    rows = rows.with_columns(pl.when(known).then(pl.col("reading_at", *WEATHER)))
    _write(rows.select(EVENTS), dataset.key, dataset.time, events.EVENTS)


WEATHER = [
    "temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib",
]  # fmt: skip
OUTCOME = ["arr_delay", "air_time", "elapsed_minutes"]
EVENTS = [
    "scheduled_at", "origin", "carrier", "flight", "prediction_time", "dest", "tailnum",
    "sched_dep_time", "sched_arr_time", "block_minutes", "distance", "departed_at", "dep_delay",
    "arrived_at", *OUTCOME, "plane_year", "manufacturer", "plane_model", "seats",
    "reading_at", *WEATHER,
]  # fmt: skip


def _until(name: str, moment: str) -> pl.Expr:
    told = pl.col(moment) < pl.col("told_before")
    if name.endswith("_delay"):  # one that is too long for any flight is seen
        told = told | (pl.col(moment) >= pl.col("settled_at"))
    return pl.when(told).then(pl.col(name)).alias(name)


def validate(params: Params) -> None:
    rules = peers.broken(peers.suite(params))
    # Polars' SQL says a match so.
    conditions = [
        pl.sql_expr(rule.replace("regexp_matches(", "regexp_like(")).fill_null(False)
        for _, rule in rules
    ]
    rows = pl.scan_parquet(f"{events.EVENTS}/*.parquet")
    counts = rows.select(
        *(c.sum().alias(str(number)) for number, c in enumerate(conditions)),
        pl.col("dep_delay").mean().alias("mean"),
    ).collect()
    found = counts.row(0)[: len(rules)]
    bad = pl.any_horizontal(
        pl.lit(False),
        *(
            condition
            for (one, _), condition, count in zip(rules, conditions, found, strict=True)
            if "mostly" not in one["kwargs"] and count
        ),
    )
    for folder, where in ((checked.ACCEPTED, ~bad), (checked.QUARANTINE, bad)):
        folder.mkdir(parents=True)
        for file in sorted(events.EVENTS.glob("*.parquet")):
            month = pl.read_parquet(file).filter(where)
            month.write_parquet(folder / file.name, compression="zstd")
    print({one["type"]: count for (one, _), count in zip(rules, found, strict=True) if count})


LEVELS: Levels = [
    ("o", ["origin"], [(6, "1h", ["due", "departed", "delay"]),
        (18, "3h", ["due", "departed", "delay", "dep_late"]),
        (144, "24h", ["due", "departed", "delay"])]),
    ("co", ["carrier", "origin"], [(18, "3h", ["due", "departed", "delay"])]),
    ("c", ["carrier"], [(36, "6h", ["departed", "delay"]), (144, "24h", ["arrived", "late"])]),
    ("d", ["dest"], [(36, "6h", ["due", "departed", "delay", "arrived", "arr_delay"]),
        (144, "24h", ["arrived", "late"])]),
]  # fmt: skip
HABITS: Levels = [
    ("ch", ["carrier"], [(7, "7d", ["arrived", "late"]), (30, "30d", ["arrived", "late"])]),
    ("r", ["origin", "dest"], [(7, "7d", ["arrived", "late"]),
        (30, "30d", ["arrived", "late", "arr_delay", "gained"])]),
    ("h", ["carrier", "flight"], [(30, "30d", ["arrived", "late", "arr_delay", "gained"])]),
]  # fmt: skip
COUNTS = ["due", "departed", "delay", "dep_late", "arrived", "arr_delay", "late", "gained"]


def featurize(params: Params) -> None:
    c, dataset = pl.col, params.dataset
    flights = pl.read_parquet(f"{checked.ACCEPTED}/*.parquet").with_columns(
        asked=c("prediction_time").dt.epoch("s"),
        local_time=c("scheduled_at").dt.convert_time_zone("America/New_York"),
        label=(c("arr_delay") > 15).fill_null(False).cast(pl.Int64),
        scheduled=c("scheduled_at").dt.epoch("s"),
        departed_s=c("departed_at").dt.epoch("s"),
        arrived_s=c("arrived_at").dt.epoch("s"),
    )
    flights = flights.with_columns(tick=c("asked") // 600, day=(c("asked") - 28800) // 86400)
    seen = _seen(flights)
    rows = flights.filter(c("arr_delay").is_not_null())
    for levels, grid, point in (
        (LEVELS, "tick", (c("at") + 599) // 600),
        (HABITS, "day", (c("at") - 28800 + 86399) // 86400),
    ):
        line = seen.with_columns(point.alias(grid))
        for short, key, frames in levels:
            rows = _level(rows, flights, line, short, key, grid, frames)
    rows = _tail(rows, flights, dataset.lookback_days)
    _write(_chosen(rows, params), dataset.key, dataset.time, features.FEATURES)


def _seen(flights: pl.DataFrame) -> pl.DataFrame:
    """What became known, and when."""
    c, key = pl.col, ["origin", "dest", "carrier", "flight"]
    due = flights.select(*key, at="scheduled", due=pl.lit(1, pl.Int64))
    departed = flights.filter(c("departed_s").is_not_null()).select(
        *key,
        at="departed_s",
        departed=pl.lit(1, pl.Int64),
        delay=c("dep_delay").clip(upper_bound=180),
        dep_late=(c("dep_delay") > 15).cast(pl.Int64),
    )
    arrived = flights.filter(c("arrived_s").is_not_null()).select(
        *key,
        at="arrived_s",
        arrived=pl.lit(1, pl.Int64),
        arr_delay=c("arr_delay").clip(upper_bound=180),
        late="label",
        gained=c("dep_delay") - c("arr_delay"),
    )
    return pl.concat([due, departed, arrived], how="diagonal")


def _level(
    rows: pl.DataFrame,
    flights: pl.DataFrame,
    seen: pl.DataFrame,
    short: str,
    key: list[str],
    grid: str,
    frames: Sequence[tuple[int, str, list[str]]],
) -> pl.DataFrame:
    """The rows with the sums of a level, and its latest observation."""
    c = pl.col
    line = pl.concat(
        [
            seen.select(*key, grid, "at", *COUNTS),
            flights.select(*key, grid).unique(),
        ],
        how="diagonal",
    )
    line = line.group_by(*key, grid).agg(c("at").max(), c(COUNTS).sum()).sort(*key, grid)
    longest = max(width for width, _, _ in frames)
    for width, name, sums in frames:
        asked = [c(column).sum().alias(f"{short}_{column}_{name}") for column in sums]
        if width == longest:
            asked.append(c("at").max().alias(f"{short}_seen"))
        window = line.rolling(grid, period=f"{width}i", group_by=key).agg(asked)
        rows = rows.join(window, on=[*key, grid], how="left")
    return rows


def _tail(rows: pl.DataFrame, flights: pl.DataFrame, lookback: int) -> pl.DataFrame:
    """The rows with the aircraft's last departure from New York."""
    c = pl.col
    gone = (
        flights.filter(c("departed_s").is_not_null() & c("tailnum").is_not_null())
        .group_by("tailnum", "departed_s")
        .agg(c("dep_delay").max().alias("t_delay"), (120 * c("block_minutes")).max().alias("b"))
        .select("tailnum", "t_delay", t_back=c("departed_s") + c("b"), t_departed="departed_s")
        .with_columns(at=c("t_departed"))
    )
    joined = rows.sort("asked").join_asof(
        gone.sort("at"), left_on="asked", right_on="at", by="tailnum", check_sortedness=False
    )
    known = c("t_departed") >= c("asked") - 86400 * lookback
    return joined.with_columns(pl.when(known).then(c("t_departed", "t_delay", "t_back")))


def _chosen(rows: pl.DataFrame, params: Params) -> pl.DataFrame:
    c = pl.col
    dataset, hour = params.dataset, pl.col("local_time").dt.hour()
    slack = (c("scheduled") - c("t_back")) / 60

    def share(above: pl.Expr, below: str) -> pl.Expr:
        return pl.when(c(below) != 0).then(above / c(below))

    def sums(short: str, name: str, window: str, of: str, to: str) -> pl.Expr:
        return share(c(f"{short}_{of}_{window}"), f"{short}_{to}_{window}").alias(name)

    given = [
        pl.from_epoch(
            pl.max_horizontal(
                c("reading_at").dt.epoch("s"),
                "t_departed",
                *(f"{short}_seen" for short, _, _ in [*LEVELS, *HABITS]),
            )
        ).cast(pl.Datetime("us")).dt.replace_time_zone("UTC").alias("known_at"),
        pl.when(hour < 10).then(pl.lit("morning"))
        .when(hour < 14).then(pl.lit("midday"))
        .when(hour < 18).then(pl.lit("afternoon"))
        .otherwise(pl.lit("evening")).alias("part_of_day"),
        (c("local_time").dt.weekday() % 7 + 1).alias("weekday"),
        (c("sched_dep_time") // 100 * 60 + c("sched_dep_time") % 100).alias("departure_minute"),
        (c("sched_arr_time") // 100 * 60 + c("sched_arr_time") % 100).alias("arrival_minute"),
        (c("scheduled_at").dt.year() - c("plane_year")).alias("plane_age"),
        c("o_departed_1h").alias("origin_departed_1h"),
        sums("o", "origin_delay_1h", "1h", "delay", "departed"),
        (c("o_due_1h") - c("o_departed_1h")).alias("origin_overdue_1h"),
        c("o_due_3h").alias("origin_due_3h"),
        sums("o", "origin_delay_3h", "3h", "delay", "departed"),
        sums("o", "origin_late_3h", "3h", "dep_late", "departed"),
        share(c("o_due_3h") - c("o_departed_3h"), "o_due_3h").alias("origin_overdue_3h"),
        sums("o", "origin_delay_24h", "24h", "delay", "departed"),
        share(c("o_due_24h") - c("o_departed_24h"), "o_due_24h").alias("origin_overdue_24h"),
        c("co_departed_3h").alias("carrier_origin_departed_3h"),
        sums("co", "carrier_origin_delay_3h", "3h", "delay", "departed"),
        (c("co_due_3h") - c("co_departed_3h")).alias("carrier_origin_overdue_3h"),
        sums("c", "carrier_delay_6h", "6h", "delay", "departed"),
        sums("c", "carrier_late_24h", "24h", "late", "arrived"),
        sums("ch", "carrier_late_7d", "7d", "late", "arrived"),
        sums("ch", "carrier_late_30d", "30d", "late", "arrived"),
        c("d_departed_6h").alias("dest_departed_6h"),
        sums("d", "dest_delay_6h", "6h", "delay", "departed"),
        sums("d", "dest_arr_delay_6h", "6h", "arr_delay", "arrived"),
        (c("d_due_6h") - c("d_departed_6h")).alias("dest_overdue_6h"),
        sums("d", "dest_late_24h", "24h", "late", "arrived"),
        sums("r", "route_late_7d", "7d", "late", "arrived"),
        sums("r", "route_late_30d", "30d", "late", "arrived"),
        sums("r", "route_delay_30d", "30d", "arr_delay", "arrived"),
        sums("r", "route_gained_30d", "30d", "gained", "arrived"),
        c("h_arrived_30d").alias("flight_arrived_30d"),
        sums("h", "flight_late_30d", "30d", "late", "arrived"),
        sums("h", "flight_delay_30d", "30d", "arr_delay", "arrived"),
        sums("h", "flight_gained_30d", "30d", "gained", "arrived"),
        c("t_delay").alias("tail_delay"),
        ((c("asked") - c("t_departed")) / 3600).alias("tail_hours"),
        ((c("scheduled") - c("t_back")) / 3600).alias("tail_slack"),
        # least and greatest pass over what is missing.
        slack.clip(-60, 0).fill_null(-60).alias("tail_slack_m60_0"),
        *(
            slack.clip(low, high).fill_null(low).alias(f"tail_slack_{low}_{high}")
            for low, high in ((0, 24), (24, 48), (48, 72), (72, 120))
        ),
    ]  # fmt: skip
    names = dataset.features
    split = (
        pl.when(c(dataset.time) >= params.test_from).then(pl.lit("test"))
        .when(c(dataset.time) >= params.val_from).then(pl.lit("val"))
        .otherwise(pl.lit("train")).alias("split")
    )  # fmt: skip
    plain = [*dataset.key, "prediction_time", "known_at", "label", *dataset.slices]
    return rows.with_columns(given).select(
        *(name for name in dict.fromkeys(plain) if name not in names.names),
        split,
        c(names.categories).cast(pl.String),
        c(names.numbers).cast(pl.Float32),
    )


def _write(rows: pl.DataFrame, key: Sequence[str], time: str, folder: Path) -> None:
    """One file per month, rows in order of the key."""
    rows = rows.sort(*key)
    folder.mkdir(parents=True)
    for month in months.between(rows[time].min(), rows[time].max()):
        within = pl.col(time).is_between(months.begin(month), months.end(month), closed="left")
        rows.filter(within).write_parquet(folder / f"{month}.parquet", compression="zstd")
