"""quantize: a network whose layers multiply int8, scaled by what went into them on sample rows.

Weights are int8, a scale for each output of a layer. What goes into a layer is uint8, whose scale
is fixed beforehand by the smallest and largest value on the sample ("static", after Jacob et al.,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
2018): so the answer to a row does not depend on the rows beside it. What comes out of a layer is
float again, and so is all before the first layer: ranks of numbers need their digits.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import pyarrow as pa

from pipelines import bundle, tables

if TYPE_CHECKING:
    from onnx import ModelProto

ROWS = 2000  # of the sample, evenly spaced: the encoder bounds its numbers, so few show the range
LAYERS = ["MatMul", "Gemm"]


def quantized(model: "ModelProto", contract: Mapping[str, Any], rows: pa.Table) -> "ModelProto":
    """The network with int8 layers, calibrated on up to ROWS of the `rows`, which have the
    contract's columns.

    A network without layers, or one that is int8 already, comes back as it is; so do trees.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static

    layers = _layers(model)
    if is_int8(model) or not layers:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    # Merged graphs name a domain twice, which the quantizer does not take.
    versions = {one.domain: one.version for one in model.opset_import}
    del copy.opset_import[:]
    copy.opset_import.extend(onnx.helper.make_opsetid(*one) for one in versions.items())
    sample = bundle.feed(contract, rows.take(pa.array(tables.spaced(rows.num_rows, ROWS))))
    with tempfile.TemporaryDirectory() as made, _silent():
        quantize_static(
            copy,
            Path(made) / bundle.MODEL,
            _Once(sample),
            op_types_to_quantize=LAYERS,
            nodes_to_quantize=layers,
            per_channel=True,
            # Seven bits: AVX2 adds products of pairs in 16, which eight may overflow.
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": LAYERS},
        )
        small = onnx.load(Path(made) / bundle.MODEL)
    small.producer_name, small.producer_version = model.producer_name, model.producer_version
    del small.metadata_props[:], small.graph.value_info[:]
    onnx.checker.check_model(small)
    return small


def _layers(model: "ModelProto") -> list[str]:
    """The nodes that multiply what comes in by weights. Trees multiply theirs by what comes in, to
    count: they must stay exact.
    """
    weights = {one.name for one in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in LAYERS and node.input[1] in weights
    ]


def is_int8(model: "ModelProto") -> bool:
    """Whether any layer's input is quantized."""
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


class _Once:
    """One batch, as the quantizer reads it."""

    def __init__(self, sample: dict[str, npt.NDArray[Any]]) -> None:
        self._left: Iterator[dict[str, npt.NDArray[Any]]] = iter([sample])

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        return next(self._left, None)


@contextmanager
def _silent() -> Iterator[None]:
    """The quantizer's advice is about networks of images."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
