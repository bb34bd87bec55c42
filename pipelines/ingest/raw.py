"""raw: a raw CSV file as a typed table. What is wrong with it is one line, with line and column."""

import csv
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import cast
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from pipelines import months
from pipelines.errors import UserError, printable
from pipelines.params import Table

TYPES = {
    "int": pa.int32(),
    "long": pa.int64(),
    "float": pa.float64(),
    "string": pa.string(),
    "timestamp": pa.timestamp("us", tz="UTC"),
}
# How files begin that are no text, whatever their name says.
OTHERS = {b"\x1f\x8b": "a gzip archive", b"PK\x03\x04": "a zip archive", b"PAR1": "a Parquet file"}
LONGEST = 1 << 20  # bytes of a line: what the reader takes at once
HEXADECIMAL = r"\b0[xX]"


def read(path: Path, table: Table, zone: str) -> pa.Table:
    """One raw CSV file, its key unique, its numbers finite, and its rows of the month that its name
    says, on the clock of the zone.

    Raises UserError with file, line and column.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        _check_text(content)
        columns = _check_header(content, table)
        rows = _typed(content, table, columns)
        _check_numbers(rows)
        if table.batch is not None:
            _check_month(rows, table.batch, path.stem, zone)
        _check_key(rows, table.key)
    except _RefusedError as error:
        raise UserError(f"{path}: {printable(str(error))}") from None
    return rows


def none(table: Table) -> pa.Table:
    """What `read` gives, without rows."""
    return pa.schema({name: TYPES[kind] for name, kind in table.columns.items()}).empty_table()


class _RefusedError(Exception):
    """What is wrong with a file."""


def _typed(content: bytes, table: Table, columns: Sequence[str]) -> pa.Table:
    options = pacsv.ConvertOptions(
        column_types={column: TYPES[kind] for column, kind in table.columns.items()},
        include_columns=list(table.columns),
        null_values=["", "NA"],
        strings_can_be_null=True,
        timestamp_parsers=[pacsv.ISO8601],
    )
    try:
        rows = pacsv.read_csv(
            pa.BufferReader(content),
            # One thread and no skipped line: only then does an error name its line.
            read_options=pacsv.ReadOptions(use_threads=False, block_size=LONGEST),
            parse_options=pacsv.ParseOptions(ignore_empty_lines=False),
            convert_options=options,
        )
    except pa.ArrowInvalid as error:
        raise _RefusedError(_explain(str(error), columns)) from None
    if rows.num_rows == 0:
        raise _RefusedError("no rows; expected at least one below the header")
    lines = content.count(b"\n")
    if lines != rows.num_rows + 1:
        raise _RefusedError(f"{lines} lines hold {rows.num_rows} rows; a quote is not closed")
    if re.search(HEXADECIMAL.encode(), content):
        _check_decimal(content, rows.schema)
    return rows


def _check_decimal(content: bytes, schema: pa.Schema) -> None:
    """The reader takes 0x10 for 16."""
    whole = [field.name for field in schema if pa.types.is_integer(field.type)]
    options = pacsv.ConvertOptions(
        include_columns=whole, column_types=dict.fromkeys(whole, pa.string())
    )
    texts = pacsv.read_csv(pa.BufferReader(content), convert_options=options)
    for name in whole:
        wrong = pc.indices_nonzero(pc.match_substring_regex(texts[name], HEXADECIMAL))
        if len(wrong):
            at = wrong[0].as_py()
            value = texts[name][at].as_py()
            raise _RefusedError(f"line {at + 2}, column {name}: expected a decimal number: {value}")


def _check_text(content: bytes) -> None:
    """Whether these are lines of text that end in a line feed, after a carriage return or not."""
    if not content:
        raise _RefusedError("it is empty; expected lines of text")
    for begin, kind in OTHERS.items():
        if content.startswith(begin):
            raise _RefusedError(f"it is {kind}; expected text, unpacked")
    try:
        content.partition(b"\n")[0].decode()
    except UnicodeDecodeError:
        raise _RefusedError("line 1 is not text in UTF-8; expected the header") from None
    for wrong, name in ((rb"\0", "NUL"), (rb"\r(?!\n)", "lone carriage return")):
        if found := re.search(wrong, content):
            raise _RefusedError(
                f"line {_line(content, found.start())} holds a {name}; expected text"
            )
    if not content.endswith(b"\n"):
        raise _RefusedError("the last line does not end; the file was cut short")
    longest = max(content.split(b"\n"), key=len)
    if len(longest) >= LONGEST:
        number = _line(content, content.index(longest))
        raise _RefusedError(f"line {number} is longer than {LONGEST:,} bytes; is it one?")


def _line(content: bytes, at: int) -> int:
    return content.count(b"\n", 0, at) + 1


def _check_header(content: bytes, table: Table) -> list[str]:
    """The header's columns, where each expected one stands once."""
    header = content.partition(b"\n")[0].decode("utf-8-sig").rstrip("\r")
    expected = list(table.columns)
    try:
        names = next(csv.reader([header], strict=True), [])
    except csv.Error as error:
        raise _RefusedError(f"line 1 is no header: {error}") from None
    missing = [column for column in expected if column not in names]
    if missing and len(names) <= 1:
        raise _RefusedError(
            f"line 1 has no comma; expected columns separated by commas: {','.join(expected)}"
        )
    if missing:
        raise _RefusedError(f"column {missing[0]} is missing; expected {','.join(expected)}")
    if twice := [column for column in expected if names.count(column) > 1]:
        raise _RefusedError(f"column {twice[0]} stands twice in line 1; expected once")
    return names


