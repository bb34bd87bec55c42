"""What the columns of a row added to its prediction is their Shapley value."""

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from deploy import bundles
from hypothesis import given, settings
from hypothesis import strategies as st
from world import Checkout

from pipelines import bundle, tables
from pipelines.explain import explain, ordered

NAMES = ["colour", "a", "b", "c", "spare"]
COLOURS = ["", "blue", "red"]


class Net:
    """A small random network over a category and three numbers; it does not see `spare`."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.first = random.normal(size=(len(COLOURS) + 3, 8))
        self.second = random.normal(size=8)
        kinds = ["string", *["float32"] * 4]
        self.contract: dict[str, Any] = {
            "columns": [{"name": n, "type": k} for n, k in zip(NAMES, kinds, strict=True)]
        }

    def predict(self, table: pa.Table) -> npt.NDArray[np.float32]:
        colour = table["colour"].fill_null("").to_pylist()
        hot = np.array([[one == value for value in COLOURS] for one in colour], float)
        numbers = [np.nan_to_num(table[n].to_numpy(zero_copy_only=False)) for n in "abc"]
        hidden = np.tanh(np.column_stack([hot, *numbers]) @ self.first)
        return np.asarray(1 / (1 + np.exp(-hidden @ self.second)), np.float32)


def _rows(seed: int, count: int) -> pa.Table:
    random = np.random.default_rng(seed)
    columns: dict[str, pa.Array] = {"colour": pa.array(random.choice(COLOURS, count).tolist())}
    for name in NAMES[1:]:
        values = [None if random.random() < 0.2 else float(v) for v in random.normal(size=count)]
        columns[name] = pa.array(values, pa.float32())
    return pa.table(columns)


def _shapley(net: Net, row: pa.Table, reference: pa.Table) -> npt.NDArray[np.float64]:
    """By the definition (Shapley 1953), over all subsets of the columns."""

    def worth(inside: Iterable[str]) -> float:
        kept = set(inside)
        columns = {
            name: pa.chunked_array([pa.repeat(row[name][0], reference.num_rows)])
            if name in kept
            else reference[name]
            for name in NAMES
        }
        return float(net.predict(pa.table(columns)).astype(float).mean())

    count = len(NAMES)
    values = []
    for name in NAMES:
        others = [one for one in NAMES if one != name]
        value = 0.0
        for size in range(count):
            weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for inside in itertools.combinations(others, size):
                value += weight * (worth([*inside, name]) - worth(inside))
        values.append(value)
    return np.array(values)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_it_is_the_shapley_value(seed: int) -> None:
    net, row, reference = Net(seed), _rows(seed, 1), _rows(seed + 1, 20)
    exact = _shapley(net, row, reference)
    found = explain(net, row, reference, orders=4000)
    assert np.all(np.abs(found.contributions - exact) <= 5 * found.errors + 1e-6)
    assert found.errors.max() < 0.01


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_the_parts_are_the_whole_and_what_is_not_seen_adds_nothing(seed: int, orders: int) -> None:
    net, row, reference = Net(seed), _rows(seed, 1), _rows(seed + 1, 20)
    found = explain(net, row, reference, orders)
    whole = found.base + found.contributions.sum()
    assert whole == pytest.approx(float(net.predict(row)[0]), abs=1e-9)
    assert found.contributions[NAMES.index("spare")] == 0
    again = explain(net, row, reference, orders)
    assert np.array_equal(found.contributions, again.contributions)


def test_rows_of_one_reference_start_from_one_base() -> None:
    net, reference = Net(1), _rows(2, 20)
    bases = {explain(net, _rows(seed, 1), reference).base for seed in range(5)}
    assert len(bases) == 1


def test_few_rows_in_order_of_their_prediction_have_the_base_of_all() -> None:
    random = np.random.default_rng(0)
    net, rows = Net(1), _rows(2, 5000).take(random.permutation(5000))
    said = net.predict(rows).astype(float)
    reference = ordered(rows.append_column(bundle.PREDICTION, pa.array(said)))
    for seed in range(20):
        base = explain(net, rows.slice(0, 1), reference, orders=64, seed=seed).base
        assert abs(base - said.mean()) < said.std() / np.sqrt(64) / 2  # of rows drawn at random


def _told(checkout: Checkout, lines: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pipelines.explain"]
    return subprocess.run(
        command, input=lines, cwd=checkout.folder, text=True, capture_output=True, check=False
    )


def test_a_bundle_explains_what_it_answers(checkout: Checkout) -> None:
    folder = checkout.folder / bundle.FOLDER
    bundles.make(folder)
    names = [column["name"] for column in bundles.COLUMNS]
    rows = tables.read_file(folder / bundle.REFERENCE).to_pylist()
    lines = [json.dumps({name: row[name] for name in names}) + "\n" for row in rows]
    done = _told(checkout, "".join(lines))
    assert done.returncode == 0, done.stderr
    for row, line in zip(rows, done.stdout.splitlines(), strict=True):
        told = json.loads(line)
        assert told["prediction"] == pytest.approx(row["prediction"], abs=1e-5)
        parts = [one["added"] for one in told["contributions"].values()]
        assert sorted(told["contributions"]) == sorted(names)
        assert [abs(part) for part in parts] == sorted(map(abs, parts), reverse=True)
        assert told["base"] + sum(parts) == pytest.approx(told["prediction"], abs=1e-5)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is no record in JSON; expected an object of columns"),
        ("[1]", "line 1 is no record in JSON"),
        ("[" * 200_000, "line 1 is no record in JSON"),
        ('{"nonsense": 1}', "line 1: the bundle has no column nonsense"),
        ("{}", "line 1 lacks the column origin; what is missing is null"),
        ('{"origin": 5, "x": 1, "y": 1}', "line 1: origin is 5; expected a text or null"),
        ('{"origin": "\\ud800", "x": 1, "y": 1}', 'line 1: origin is "\\ud800"; expected a text'),
        ('{"origin": null, "x": "far", "y": 1}', 'line 1: x is "far"; expected a number or null'),
        ('{"origin": null, "x": true, "y": 1}', "line 1: x is true; expected a number or null"),
        ('{"origin": null, "x": NaN, "y": 1}', "line 1: x is NaN; expected a number or null"),
        ('{"origin": null, "x": 1e400, "y": 1}', "line 1: x is Infinity; expected a number"),
    ],
)
def test_a_bad_record_is_one_line(checkout: Checkout, line: str, said: str) -> None:
    bundles.make(checkout.folder / bundle.FOLDER)
    done = _told(checkout, line + "\n")
    assert done.returncode == 2
    assert done.stderr.startswith(f"explain: error: {said}")
    assert done.stderr.count("\n") == 1


def test_without_a_bundle_it_says_so(checkout: Checkout) -> None:
    done = _told(checkout, "{}\n")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "models/bundle/bundle.json is missing" in done.stderr
