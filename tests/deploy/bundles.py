"""Tiny bundles that are made in milliseconds, with every property of a real one.

Columns `origin` (string), `x` and `y` (float32). Those with `faults` give NaN for x below -1000 and
raise for y from 100 on.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
from onnx import TensorProto, helper

from pipelines import bundle, stage, tables

COLUMNS = [
    {"name": "origin", "type": "string"},
    {"name": "x", "type": "float32"},
    {"name": "y", "type": "float32"},
]
BASE_RATE = 0.25


def make(folder: Path, shift: float = 0.0, faults: bool = False) -> str:
    """Write a bundle whose log odds are moved by `shift`. Returns its hash."""
    folder.mkdir(parents=True)
    onnx.save(network(shift, faults), folder / bundle.MODEL)
    contract = {
        "dataset": "flights",
        "as_of": "2013-06-01",
        "columns": COLUMNS,
        "label": "label",
        "threshold": 0.5,
        "passed": True,
        "metrics": {"auc": 0.7},
    }
    stage.write_json(folder / bundle.CONTRACT, contract)
    table = rows(8)
    labelled = table.append_column("label", pa.array([1, 0, 0, 0, 1, 0, 0, 0]))
    answers = bundle.load(folder).predict(table)
    tables.write(
        labelled.append_column(bundle.PREDICTION, pa.array(answers)), folder / bundle.REFERENCE
    )
    return stage.digest(folder)


def rows(count: int) -> pa.Table:
    """Rows with missing values in every column."""
    random = np.random.default_rng(count)
    origin = random.choice(["JFK", "EWR", "nowhere", None], count)
    numbers = {
        name: np.where(random.random(count) < 0.2, np.nan, random.normal(size=count))
        for name in ("x", "y")
    }
    columns: dict[str, Any] = {"origin": pa.array(list(origin), pa.string())}
    for name, values in numbers.items():
        columns[name] = pa.array(values.astype(np.float32), from_pandas=True)
    return pa.table(columns)


def network(shift: float = 0.0, faults: bool = False) -> onnx.ModelProto:
    """origin, x, y, each (rows,), to probability (rows,)."""
    constants = [
        helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
        helper.make_tensor("shift", TensorProto.FLOAT, [1], [shift]),
        helper.make_tensor("thousand", TensorProto.FLOAT, [1], [1000.0]),
        helper.make_tensor("hundred", TensorProto.FLOAT, [100], [0.0] * 100),
    ]
    nodes = [
        helper.make_node(
            "LabelEncoder",
            ["origin"],
            ["code"],
            domain="ai.onnx.ml",
            keys_strings=["JFK", "EWR"],
            values_floats=[1.0, -1.0],
            default_float=0.0,
        )
    ]
    for name in ("x", "y"):
        nodes.append(helper.make_node("IsNaN", [name], [f"no_{name}"]))
        nodes.append(helper.make_node("Where", [f"no_{name}", "zero", name], [f"all_{name}"]))
    parts = ["code", "all_x", "all_y", "shift"]
    if faults:
        nodes += [
            helper.make_node("Add", ["all_x", "thousand"], ["above"]),
            helper.make_node("Sqrt", ["above"], ["root"]),
            helper.make_node("Mul", ["root", "zero"], ["nan_or_zero"]),
            helper.make_node("Cast", ["all_y"], ["place"], to=TensorProto.INT64),
            helper.make_node("Gather", ["hundred", "place"], ["raise_or_zero"]),
        ]
        parts += ["nan_or_zero", "raise_or_zero"]
    nodes.append(helper.make_node("Sum", parts, ["odds"]))
    nodes.append(helper.make_node("Sigmoid", ["odds"], ["probability"]))
    kinds = {"string": TensorProto.STRING, "float32": TensorProto.FLOAT}
    inputs = [
        helper.make_tensor_value_info(column["name"], kinds[column["type"]], ["rows"])
        for column in COLUMNS
    ]
    output = helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["rows"])
    graph = helper.make_graph(nodes, "tiny", inputs, [output], constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, ir_version=9, opset_imports=opsets)
