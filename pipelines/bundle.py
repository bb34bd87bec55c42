"""The bundle as a caller sees it: a folder with its contract, named by the hash of its content.

A bundle from elsewhere is not trusted: `verified` reads its bytes once, checks them, and hands out
only what it checked, so that nothing can change between the look and the use.
"""

import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines import metrics, stage
from pipelines.errors import UserError, intact

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

FOLDER = Path("models/bundle")
MODEL = "model.onnx"
CONTRACT = "bundle.json"
REFERENCE = "reference.parquet"
# The column of its answer, in the reference and in every scored table.
PREDICTION = "prediction"
# Beside it, where the task has classes: the probabilities of all, of which it is the last one's.
PROBABILITIES = "probabilities"
# Rows in one call of ONNX Runtime: few enough that what the network makes of them stays in the
# processor's cache. The whole rows of a register are computed by other instructions than those
# that are left over, and the last digit may differ: so nothing is left over, and the answer to a
# row does not depend on the rows beside it.
BATCH = 256
REGISTER = 16

# What a bundle holds, in the order of its hash, and the most bytes of each.
LARGEST = {CONTRACT: 1 << 20, MODEL: 1 << 28, REFERENCE: 1 << 26}
# A column's type in the contract, and in ONNX.
TYPES = {"string": 8, "float32": 1}
DOMAINS = ("", "ai.onnx.ml")
# The largest number that a float32 holds, and so a row.
MAX_NUMBER = float(np.finfo(np.float32).max)
# All values inside the network together have no more elements for one row: a small file can ask for
# much memory, and a service is asked for a thousand rows at once.
ELEMENTS = 1 << 18
# Weights that the file holds as integers are no larger as floats than those of the largest file.
WEIGHTS = LARGEST[MODEL] // 4
REFERENCE_ROWS = 1 << 20


@dataclass(frozen=True)
class Scorer:
    """A loaded bundle."""

    contract: dict[str, Any]
    session: "InferenceSession"

    def predict(self, table: pa.Table) -> npt.NDArray[np.float32]:
        """A calibrated prediction per row as in pipelines/metrics.py, from the contract's raw
        columns; nulls allowed.
        """
        if not table.num_rows:
            return np.empty((0, *self.session.get_outputs()[0].shape[1:]), np.float32)
        spare = (0, -table.num_rows % REGISTER)
        fed = {
            name: np.pad(values, spare, mode="edge")
            for name, values in feed(self.contract, table).items()
        }
        parts = [
            self.session.run(None, {name: rows[at : at + BATCH] for name, rows in fed.items()})[0]
            for at in range(0, table.num_rows, BATCH)
        ]
        return np.asarray(np.concatenate(parts)[: table.num_rows])


def task(contract: Mapping[str, Any]) -> str:
    """What kind of label a bundle foretells; those made before there were several say nothing."""
    return str(contract.get("task", "binary"))


def answer(contract: Mapping[str, Any]) -> pa.Schema:
    """The columns of what a bundle answers, as every table keeps them."""
    columns = [pa.field(PREDICTION, pa.float32())]
    if task(contract) == "multiclass":
        columns.append(pa.field(PROBABILITIES, pa.list_(pa.float32())))
    return pa.schema(columns)


def answered(rows: pa.Table, prediction: npt.NDArray[np.float32]) -> pa.Table:
    """The rows with the columns of `answer`."""
    held = rows.append_column(PREDICTION, pa.array(metrics.watched(prediction)))
    if prediction.ndim == 1:
        return held
    every = pa.FixedSizeListArray.from_arrays(prediction.ravel(), prediction.shape[1])
    return held.append_column(PROBABILITIES, every.cast(pa.list_(pa.float32())))


def answers(table: pa.Table) -> npt.NDArray[np.float32]:
    """The predictions of a table that `answered` made."""
    if PROBABILITIES not in table.column_names:
        return np.asarray(table[PREDICTION].to_numpy())
    every = table[PROBABILITIES].combine_chunks().flatten().to_numpy()
    return np.asarray(every.reshape(table.num_rows, -1))


def load(folder: Path) -> Scorer:
    """Open the bundle in `folder`, which this checkout made. Raises UserError where it is missing
    or damaged.
    """
    held = contract(folder)
    # ONNX Runtime raises many kinds.
    with intact(folder / MODEL, "ONNX model", Exception):
        return Scorer(held, open_session((folder / MODEL).read_bytes()))


