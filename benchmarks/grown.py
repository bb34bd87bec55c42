"""The sample, grown: the flights and the weather of 2013 again in other years, on their calendars.

Local dates and clocks stay; what stands in UTC is made of them anew, for daylight saving begins on
another day. An hour that a year's clock leaves out moves to the next, and a reading that then comes
twice is left out. A leap year has no flight on its 29th of February. Planes and airports are as
they are.
"""

from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.csv as pacsv

from pipelines.ingest import fetch
from pipelines.params import Params

YEAR = 2013
# The embedded engine knows no daylight saving after it.
LAST = 2099
ZONE = "America/New_York"


def years(size: int) -> range:
    """So many years: from the sample's own on, or, where there are too many, to the last."""
    first = min(YEAR, LAST + 1 - size)
    return range(first, first + size)


def grow(params: Params, size: int, raw: Path) -> None:
    """Write the raw files of so many years."""
    for file in fetch.listing(params):
        table, _, month = file.name.removesuffix(".csv").partition("/")
        target = raw / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not month:
            target.write_bytes(file.content)
            continue
        kinds = {"time_hour": pa.string()}
        options = pacsv.ConvertOptions(
            column_types=kinds, null_values=["NA", ""], strings_can_be_null=True
        )
        rows = pacsv.read_csv(pa.BufferReader(file.content), convert_options=options)
        key = params.dataset.tables[table].key
        for year in years(size):
            target = raw / table / f"{year}{month[4:]}.csv"
            if year == YEAR:
                target.write_bytes(file.content)
            else:
                style = pacsv.WriteOptions(quoting_style="none")
                pacsv.write_csv(moved(rows, year, key), target, style)


def moved(rows: pa.Table, year: int, key: list[str]) -> pa.Table:
    """The rows of a month in another year."""
    clock = [rows[name].to_numpy() for name in ("month", "day", "hour")]
    codes = clock[0] * 10_000 + clock[1] * 100 + clock[2]
    # pyarrow knows no daylight saving after 2037, zoneinfo does.
    utc = {
        code: datetime(year, code // 10_000, code // 100 % 100, code % 100, tzinfo=ZoneInfo(ZONE))
        .astimezone(UTC)
        .strftime("%Y-%m-%dT%H:%M:%SZ")
        for code in set(codes.tolist())
    }
    changed = {
        "year": pa.array([year] * rows.num_rows),
        "time_hour": pa.array([utc[code] for code in codes.tolist()]),
    }
    for name, values in changed.items():
        rows = rows.set_column(rows.column_names.index(name), name, values)
    numbered = rows.select(key).append_column("at", pa.array(range(rows.num_rows)))
    first = numbered.group_by(key, use_threads=False).aggregate([("at", "min")])
    return rows.take(first["at_min"].sort())
