"""explain: which of a row's columns moved its prediction, and by how much.

in:   models/bundle/; on standard input a record in JSON a line, as `/predict` takes them
out:  a line of JSON each: the prediction, the base it started from, and what every column added to
      it, the most first, with the standard error of the estimate
run:  python -m pipelines.explain < records.jsonl

Shapley values of the bundle's own answer (with classes, for the last one), so they hold for every
model: the base and what the columns added are the prediction. A column that is not yet in has the
value of a row of the bundle's reference (interventional: Lundberg & Lee, "A Unified Approach to
Interpreting Model Predictions", 2017). Estimated over random orders of the columns, each walked
forwards and backwards (Štrumbelj & Kononenko, "Explaining prediction models and individual
predictions with feature contributions", 2014; Mitchell et al., "Sampling Permutations for Shapley
Value Estimation", 2022).
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import bundle, metrics, stage, tables
from pipelines.errors import UserError
from pipelines.params import Params

ORDERS = 64
SEED = 7
DIGITS = 6
KINDS = {"string": pa.string(), "float32": pa.float32()}
Floats = npt.NDArray[np.float64]


class Scorer(Protocol):
    """What answers for rows, such as a bundle."""

    @property
    def contract(self) -> dict[str, Any]: ...

    def predict(self, table: pa.Table) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True)
class Explained:
    """The answer for a row: base + contributions.sum() up to the rounding of the sum.

    contributions and errors (standard errors) have shape (columns,), in order of the contract.
    """

    base: float
    contributions: Floats
    errors: Floats


def run(params: Params) -> None:
    scorer = bundle.load(bundle.FOLDER)
    reference = ordered(tables.read_file(bundle.FOLDER / bundle.REFERENCE))
    names = [column["name"] for column in scorer.contract["columns"]]
    for row in records(scorer.contract):
        found = explain(scorer, row, reference)
        order = np.argsort(-np.abs(found.contributions), kind="stable")
        told = {
            "prediction": round(found.base + float(found.contributions.sum()), DIGITS),
            "base": round(found.base, DIGITS),
            "contributions": {
                names[at]: {
                    "added": round(float(found.contributions[at]), DIGITS),
                    "error": round(float(found.errors[at]), DIGITS),
                }
                for at in order
            },
        }
        print(json.dumps(told), flush=True)


def records(contract: dict[str, Any]) -> Iterator[pa.Table]:
    """The records of standard input, a table of one row each. Raises UserError with the line."""
    kinds = {column["name"]: KINDS[column["type"]] for column in contract["columns"]}
    for number, line in enumerate(sys.stdin, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"line {number} is no record in JSON; expected an object of columns")
        if unknown := [name for name in record if name not in kinds]:
            raise UserError(f"line {number}: the bundle has no column {unknown[0]}")
        for name, kind in kinds.items():
            if name not in record:
                raise UserError(f"line {number} lacks the column {name}; what is missing is null")
            if not _is(record[name], kind):
                wanted = f"expected a {'text' if kind == pa.string() else 'number'} or null"
                shown = json.dumps(record[name])[:100]
                raise UserError(f"line {number}: {name} is {shown}; {wanted}")
        yield pa.table({name: pa.array([record[name]], kind) for name, kind in kinds.items()})


def _is(value: Any, kind: pa.DataType) -> bool:
    if value is None:
        return True
    if kind == pa.string():
        # JSON can spell half of a pair of code units, which is no character.
        return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)
    # NaN is at most nothing.
    return type(value) in (int, float) and abs(value) <= bundle.MAX_NUMBER


def ordered(reference: pa.Table) -> pa.Table:
    """By the prediction, so that few rows, evenly spaced, have the base of all."""
    said = metrics.watched(np.array(reference[bundle.PREDICTION].to_pylist()))
    return reference.take(pa.array(np.argsort(said, kind="stable")))


def explain(
    scorer: Scorer, row: pa.Table, reference: pa.Table, orders: int = ORDERS, seed: int = SEED
) -> Explained:
    """The one row of a table explained, from evenly spaced rows of the reference, one for each
    order; with one seed they are the same for every row, and so is the base.
    """
    names = [column["name"] for column in scorer.contract["columns"]]
    count = len(names)
    random = np.random.default_rng(seed)
    drawn = ((random.random() + np.arange(orders)) * reference.num_rows / orders).astype(np.int64)
    forwards = np.array([random.permutation(count) for _ in range(orders)])
    paths = np.stack([forwards, forwards[:, ::-1]], axis=1)  # (orders, 2, columns)
    # When a column comes in on each path; after `step` steps those before it are in.
    entry = np.argsort(paths, axis=2)
    steps = np.arange(count + 1)
    before = reference.take(pa.array(np.repeat(drawn, 2 * (count + 1))))
    mixed = {}
    for at, name in enumerate(names):
        inside = entry[:, :, at, None] < steps
        value = row[name][0].cast(before.schema.field(name).type)
        mixed[name] = pc.if_else(pa.array(inside.ravel()), value, before[name])
    every = metrics.watched(scorer.predict(pa.table(mixed)))
    answers = every.astype(np.float64).reshape(orders, 2, count + 1)
    added = np.zeros((orders, 2, count))
    np.put_along_axis(added, paths, np.diff(answers, axis=2), axis=2)
    pairs = added.mean(axis=1)
    return Explained(
        base=float(answers[:, :, 0].mean()),
        contributions=pairs.mean(axis=0),
        errors=pairs.std(axis=0, ddof=1) / np.sqrt(orders),
    )


def main() -> int:
    """Exit status: 0, 2 where the user can mend it, else 1."""
    return stage.guarded(stage.asked(), run)


if __name__ == "__main__":
    sys.exit(main())