def contract(folder: Path = FOLDER) -> dict[str, Any]:
    """The contract of the bundle in `folder`. Raises UserError where it is missing or damaged."""
    with intact(folder / CONTRACT, "contract"):
        return _contract(folder / CONTRACT, (folder / CONTRACT).read_bytes())


def open_session(model: Path | bytes, threads: int = 1) -> "InferenceSession":
    """ONNX Runtime on a model. Several threads share the rows of a call at any place, so that one's
    last digit may depend on those beside it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # A thread that waits leaves its core to others, as OpenMP's do (pipelines/__init__.py).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def feed(contract: Mapping[str, Any], table: pa.Table) -> dict[str, npt.NDArray[Any]]:
    """The contract's raw columns as the model takes them, each of shape (rows,); nulls allowed."""
    return {c["name"]: _tensor(table[c["name"]], c["type"]) for c in contract["columns"]}


def _tensor(column: pa.ChunkedArray, kind: str) -> npt.NDArray[Any]:
    """A column as the model takes it: missing text is "", a missing number is NaN."""
    if kind == "string":
        return np.asarray(column.fill_null("").to_numpy(), dtype=object)
    return np.asarray(column.cast(pa.float32()).fill_null(np.nan).to_numpy())


@dataclass(frozen=True)
class Verified:
    """A bundle that was checked, in memory: nothing on the disk can change it any more."""

    contract: dict[str, Any]
    model: bytes
    reference: bytes

    def base_rate(self) -> float:
        """The share of positive labels in its reference."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        label = self.contract["label"]
        return float(
            pc.mean(pq.read_table(io.BytesIO(self.reference), columns=[label])[label]).as_py()
        )


def verify(folder: Path, digest: str) -> None:
    """Raise UserError unless `folder` is the bundle of that hash, and harmless to open."""
    verified(folder, digest)


def verified(folder: Path, digest: str) -> Verified:
    """The bundle of that hash, read once and checked before anything in it is opened: three plain
    files of bounded size, the hash, a contract, and a network that its file alone describes.

    Raises UserError with one line.
    """
    files = _read(folder)
    found = stage.digest_of({name: hashlib.sha256(files[name]).hexdigest() for name in LARGEST})
    if found != digest:
        raise UserError(f"{folder}: its hash is {found[:12]}; expected {digest[:12]}")
    contract = _contract(folder / CONTRACT, files[CONTRACT])
    _check_model(folder / MODEL, files[MODEL], contract)
    _check_reference(folder / REFERENCE, files[REFERENCE], contract)
    return Verified(contract, files[MODEL], files[REFERENCE])


def _read(folder: Path) -> dict[str, bytes]:
    """The bytes of the three files, which no link and no surprise may stand for."""
    try:
        names = sorted(one.name for one in folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; expected the folder of a bundle") from None
    if folder.is_symlink() or names != sorted(LARGEST):
        raise UserError(
            f"{folder}: holds {', '.join(names)[:200] or 'nothing'}; "
            f"expected a folder of exactly {', '.join(LARGEST)}"
        )
    return {name: _plain(folder / name, limit) for name, limit in LARGEST.items()}


def _plain(file: Path, limit: int) -> bytes:
    try:
        # A pipe must not hang whoever opens it.
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; expected a plain file, no link") from None
    with os.fdopen(handle, "rb") as opened:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{file}: is no plain file")
        if found.st_size > limit:
            raise UserError(f"{file}: has {found.st_size:,} bytes; allowed {limit:,}")
        return opened.read(limit)


def _contract(file: Path, content: bytes) -> dict[str, Any]:
    """The contract, as far as whoever loads it relies on it."""
    try:
        contract = json.loads(content)
        columns = [(column["name"], column["type"]) for column in contract["columns"]]
        names = [name for name, _ in columns]
        fits = (
            all(isinstance(name, str) and kind in TYPES for name, kind in columns)
            and 0 < len(names) == len(set(names))
            and isinstance(contract["label"], str)
            and isinstance(contract["dataset"], str)
            and 0 <= contract["threshold"] <= 1
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise UserError(
            f"{file}: is no contract; expected JSON with dataset, label, threshold and columns "
            "of distinct names, each of type string or float32"
        )
    return dict(contract)


def _check_model(file: Path, content: bytes, contract: dict[str, Any]) -> None:
    """A network that its file alone describes, over the contract's columns, of known size."""
    import onnx

    try:
        model = onnx.load_model_from_string(content)
        _check_parts(file, model)
        onnx.checker.check_model(model)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except UserError:
        raise
    except Exception as error:  # protobuf and onnx raise many kinds
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: is no valid ONNX model: {line}") from None
    wanted = [(column["name"], TYPES[column["type"]]) for column in contract["columns"]]
    inputs = [(one.name, one.type.tensor_type.elem_type) for one in model.graph.input]
    if inputs != wanted:
        raise UserError(f"{file}: its inputs are not the columns of {CONTRACT}, in their order")
    outputs = [one.type.tensor_type.elem_type for one in model.graph.output]
    if outputs != [TYPES["float32"]]:
        raise UserError(f"{file}: expected one output, of type float")
    _check_sizes(file, inferred)


