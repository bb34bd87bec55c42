"""The bundle's contract, as a service holds a request to it.

`/predict` takes one JSON record of every column, `{"origin": "JFK", "temp": null, …}`, or many as
`{"records": [{…}, {…}]}`. A column that is missing is null, never absent; one that the contract
does not know is refused: a caller with a typing error must not get an answer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from pipelines.bundle import MAX_NUMBER
from pipelines.deploy.serve.refusal import Refusal

# `records` is the only key of the form with many, so it is also the first.
_MANY = re.compile(rb'\s*\{\s*"records"\s*:')
_AT = re.compile(r" - at `\$(?:\.records\[(\d+)\])?(?:\.(.+))?`$")
_WANTED = {
    "str | null": "a text or null",
    "float | null": "a number or null",
    "float": "a number or null",
}
# What a column's value may be in JSON.
TEXT = str | None
NUMBER = Annotated[float, msgspec.Meta(ge=-MAX_NUMBER, le=MAX_NUMBER)] | None


@dataclass(frozen=True)
class Columns:
    """Rows by column, as the model takes them: texts (columns, rows) of str, "" where missing;
    numbers (columns, rows) of float32, NaN where missing.
    """

    texts: npt.NDArray[np.object_]
    numbers: npt.NDArray[np.float32]

    @property
    def rows(self) -> int:
        return int(self.numbers.shape[1])


class Contract:
    """The columns of a bundle: how requests of them are read and described."""

    def __init__(self, columns: Sequence[dict[str, str]], max_rows: int) -> None:
        self.order = [(column["name"], column["type"]) for column in columns]
        self.texts = [name for name, kind in self.order if kind == "string"]
        self.numbers = [name for name, kind in self.order if kind != "string"]
        self.max_rows = max_rows
        record = _record(self.texts, self.numbers)
        rows = Annotated[list[record], msgspec.Meta(min_length=1)]  # type: ignore[valid-type]
        many = msgspec.defstruct("Many", [("records", rows)], forbid_unknown_fields=True)
        self._one, self._many = msgspec.json.Decoder(record), msgspec.json.Decoder(many)

    def read(self, body: bytes) -> Columns:
        """The rows of a request to /predict. Raises Refusal that names the row and the column."""
        try:
            if _MANY.match(body):
                records = self._many.decode(body).records  # type: ignore[attr-defined]
            else:
                records = [self._one.decode(body)]
        except msgspec.ValidationError as error:
            raise Refusal(422, _explain(str(error))) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refusal(400, f"the body is no JSON: {error}") from None
        if len(records) > self.max_rows:
            raise Refusal(422, f"{len(records):,} records; at most {self.max_rows:,} at once")
        return self._columns([msgspec.structs.astuple(record) for record in records])

    def columns(self, texts: list[list[str | None]], numbers: list[list[float | None]]) -> Columns:
        """From values by column, None where missing."""
        rows = len((texts or numbers)[0])
        plain = [[value or "" for value in column] for column in texts]
        return Columns(
            np.array(plain, dtype=object).reshape(len(texts), rows),
            np.array(numbers, dtype=np.float32).reshape(len(numbers), rows),
        )

    def _columns(self, records: list[tuple[Any, ...]]) -> Columns:
        split = len(self.texts)
        if len(records) > 1:
            columns = [list(column) for column in zip(*records, strict=True)]
            return self.columns(columns[:split], columns[split:])
        # Nearly every request: one array for all numbers of the row.
        (row,) = records
        texts = np.array([value or "" for value in row[:split]], dtype=object)
        numbers = np.array(row[split:], dtype=np.float32)
        return Columns(texts[:, None], numbers[:, None])

    @cached_property
    def schema(self) -> dict[str, Any]:
        """A record as JSON Schema."""
        number = {"type": ["number", "null"], "minimum": -MAX_NUMBER, "maximum": MAX_NUMBER}
        text = {"type": ["string", "null"]}
        return {
            "type": "object",
            "additionalProperties": False,
            "required": [name for name, _ in self.order],
            "properties": {name: text if kind == "string" else number for name, kind in self.order},
        }


def _record(texts: list[str], numbers: list[str]) -> type[msgspec.Struct]:
    """A Struct of every column, texts first. Columns may have names that are none in Python."""
    names = [*texts, *numbers]
    fields = [f"f{number}" for number in range(len(names))]
    kinds = [TEXT] * len(texts) + [NUMBER] * len(numbers)
    return msgspec.defstruct(
        "Record",
        list(zip(fields, kinds, strict=True)),
        rename=dict(zip(fields, names, strict=True)),
        forbid_unknown_fields=True,
        gc=False,
    )


def _explain(message: str) -> str:
    """msgspec's message with the row and the column in front."""
    where = _AT.search(message)
    said = message[: where.start()] if where else message
    row, column = (where.group(1), where.group(2)) if where else (None, None)
    for kind, words in _WANTED.items():
        said = said.replace(f"`{kind}`", words)
    for kind, words in (("missing required", "lacks"), ("contains unknown", "has the unknown")):
        said = said.replace(f"Object {kind} field", f"the record {words} column")
    if column == "records" and row is None:
        place = column
    else:
        place = f"row {row or 0}" + (f", column {column}" if column else "")
    return f"{place}: {said[0].lower()}{said[1:].replace('`', '')}"
