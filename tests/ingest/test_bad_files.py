"""Whatever a file holds, it is taken for what it says, or one line names file, line and fault."""

import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipelines.errors import UserError
from pipelines.ingest import raw
from pipelines.params import Table

COLUMNS = {
    "year": "int", "month": "int", "origin": "string", "at": "timestamp", "delay": "int",
    "temp": "float", "note": "string",
}  # fmt: skip
TABLE = Table.model_validate({"batch": "at", "key": ["origin", "at"], "columns": COLUMNS})
ZONE = "America/New_York"
HEADER = b"year,month,origin,at,delay,temp,note\n"
ROWS = [
    b"2012,2,JFK,2012-02-28T23:30:00Z,-3,41.5,fine\n",
    b'2012,2,JFK,2012-02-29T00:30:00Z,0,-0.5,"rain, then snow"\n',
    b"2012,2,LGA,2012-02-29T01:30:00Z,NA,NA,NA\n",
    b'2012,2,LGA,2012-02-29T02:30:00Z,1440,1e1,"a ""gust"""\n',
]
GOOD = HEADER + b"".join(ROWS)
NAME = "2012-02.csv"
Edit = Callable[[bytes], bytes]


def _read(folder: Path, content: bytes) -> pa.Table:
    path = folder / NAME
    path.write_bytes(content)
    return raw.read(path, TABLE, ZONE)


def _cell(column: str, value: bytes, row: int = 0) -> Edit:
    """One cell of a row is another; the rows begin in line 2."""

    def edit(content: bytes) -> bytes:
        fields = ROWS[row].rstrip(b"\n").split(b",")
        fields[list(COLUMNS).index(column)] = value
        return content.replace(ROWS[row], b",".join(fields) + b"\n")

    return edit


def _swap(old: bytes, new: bytes, times: int = -1) -> Edit:
    return lambda content: content.replace(old, new, times)


def _coded(encoding: str) -> Edit:
    return lambda content: content.decode().encode(encoding)


def _whole(content: bytes) -> Edit:
    return lambda _: content