def _check_parts(file: Path, part: Any) -> None:
    """No operator from elsewhere, no data outside the file, nothing sparse that unfolds."""
    kind = part.DESCRIPTOR.name
    if kind in ("NodeProto", "OperatorSetIdProto") and part.domain not in DOMAINS:
        raise UserError(f"{file}: uses the domain {part.domain[:50]!r}; allowed {DOMAINS}")
    if kind == "TensorProto" and (part.external_data or part.data_location):
        raise UserError(f"{file}: tensor {part.name[:50]!r} keeps its data outside the file")
    if kind == "AttributeProto" and (part.HasField("g") or part.graphs):
        raise UserError(f"{file}: {part.name[:50]!r} holds a network within the network")
    if kind in ("SparseTensorProto", "FunctionProto", "TrainingInfoProto"):
        raise UserError(f"{file}: holds a {kind}; allowed are plain nodes and dense tensors")
    for field, value in part.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                _check_parts(file, inner)


def _check_sizes(file: Path, model: "ModelProto") -> None:
    """Every value's shape is known but for the rows, and their sum is small: none can unfold when
    it is run.
    """
    graph, elements, weights = model.graph, 0, 0
    held = {one.name for one in graph.initializer}
    shapes = [one.type.tensor_type.shape.dim for one in graph.input]
    rows = {dims[0].dim_param if len(dims) == 1 else "" for dims in shapes}
    if len(rows) != 1 or "" in rows:
        raise UserError(f"{file}: its inputs have several shapes; expected one named dimension")
    known = {one.name: one.type.tensor_type for one in [*graph.value_info, *graph.output]}
    for node in graph.node:
        for name in filter(None, node.output):
            if name not in known or not known[name].HasField("shape"):
                raise UserError(f"{file}: the shape of {name[:50]!r} is not known before it is run")
            dims = known[name].shape.dim
            if any(not dim.HasField("dim_value") and dim.dim_param not in rows for dim in dims):
                raise UserError(f"{file}: the size of {name[:50]!r} is not known before it is run")
            by_row = sum(not dim.HasField("dim_value") for dim in dims)
            size = math.prod(dim.dim_value or 1 for dim in dims)
            if _unfolds(node) and node.input[0] in held:
                weights += size
                if weights > WEIGHTS:
                    raise UserError(f"{file}: with {name[:50]!r} it has over {WEIGHTS:,} weights")
                continue
            elements += size
            if by_row > 1 or elements > ELEMENTS:
                raise UserError(
                    f"{file}: with {name[:50]!r} there are over {ELEMENTS:,} elements for a row"
                )


def _unfolds(node: Any) -> bool:
    """Whether it makes floats of integers, element by element."""
    kinds = [one.i for one in node.attribute if one.name == "to"]
    return node.op_type == "DequantizeLinear" or (
        node.op_type == "Cast" and kinds == [TYPES["float32"]]
    )


def _check_reference(file: Path, content: bytes, contract: dict[str, Any]) -> None:
    """A table of bounded size with a numeric label."""
    import pyarrow.parquet as pq

    try:
        footer = pq.read_metadata(io.BytesIO(content))
        label = footer.schema.to_arrow_schema().field(contract["label"]).type
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    except (pa.ArrowException, KeyError, OSError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: is no table with a label: {line}") from None
    unfolded = sum(group.total_byte_size for group in groups)
    if not 0 < footer.num_rows <= REFERENCE_ROWS or unfolded > 4 * LARGEST[REFERENCE]:
        raise UserError(f"{file}: has {footer.num_rows:,} rows, {unfolded:,} bytes unfolded")
    if not (pa.types.is_integer(label) or pa.types.is_floating(label)):
        raise UserError(f"{file}: its label is {label}; expected a number")
