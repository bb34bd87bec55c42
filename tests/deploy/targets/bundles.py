"""Two real bundles that differ a little, for targets that open what they are given."""

from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pipelines import bundle, stage, tables
from pipelines.deploy.targets import Release

WIDTH = 64
# Whatever JSON can say, and Python's can read.
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def release(folder: Path, version: int) -> Release:
    """A network of one text and two numbers; the version moves its last layer."""
    made = folder / f"bundle-{version}"
    made.mkdir(parents=True)
    onnx.save(_network(version), made / bundle.MODEL)
    contract = {
        "dataset": "flights",
        "label": "label",
        "threshold": 0.5,
        "columns": [
            {"name": "origin", "type": "string"},
            {"name": "delay", "type": "float32"},
            {"name": "temp", "type": "float32"},
        ],
    }
    stage.write_json(made / bundle.CONTRACT, contract)
    random = np.random.default_rng(0)
    rows = pa.table(
        {
            "origin": random.choice(["EWR", "JFK"], 2000),
            "delay": random.normal(size=2000).astype(np.float32),
            "temp": random.normal(size=2000).astype(np.float32),
        }
    )
    answers = bundle.load(made).predict(rows)
    label = pa.array((random.random(2000) < answers).astype(np.int64))
    reference = rows.append_column("label", label)
    tables.write(reference.append_column("prediction", pa.array(answers)), made / bundle.REFERENCE)
    return Release("flights", version, stage.digest(made), made)


def _network(version: int) -> onnx.ModelProto:
    random = np.random.default_rng(1)
    weights = {
        "w1": random.normal(size=(3, WIDTH)),
        "b1": random.normal(size=WIDTH),
        "w2": random.normal(size=(WIDTH, 1)) / np.sqrt(WIDTH),
        "b2": np.array([version / 10]),
    }
    nodes = [
        helper.make_node(
            "LabelEncoder", ["origin"], ["code"], domain="ai.onnx.ml",
            keys_strings=["EWR", "JFK"], values_floats=[1.0, 2.0], default_float=0.0,
        ),
        helper.make_node("IsNaN", ["delay"], ["unknown"]),
        helper.make_node("Where", ["unknown", "zero", "delay"], ["known_delay"]),
        helper.make_node("IsNaN", ["temp"], ["unfelt"]),
        helper.make_node("Where", ["unfelt", "zero", "temp"], ["known_temp"]),
        *[
            helper.make_node("Unsqueeze", [name, "axis"], [f"{name}_column"])
            for name in ("code", "known_delay", "known_temp")
        ],
        helper.make_node(
            "Concat", [f"{n}_column" for n in ("code", "known_delay", "known_temp")], ["x"], axis=1
        ),
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["odds"]),
        helper.make_node("Sigmoid", ["odds"], ["p"]),
        helper.make_node("Squeeze", ["p", "axis"], ["probability"]),
    ]  # fmt: skip
    inputs = [
        helper.make_tensor_value_info(name, kind, ["rows"])
        for name, kind in zip(
            ("origin", "delay", "temp"),
            (TensorProto.STRING, TensorProto.FLOAT, TensorProto.FLOAT),
            strict=True,
        )
    ]
    fixed = [
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
        helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
        *[numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    ]
    output = helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["rows"])
    graph = helper.make_graph(nodes, "g", inputs, [output], fixed)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, ir_version=9, opset_imports=opsets)
