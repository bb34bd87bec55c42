"""package: the fitted model becomes a bundle that needs nothing of this repository.

in:   models/fit/, data/features/, reports/evaluate/verdict.json
out:  models/bundle/: model.onnx (raw feature columns -> calibrated prediction), bundle.json (the
      contract), reference.parquet (validation rows with label and prediction),
      reports/package/verdict.json
page: reports/package/forms.md, where package.forms names any (for eyes, not tracked)
run:  dvc repro package

The stage fails where ONNX Runtime and torch differ on a test row by more than package.parity: what
is compared is the export in floats of the network that is packaged, whose int8 is another.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.compute as pc
import torch
from onnx import TensorProto, helper

from pipelines import bundle, metrics, stage, tables
from pipelines.params import Params
from pipelines.train import data, fitted, forms
from pipelines.train.data import Encoding
from pipelines.train.fitted import Fitted

VERDICT = Path("reports/package/verdict.json")
PAGE = Path("reports/package/forms.md")
EVALUATION = Path("reports/evaluate/verdict.json")
OPSET = 18
# What the prediction is called, by task.
OUTPUTS = {"binary": "probability", "regression": "value", "multiclass": "probabilities"}


def run(params: Params) -> None:
    evaluation = stage.read_json(EVALUATION)
    model = fitted.load()
    with stage.scratch("package") as scratch, stage.fresh(bundle.FOLDER) as out:
        about = contract(params, model.encoding, evaluation)
        choice = chosen(params, model, about, scratch)
        form, test = choice.form, split(model.encoding, "test")
        scorer = forms.scorer(form.exported, about)
        gap = largest_gap(scorer, form.network, test, scratch)
        if gap > params.package.parity:
            raise RuntimeError(
                f"ONNX Runtime and torch differ by {gap:.2e} on a test row; "
                f"package.parity allows {params.package.parity:.0e}"
            )
        if choice.name != forms.PLAIN:
            scorer = forms.scorer(form.packaged, about)
            about |= of_form(params, choice.name, scorer, test)
        onnx.save(form.packaged, out / bundle.MODEL)
        stage.write_json(out / bundle.CONTRACT, about)
        tables.write(
            reference(scorer, model.encoding, params.package.reference_rows), out / bundle.REFERENCE
        )
        # Now, and not when it is registered: so many trees may have grown that no replica opens it.
        bundle.verify(out, stage.digest(out))
    size = (bundle.FOLDER / bundle.MODEL).stat().st_size
    verdict = {"parity": float(f"{gap:.0e}"), "rows": test.num_rows, "model_bytes": size}
    stage.write_json(VERDICT, verdict | choice.verdict)
    PAGE.unlink(missing_ok=True)  # it may be of another choice
    if choice.figures:
        with stage.page(PAGE, VERDICT), stage.whole(PAGE) as partial:
            partial.write_text(forms.page(choice), encoding="utf-8")
        stage.say("package", f"{choice.name} is packaged; how the forms compare: {PAGE}")
    digest = stage.digest(bundle.FOLDER)
    stage.say(
        "package",
        f"bundle {digest[:12]}, {size / 1e6:.1f} MB, parity {gap:.0e} on {test.num_rows:,} rows",
    )


def chosen(params: Params, model: Fitted, about: dict[str, Any], scratch: Path) -> forms.Choice:
    """The form that is packaged, and how it compares with the others that package.forms names."""
    plain = forms.exported(model, to_onnx)
    if not params.package.forms:
        return forms.Choice(forms.PLAIN, {forms.PLAIN: plain})
    val = split(model.encoding, "val")
    made = forms.make(params, plain, to_onnx, about, val, scratch)
    return forms.choose(made, about, val, params.package.max_loss_rise)


def of_form(params: Params, name: str, scorer: bundle.Scorer, test: pa.Table) -> dict[str, Any]:
    """What the contract says otherwise where the network is not as it was fitted: evaluate measured
    that one.
    """
    asked = params.package.model_dump(include={"max_loss_rise", name})
    return {
        "form": name,
        "metrics": metrics.point(
            test["label"].to_numpy(), scorer.predict(test), bundle.task(scorer.contract)
        ),
        "params": scorer.contract["params"] | {"package": asked},
    }


def split(encoding: Encoding, name: str) -> pa.Table:
    """The raw feature columns and labels of one split."""
    parts = [
        month.filter(pc.equal(month["split"], name))
        for month in tables.read_months(data.FEATURES, [*encoding.columns, "label", "split"])
    ]
    return pa.concat_tables(parts).drop_columns(["split"])


def largest_gap(scorer: bundle.Scorer, model: Fitted, test: pa.Table, scratch: Path) -> float:
    """The largest absolute difference of ONNX Runtime and torch over the test rows, in
    metrics.unit.
    """
    rows = data.materialise(model.encoding, "test", scratch)
    unit = metrics.unit(rows.labels, model.encoding.target.task)
    return float(np.abs(scorer.predict(test) - model.predict(rows)).max()) / unit


def reference(scorer: bundle.Scorer, encoding: Encoding, rows: int) -> pa.Table:
    """Up to `rows` validation rows, evenly spaced in time, with label and prediction."""
    val = split(encoding, "val")
    step = max(1, -(-val.num_rows // rows))
    kept = val.take(pa.array(range(0, val.num_rows, step)))
    return bundle.answered(kept, scorer.predict(kept))


def contract(params: Params, encoding: Encoding, evaluation: dict[str, Any]) -> dict[str, Any]:
    """What a caller and a registry must know.

    The git commit is a tag of the version: see decision 0006.
    """
    columns = [{"name": name, "type": "string"} for name in encoding.vocabulary]
    columns += [{"name": name, "type": "float32"} for name in encoding.numbers]
    return {
        "dataset": params.dataset.name,
        "as_of": params.as_of.isoformat(),
        "columns": columns,
        "missing": {"string": "", "float32": "NaN"},
        "output": {"name": OUTPUTS[encoding.target.task], "type": "float32"},
        "task": encoding.target.task,
        "classes": encoding.target.classes,
        "label": "label",
        "threshold": params.package.threshold,
        # Values without intervals: how often the bootstrap drew must not name another bundle.
        "metrics": {name: figure["value"] for name, figure in evaluation["metrics"].items()},
        "passed": evaluation["passed"],
        "data": {"features": stage.digest(data.FEATURES), "fit": stage.digest(fitted.FOLDER)},
        "params": {"fit": params.fit.model_dump(), "featurize": params.featurize.model_dump()},
    }


def to_onnx(model: Fitted) -> onnx.ModelProto:
    """One graph from the raw columns, each of shape (rows,), to the prediction."""
    network = _network(model)
    inputs = _inputs(model.encoding, network.ir_version)
    joined = onnx.compose.merge_models(
        inputs, network, io_map=[("codes", "codes"), ("numbers", "numbers")]
    )
    joined.producer_name, joined.producer_version = "headrace", ""
    onnx.checker.check_model(joined)
    return joined


def _network(model: Fitted) -> onnx.ModelProto:
    """The calibrated network as torch exports it, without its notes on files and lines."""
    _hush()
    codes = torch.zeros(2, len(model.encoding.vocabulary), dtype=torch.int64)
    numbers = torch.zeros(2, len(model.encoding.numbers))
    rows = torch.export.Dim("rows")
    program = torch.onnx.export(
        model.network,
        (codes, numbers),
        input_names=["codes", "numbers"],
        output_names=[OUTPUTS[model.encoding.target.task]],
        dynamic_shapes=({0: rows}, {0: rows}),
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None, "the exporter returns a program"
    exported = program.model_proto
    for node in [*exported.graph.node, *exported.graph.value_info, *exported.graph.initializer]:
        node.doc_string = ""
        del node.metadata_props[:]
    del exported.metadata_props[:], exported.graph.metadata_props[:], exported.graph.value_info[:]
    return exported


def _hush() -> None:
    """The exporter warns of torchvision, which no model here needs, and of its own internals."""
    import logging
    import warnings

    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", ".*axis name.*")


def _inputs(encoding: Encoding, ir_version: int) -> onnx.ModelProto:
    """Named raw columns to codes (rows, categories) and numbers (rows, numbers)."""
    nodes, inputs = [], []
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [1])
    for name, values in encoding.vocabulary.items():
        inputs.append(helper.make_tensor_value_info(name, TensorProto.STRING, ["rows"]))
        nodes.append(
            helper.make_node(
                "LabelEncoder",
                [name],
                [f"{name}_code"],
                domain="ai.onnx.ml",
                keys_strings=values,
                values_int64s=list(range(1, len(values) + 1)),
                default_int64=0,
            )
        )
        nodes.append(helper.make_node("Unsqueeze", [f"{name}_code", "axis"], [f"{name}_column"]))
    for name in encoding.numbers:
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows"]))
        nodes.append(helper.make_node("Unsqueeze", [name, "axis"], [f"{name}_column"]))
    for group, names in (("codes", list(encoding.vocabulary)), ("numbers", encoding.numbers)):
        nodes.append(
            helper.make_node("Concat", [f"{name}_column" for name in names], [group], axis=1)
        )
    outputs = [
        helper.make_tensor_value_info(
            "codes", TensorProto.INT64, ["rows", len(encoding.vocabulary)]
        ),
        helper.make_tensor_value_info(
            "numbers", TensorProto.FLOAT, ["rows", len(encoding.numbers)]
        ),
    ]
    graph = helper.make_graph(nodes, "inputs", inputs, outputs, [axis])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, ir_version=ir_version, opset_imports=opsets)


if __name__ == "__main__":
    stage.main(run)
