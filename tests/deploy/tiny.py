"""A bundle of one number, for tests of what happens to bundles."""

from pathlib import Path

import onnx
import pyarrow as pa
from onnx import TensorProto, helper

from pipelines import bundle, stage, tables
from pipelines.deploy import promotion, register, registry
from pipelines.deploy.registry import Registry
from pipelines.params import Params


def make_bundle(
    shift: float = 0.0,
    passed: bool = True,
    slope: float = 1.0,
    as_of: str = "2013-06-01T00:00:00Z",
    column: str = "x",
) -> str:
    """Answers 1 / (1 + exp(-(slope x + shift))) of one column. Returns its hash."""
    value = helper.make_tensor_value_info(column, TensorProto.FLOAT, ["rows"])
    answer = helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["rows"])
    graph = helper.make_graph(
        [
            helper.make_node("Mul", [column, "slope"], ["scaled"]),
            helper.make_node("Add", ["scaled", "shift"], ["odds"]),
            helper.make_node("Sigmoid", ["odds"], ["probability"]),
        ],
        "g",
        [value],
        [answer],
        [
            helper.make_tensor("slope", TensorProto.FLOAT, [1], [slope]),
            helper.make_tensor("shift", TensorProto.FLOAT, [1], [shift]),
        ],
    )
    bundle.FOLDER.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])
    onnx.save(model, bundle.FOLDER / bundle.MODEL)
    contract = {
        "as_of": as_of, "passed": passed, "metrics": {"auc": 0.7},
        "columns": [{"name": column, "type": "float32"}],
        "dataset": "flights", "label": "label", "threshold": 0.5,
        "data": {"features": "none", "fit": "none"},
        "params": {"featurize": {"test_days": 30}},
    }  # fmt: skip
    stage.write_json(bundle.FOLDER / bundle.CONTRACT, contract)
    tables.write(pa.table({column: [0.5], "label": [1]}), bundle.FOLDER / bundle.REFERENCE)
    Path("models/fit").mkdir(exist_ok=True)
    Path("models/fit/weights").write_text("w")
    return stage.digest(bundle.FOLDER)


def two_versions(params: Params) -> Registry:
    """Version 1 is champion, version 2 has passed the gate."""
    for shift in (0.0, 0.1):
        make_bundle(shift)
        register.run(params)
    held = registry.of(params)
    promotion.reconcile(held)
    held.tag(2, {"gate": "passed", "gate_against": "1"})
    return held
