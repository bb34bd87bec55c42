"""quarantine: the rows apart, and why. Reads; writes nothing.

in:   data/quarantine/
out:  on the screen: how many rows broke which expectation in which month, then the rows with the
      values that broke it
run:  make quarantine, or python -m pipelines.ingest.quarantine [--rows N]

A corrected source file heals its rows: run the stages again.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipelines import stage, tables
from pipelines.errors import printable
from pipelines.ingest.validate import QUARANTINE, REASONS
from pipelines.params import Params

WIDEST = 30  # letters of a value


def show(params: Params, most: int) -> str:
    """Both tables, of at most so many rows, as text."""
    counts: Counter[tuple[str, str]] = Counter()
    rows: list[dict[str, Any]] = []
    total = 0
    for file in tables.months(QUARANTINE):
        month = tables.read_file(file)
        total += month.num_rows
        for reasons in month[REASONS.name].to_pylist():
            counts.update((reason, file.stem) for reason in reasons)
        rows += _texts(month.slice(0, max(0, most - len(rows)))).to_pylist()
    if not total:
        return "no row is in quarantine"
    by_month = [[reason, month, f"{n:,}"] for (reason, month), n in sorted(counts.items())]
    shown = f"{total:,} rows" + (f", the first {len(rows)}" if len(rows) < total else "")
    lines = [line for row in rows for line in _broken(row, params.dataset.key)]
    return "\n".join(
        [
            *_aligned(["expectation", "month", "rows"], by_month),
            "",
            shown,
            "",
            *_aligned([*params.dataset.key, "value", "expectation"], lines),
        ]
    )


def _texts(rows: pa.Table) -> pa.Table:
    """The rows with texts for values: a broken time may lie beyond Python's calendar."""
    texts = [field if field == REASONS else field.with_type(pa.string()) for field in rows.schema]
    return rows.cast(pa.schema(texts))


def _broken(row: dict[str, Any], key: Sequence[str]) -> list[list[str]]:
    """A line for each expectation that the row broke: its key, and what was there."""
    lines = []
    for reason in row[REASONS.name]:
        columns = reason.partition(":")[0].split(", ")
        values = ", ".join(_text(row[name]) for name in columns if name in row)
        lines.append([*(_text(row[name]) for name in key), values, reason])
    return lines


def _text(value: str | None) -> str:
    text = "missing" if value is None else printable(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"


def _aligned(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, *rows]
    return ["  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def main() -> int:
    """Exit status: 0, 2 where there is nothing to read, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.ingest.quarantine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=50, metavar="N", help="at most so many rows")
    most = parser.parse_args().rows
    if most < 0:
        parser.error(f"--rows: expected no fewer than 0; got {most}")
    return stage.guarded("quarantine", lambda params: print(show(params, most)))


if __name__ == "__main__":
    sys.exit(main())
