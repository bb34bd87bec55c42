"""An int8 network answers nearly as before, to every row by itself, and repeats byte for byte."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deploy import tiny
from deploy.targets import bundles
from world import Checkout

from pipelines import bundle, quantize, stage
from pipelines.deploy.serve import model
from pipelines.deploy.serve.model import Named
from pipelines.params import Params


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle of one text and two numbers, with two layers."""
    return bundles.release(tmp_path, 1).folder


def _int8(folder: Path) -> onnx.ModelProto:
    contract, rows = stage.read_json(folder / bundle.CONTRACT), _rows(folder)
    return quantize.quantized(onnx.load(folder / bundle.MODEL), contract, rows)


def _rows(folder: Path) -> pa.Table:
    return pq.read_table(folder / bundle.REFERENCE)


def _answers(folder: Path, model: onnx.ModelProto, rows: pa.Table) -> npt.NDArray[np.float32]:
    contract = stage.read_json(folder / bundle.CONTRACT)
    return bundle.Scorer(contract, bundle.open_session(model.SerializeToString())).predict(rows)


def test_its_layers_are_int8_and_nothing_before_them(folder: Path) -> None:
    graph = _int8(folder).graph
    held = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    for name in ("w1_quantized", "w2_quantized"):
        assert held[name].dtype == np.int8
        assert np.abs(held[name].astype(int)).max() <= 64  # in seven bits
    quantized = [node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert sorted(quantized) == ["r", "x"]  # what goes into the two layers, and nothing else


def test_it_answers_nearly_as_before(folder: Path) -> None:
    rows = _rows(folder)
    before = _answers(folder, onnx.load(folder / bundle.MODEL), rows)
    after = _answers(folder, _int8(folder), rows)
    assert np.abs(before - after).max() < 0.03
    assert np.abs(before - after).mean() < 0.005


def test_the_answer_to_a_row_does_not_depend_on_the_rows_beside_it(folder: Path) -> None:
    contract, rows = stage.read_json(folder / bundle.CONTRACT), _rows(folder).slice(0, 300)
    session = bundle.open_session(_int8(folder).SerializeToString())
    scorer = bundle.Scorer(contract, session)
    beside = scorer.predict(rows)
    alone = [scorer.predict(rows.slice(at, 1))[0] for at in range(rows.num_rows)]
    np.testing.assert_array_equal(alone, beside)
    backwards = rows.take(pa.array(range(rows.num_rows - 1, -1, -1)))
    np.testing.assert_array_equal(scorer.predict(backwards)[::-1], beside)


def test_the_same_rows_give_the_same_bytes(folder: Path) -> None:
    assert _int8(folder).SerializeToString() == _int8(folder).SerializeToString()


@pytest.mark.parametrize("more", [None, bundle.ELEMENTS // 50])
def test_a_bundle_of_it_is_verified_and_served(folder: Path, params: Params, more: int) -> None:
    """Also where it has more weights than a row may have values."""
    if more is not None:
        onnx.save(_wider(onnx.load(folder / bundle.MODEL), more), folder / bundle.MODEL)
    small = _int8(folder)
    onnx.save(small, folder / bundle.MODEL)
    digest = stage.digest(folder)
    bundle.verify(folder, digest)
    served = model.load(Named(folder, digest), params.serve)
    columns = served.contract.columns([["EWR", None]], [[0.5, None], [None, 1.5]])
    asked = pa.table({"origin": ["EWR", None], "delay": [0.5, None], "temp": [None, 1.5]})
    np.testing.assert_allclose(
        served.probabilities(columns), _answers(folder, small, asked), atol=1e-3
    )


def _wider(model: onnx.ModelProto, width: int) -> onnx.ModelProto:
    """With a layer of so many units between the two."""
    random = np.random.default_rng(2)
    weights = {
        "w": random.normal(size=(bundles.WIDTH, width)) / 8,
        "w_": random.normal(size=(width, 1)) / width,
    }
    for name, values in weights.items():
        tensor = onnx.numpy_helper.from_array(values.astype(np.float32), name)
        model.graph.initializer.append(tensor)
    last = next(at for at, node in enumerate(model.graph.node) if "w2" in node.input)
    model.graph.node.insert(last, onnx.helper.make_node("Gemm", ["r", "w"], ["wide"]))
    model.graph.node[last + 1].input[:] = ["wide", "w_", "b2"]
    return model


def test_what_is_int8_or_has_no_layer_comes_back_as_it_is(folder: Path, checkout: Checkout) -> None:
    small = _int8(folder)
    contract = stage.read_json(folder / bundle.CONTRACT)
    assert quantize.quantized(small, contract, _rows(folder)) is small
    tiny.make_bundle()
    plain = onnx.load(bundle.FOLDER / bundle.MODEL)
    contract = stage.read_json(bundle.FOLDER / bundle.CONTRACT)
    assert quantize.quantized(plain, contract, _rows(bundle.FOLDER)) is plain
