"""The Open Inference Protocol, version 2, over REST: one tensor per column.

A tensor has shape [rows] or [rows, 1] and flat data: BYTES for text, FP32 for numbers. Beyond the
protocol, null in the data is a missing value: JSON has no NaN.
"""

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from pipelines.bundle import MAX_NUMBER
from pipelines.deploy.serve.contract import NUMBER, TEXT, Columns, Contract
from pipelines.deploy.serve.refusal import Refusal

DATATYPES = {"string": "BYTES", "float32": "FP32"}
OUTPUT = "probability"
_READERS: dict[str, msgspec.json.Decoder[Any]] = {
    "BYTES": msgspec.json.Decoder(list[TEXT]),
    "FP32": msgspec.json.Decoder(list[NUMBER]),
}


class Tensor(Struct, forbid_unknown_fields=True):
    name: str
    shape: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1, max_length=2)]
    datatype: str
    data: msgspec.Raw
    parameters: dict[str, Any] | UnsetType = UNSET


class Wanted(Struct, forbid_unknown_fields=True):
    name: str
    parameters: dict[str, Any] | UnsetType = UNSET


class Inference(Struct, forbid_unknown_fields=True):
    inputs: list[Tensor]
    id: str | UnsetType = UNSET
    parameters: dict[str, Any] | UnsetType = UNSET
    outputs: list[Wanted] | UnsetType = UNSET


_REQUEST = msgspec.json.Decoder(Inference)


def read(contract: Contract, body: bytes) -> tuple[Columns, str | UnsetType]:
    """The rows of an inference request, and its id. Raises Refusal that names the tensor."""
    try:
        asked = _REQUEST.decode(body)
    except msgspec.ValidationError as error:
        raise Refusal(422, str(error).replace("`", "")) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON: {error}") from None
    for output in asked.outputs or []:
        if output.name != OUTPUT:
            raise Refusal(422, f"output {output.name[:50]}: expected {OUTPUT}")
    tensors = {tensor.name: tensor for tensor in asked.inputs}
    if len(tensors) < len(asked.inputs):
        raise Refusal(422, "inputs: a tensor stands twice; expected every column once")
    known = dict(contract.order)
    for name in tensors:
        if name not in known:
            raise Refusal(422, f"tensor {name[:50]}: no column of the model")
    values = {name: _values(contract, name, kind, tensors) for name, kind in known.items()}
    first = contract.order[0][0]
    for name, column in values.items():
        if len(column) != len(values[first]):
            raise Refusal(
                422, f"tensor {name}: {len(column)} rows; expected {len(values[first])} as {first}"
            )
    texts, numbers = (
        [values[name] for name in part] for part in (contract.texts, contract.numbers)
    )
    return contract.columns(texts, numbers), asked.id


def _values(contract: Contract, name: str, kind: str, tensors: dict[str, Tensor]) -> list[Any]:
    """The checked data of one tensor."""
    tensor, datatype = tensors.get(name), DATATYPES[kind]
    if tensor is None:
        raise Refusal(422, f"tensor {name}: missing; expected {datatype} of shape [rows]")
    if tensor.datatype != datatype:
        raise Refusal(422, f"tensor {name}: datatype {tensor.datatype[:50]}; expected {datatype}")
    rows, width = tensor.shape[0], tensor.shape[-1] if len(tensor.shape) == 2 else 1
    if width != 1 or not 0 < rows <= contract.max_rows:
        raise Refusal(
            422, f"tensor {name}: shape {tensor.shape}; expected [rows] or [rows, 1] with 1 to "
            f"{contract.max_rows:,} rows"
        )  # fmt: skip
    try:
        values: list[Any] = _READERS[datatype].decode(tensor.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(422, f"tensor {name}: {str(error).replace('`', '')}") from None
    if len(values) != rows:
        raise Refusal(422, f"tensor {name}: {len(values)} values; its shape says {rows}")
    return values


def metadata(contract: Contract, name: str, version: int) -> dict[str, Any]:
    """What the model takes and gives."""
    return {
        "name": name,
        "versions": [str(version)],
        "platform": "onnx_onnxruntime",
        "inputs": [
            {"name": column, "datatype": DATATYPES[kind], "shape": [-1]}
            for column, kind in contract.order
        ],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1]}],
    }


def schema(contract: Contract) -> dict[str, Any]:
    """An inference request as JSON Schema. It cannot say that all tensors have as many rows."""
    named = {"type": "object", "properties": {"name": {"const": OUTPUT}, "parameters": _PARAMETERS}}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": _PARAMETERS,
            "inputs": {
                "type": "array",
                "minItems": len(contract.order),
                "maxItems": len(contract.order),
                "items": {"oneOf": [_tensor(*column) for column in contract.order]},
            },
            "outputs": {
                "type": "array",
                "items": named | {"required": ["name"], "additionalProperties": False},
            },
        },
    }


_PARAMETERS = {"type": "object"}


def _tensor(name: str, kind: str) -> dict[str, Any]:
    number = {"type": ["number", "null"], "minimum": -MAX_NUMBER, "maximum": MAX_NUMBER}
    value = {"type": ["string", "null"]} if kind == "string" else number
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["name", "shape", "datatype", "data"],
        "properties": {
            "name": {"const": name},
            "datatype": {"const": DATATYPES[kind]},
            "shape": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
            "data": {"type": "array", "items": value},
            "parameters": _PARAMETERS,
        },
    }