REFUSED: dict[str, tuple[Edit, str]] = {
    # What is no text, or text of another kind.
    "nothing": (_whole(b""), "it is empty"),
    "a line end alone": (_whole(b"\n"), "line 1 has no comma"),
    "blanks": (_whole(b"   \n  \n"), "line 1 has no comma"),
    "UTF-16": (_coded("utf-16"), "line 1 is not text in UTF-8"),
    "UTF-16 without its mark": (_coded("utf-16-le"), "line 1 holds a NUL"),
    "UTF-32": (_coded("utf-32"), "line 1 is not text in UTF-8"),
    "Latin-1": (_cell("note", "früh".encode("latin-1")), "note: expected string: invalid UTF8"),
    "half a letter": (_cell("note", "é".encode()[:1]), "note: expected string: invalid UTF8"),
    "a surrogate": (_cell("note", b"\xed\xa0\x80"), "note: expected string: invalid UTF8"),
    "a NUL": (_cell("note", b"a\0b"), "line 2 holds a NUL"),
    "gzip": (_whole(bytes.fromhex("1f8b0800000000000003") + GOOD), "it is a gzip archive"),
    "zip": (_whole(b"PK\x03\x04" + GOOD), "it is a zip archive"),
    "Parquet": (_whole(b"PAR1" + GOOD), "it is a Parquet file"),
    "HTML": (_whole(b"<!doctype html>\n<title>404</title>\n"), "line 1 has no comma"),
    "JSON": (_whole(b'{"year": 2012}\n'), "line 1 has no comma"),
    # Lines.
    "cut in the last line": (lambda c: c[:-5], "the last line does not end"),
    "cut in the header": (_whole(HEADER[:20] + b"\n"), "column delay is missing"),
    "header alone": (_whole(HEADER), "no rows"),
    "no header": (_whole(b"".join(ROWS)), "column year is missing"),
    "Macintosh line ends": (_swap(b"\n", b"\r"), "a lone carriage return"),
    "one lone carriage return": (_swap(b"fine", b"fi\rne"), "line 2 holds a lone carriage return"),
    "a blank line": (_swap(ROWS[1], b"\n" + ROWS[1]), "line 3 .*empty"),
    "blank last lines": (lambda c: c + b"\n\n", "line 6 .*empty"),
    "a remark": (_swap(ROWS[1], b"# by hand\n" + ROWS[1]), "line 3: expected 7 columns, got 1"),
    "a field too few": (_swap(b",fine", b""), "line 2: expected 7 columns, got 6"),
    "a field too many": (_swap(b",fine", b",fine,too"), "line 2: expected 7 columns, got 8"),
    "a total below": (lambda c: c + b"total,,,,4,,\n", "line 6, column year: expected int32"),
    "a huge field": (_cell("note", b"x" * 3_000_000), "line 2 is longer than"),
    # Quotes.
    "a quote that never ends": (_swap(b",fine", b',"fine'), "line 2: expected 7 columns, got 8"),
    "a quote over two lines": (_swap(b",fine", b',"fi\nne"'), "a quote is not closed|line 2"),
    # Columns.
    "a column less": (_swap(b",note\n", b"\n", 1), "column note is missing"),
    "a column twice": (_swap(b"temp,", b"delay,", 1), "column temp is missing"),
    "both and twice": (_swap(b"year,", b"year,year,", 1), "column year stands twice"),
    "semicolons": (_swap(b",", b";"), "line 1 has no comma"),
    "tabs": (_swap(b",", b"\t"), "line 1 has no comma"),
    "names in capitals": (_swap(HEADER, HEADER.upper()), "column year is missing"),
    "blanks around names": (_swap(b",month", b", month"), "column month is missing"),
    # Values.
    "a word for a number": (_cell("delay", b"late"), "line 2, column delay: expected int32"),
    "null in words": (_cell("delay", b"null"), "line 2, column delay: expected int32"),
    "a number with a part": (_cell("delay", b"1.5"), "line 2, column delay: expected int32"),
    "hexadecimal": (_cell("delay", b"0x1F"), "line 2, column delay: expected a decimal number: 0x"),
    "hexadecimal and below zero": (_cell("delay", b"-0X1"), "line 2, column delay: expected int32"),
    "nearly hexadecimal": (_cell("delay", b"0x1z"), "line 2, column delay: expected int32"),
    "beyond 32 bits": (_cell("delay", b"2147483648"), "line 2, column delay: expected int32"),
    "beyond 64 bits": (_cell("delay", b"9" * 30), "line 2, column delay: expected int32"),
    "Arabic digits": (_cell("delay", "٣".encode()), "line 2, column delay: expected int32"),
    "a decimal comma": (_cell("temp", b'"41,5"'), "line 2, column temp: expected double"),
    "NaN": (_cell("temp", b"NaN"), "line 2, column temp: expected a finite number"),
    "nan of R": (_cell("temp", b"nan", row=1), "line 3"),
    "infinite": (_cell("temp", b"inf"), "line 2, column temp: expected a finite number"),
    "minus infinite": (_cell("temp", b"-Inf"), "line 2, column temp: expected a finite number"),
    "beyond a double": (_cell("temp", b"1e999"), "line 2, column temp: expected a finite number"),
    "a time without a zone": (_cell("at", b"2012-02-28T23:30:00"), "line 2, column at: expected"),
    "a day that is none": (_cell("at", b"2012-02-30T00:00:00Z"), "line 2, column at: expected"),
    "a leap day of no leap year": (_cell("at", b"2013-02-29T00:00:00Z"), "line 2, column at"),
    "an hour that is none": (_cell("at", b"2012-02-28T25:00:00Z"), "line 2, column at: expected"),
    "month first": (_cell("at", b"02/28/2012 23:30"), "line 2, column at: expected"),
    "seconds since 1970": (_cell("at", b"1330471800"), "line 2, column at: expected"),
    # Rows.
    "of another month": (
        _cell("at", b"2012-03-01T05:00:00Z"),
        "line 2: at is 2012-03-01 00:00 in America/New_York; expected a time of 2012-02",
    ),
    "of another year": (_cell("at", b"2013-02-28T23:30:00Z"), "line 2: at is 2013-02-28 18:30 in"),
    "of the month before, where it is cut": (
        _cell("at", b"2012-02-01T04:59:59Z"), "line 2: at is 2012-01-31 23:59 in",
    ),
    "of no time": (_cell("at", b"NA"), "line 2 has no at; is it empty?"),
    "no key": (_cell("origin", b""), "line 2: origin is missing; it is part of the key"),
    "the same key": (_swap(b"29T00:30", b"28T23:30"), "lines 2 and 3 have the same key"),
    "the same key in two zones": (
        _swap(b"2012-02-29T00:30:00Z", b"2012-02-28T18:30:00-05:00"), "lines 2 and 3 have the same",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    edit, said = REFUSED[name]
    content = edit(GOOD)
    assert content != GOOD
    with pytest.raises(UserError) as raised:
        _read(tmp_path, content)
    text = str(raised.value)
    assert text.startswith(str(tmp_path / NAME)), text
    assert re.search(said, text), text
    assert len(text) < 400 + len(str(tmp_path)), text
    assert text.isprintable(), text


TAKEN: dict[str, Edit] = {
    "as it is": lambda c: c,
    "a byte order mark": lambda c: b"\xef\xbb\xbf" + c,
    "Windows line ends": _swap(b"\n", b"\r\n"),
    "line ends of both kinds": _swap(b"\n", b"\r\n", 2),
    "every field in quotes": _swap(b"JFK,2012-02-28T23:30:00Z", b'"JFK","2012-02-28T23:30:00Z"'),
    "names in quotes": _swap(b"year,month", b'"year","month"', 1),
    "columns in another order": lambda c: b"".join(
        b",".join([*line.rstrip(b"\n").split(b",", 2)[1::-1], line.rstrip(b"\n").split(b",", 2)[2]])
        + b"\n"
        for line in c.splitlines(keepends=True)
    ),
    "one more column": lambda c: b"".join(b"0," + line for line in c.splitlines(keepends=True)),
    "times on another clock": _swap(b"2012-02-28T23:30:00Z", b"2012-02-29T00:30:00+01:00"),
    "missing in words": _swap(b",NA,NA,NA", b",,,"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_says_the_same_is_the_same(tmp_path: Path, name: str) -> None:
    expected = _read(tmp_path, GOOD)
    assert expected["at"].to_pylist()[1].day == 29  # a leap day
    content = TAKEN[name](GOOD).replace(b"0,year", b"more,year")
    assert _read(tmp_path, content).equals(expected)


def test_the_hour_that_comes_twice_is_two(tmp_path: Path) -> None:
    """As the clocks of New York go back: one hour on the wall, two in the file."""
    content = HEADER + b"".join(
        b"2012,11,JFK,2012-11-04T01:30:00-0%d:00,0,0,\n" % offset for offset in (4, 5)
    )
    (tmp_path / "2012-11.csv").write_bytes(content)
    found = raw.read(tmp_path / "2012-11.csv", TABLE, ZONE)["at"].to_pylist()
    assert [moment.hour for moment in found] == [5, 6]


FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PIECES = st.sampled_from(
    [b"\n", b"\r", b"\r\n", b'"', b",", b"\0", b"\xff", b"NA", b"nan", b"-", b"1e400", b"2012",
     b" ", "é".encode(), b"\xef\xbb\xbf"]
)  # fmt: skip


@FUZZ
@given(st.binary(max_size=200))
@example(b"year,month,origin,at,delay,temp,note\n\n")
def test_any_bytes_are_a_table_or_one_line(tmp_path: Path, content: bytes) -> None:
    _either(tmp_path, content)


@FUZZ
@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, 20), PIECES | st.binary(max_size=4)),
        min_size=1,
        max_size=4,
    )
)
def test_a_damaged_file_is_a_table_or_one_line(
    tmp_path: Path, edits: list[tuple[int, int, bytes]]
) -> None:
    content = GOOD
    for at, cut, piece in edits:
        content = content[:at] + piece + content[at + cut :]
    _either(tmp_path, content)


def _either(folder: Path, content: bytes) -> None:
    said, table = "", None
    try:
        table = _read(folder, content)
    except UserError as error:
        said = str(error)
    if table is None:
        assert said.startswith(str(folder / NAME))
        assert said.isprintable()
        return
    assert table.schema.names == list(COLUMNS)
    assert table.num_rows == content.count(b"\n") - 1
    assert pc.all(pc.is_finite(table["temp"].drop_null())).as_py() in (True, None)
    keys = list(zip(table["origin"].to_pylist(), table["at"].to_pylist(), strict=True))
    assert len(set(keys)) == len(keys)
    assert None not in {value for pair in keys for value in pair}
