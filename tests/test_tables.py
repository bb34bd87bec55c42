"""tables: the bytes of a month depend on its rows alone."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import tables

FIRST = datetime(2013, 1, 31, 22, tzinfo=UTC)
ROWS = [
    {"at": FIRST + timedelta(hours=hour), "key": key, "value": hour}
    for hour in range(5)
    for key in (None, "A", "a", "é")
]
TYPES = pa.schema([("at", pa.timestamp("us", "UTC")), ("key", pa.string()), ("value", pa.int64())])


@settings(deadline=None)
@given(st.permutations(ROWS), st.integers(1, len(ROWS)))
def test_rows_in_any_order_and_batches_give_the_same_months(
    tmp_path_factory, rows: list[dict], size: int
) -> None:
    folder: Path = tmp_path_factory.mktemp("months")
    batches = [pa.Table.from_pylist(rows[at : at + size], TYPES) for at in range(0, 20, size)]
    table = pa.concat_tables(batches)
    assert tables.write_months(table, "at", ["at", "key"], folder / "given") == len(ROWS)
    for name, right in (("2013-01", ROWS[:8]), ("2013-02", ROWS[8:])):
        file = folder / "given" / f"{name}.parquet"
        assert pq.read_table(file).to_pylist() == right
        tables.write(pa.Table.from_pylist(right, TYPES), folder / "right.parquet")
        assert file.read_bytes() == (folder / "right.parquet").read_bytes()