def _explain(error: str, columns: Sequence[str]) -> str:
    """pyarrow's message, less its advice, with the name of the column; its row is the line of the
    file.
    """
    error = error.partition(". If ")[0]
    if cell := re.match(
        r"In CSV column #(\d+): Row #(\d+): CSV conversion error to (.*)", error, re.S
    ):
        return f"line {cell[2]}, column {columns[int(cell[1])]}: expected {cell[3][:200]}"
    if row := re.match(r"CSV parse error: Row #(\d+): (Expected \d+ columns, got \d+)", error):
        return f"line {row[1]}: {row[2][0].lower()}{row[2][1:]}"
    return error[:300]


def _check_numbers(rows: pa.Table) -> None:
    for name in rows.column_names:
        if pa.types.is_floating(rows.schema.field(name).type):
            wrong = pc.indices_nonzero(pc.invert(pc.fill_null(pc.is_finite(rows[name]), True)))
            if len(wrong):
                at = wrong[0].as_py()
                value = rows[name][at].as_py()
                raise _RefusedError(
                    f"line {at + 2}, column {name}: expected a finite number: {value}"
                )


def _check_month(rows: pa.Table, time: str, name: str, zone: str) -> None:
    times = rows[time]
    first, after = (pa.scalar(m(name, zone), times.type) for m in (months.begin, months.end))
    right = pc.and_(pc.greater_equal(times, first), pc.less(times, after))
    wrong = pc.indices_nonzero(pc.invert(pc.fill_null(right, False)))
    if len(wrong):
        at = wrong[0].as_py()
        if not times[at].is_valid:
            raise _RefusedError(f"line {at + 2} has no {time}; is it empty?")
        found = cast(datetime, times[at].as_py()).astimezone(ZoneInfo(zone))
        raise _RefusedError(
            f"line {at + 2}: {time} is {found:%Y-%m-%d %H:%M} in {zone}; expected a time of {name}"
        )


def _check_key(rows: pa.Table, key: Sequence[str]) -> None:
    keys = rows.select(key)
    for column in key:
        if keys[column].null_count:
            at = pc.indices_nonzero(pc.is_null(keys[column]))[0].as_py()
            raise _RefusedError(f"line {at + 2}: {column} is missing; it is part of the key")
    numbered = keys.append_column("line", pa.array(range(2, rows.num_rows + 2)))
    groups = numbered.group_by(key, use_threads=False).aggregate([("line", "min"), ("line", "max")])
    twice = groups.filter(pc.not_equal(groups["line_min"], groups["line_max"]))
    if twice.num_rows:
        first = twice.slice(0, 1).to_pylist()[0]
        # Without its values, which may be of a person.
        raise _RefusedError(
            f"lines {first['line_min']} and {first['line_max']} have the same key "
            f"({', '.join(key)}); expected one"
        )
