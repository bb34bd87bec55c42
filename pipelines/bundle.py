"""The bundle as a caller sees it: a folder with its contract, named by the hash of its content."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines import stage
from pipelines.errors import UserError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FOLDER = Path("models/bundle")
MODEL = "model.onnx"
CONTRACT = "bundle.json"
REFERENCE = "reference.parquet"
# The column of its answer, in the reference and in every scored table.
PREDICTION = "prediction"
BATCH = 2048


@dataclass(frozen=True)
class Scorer:
    """A loaded bundle."""

    contract: dict[str, Any]
    session: "InferenceSession"

    def predict(self, table: pa.Table) -> npt.NDArray[np.float32]:
        """Calibrated probability per row, shape (rows,), from the contract's raw columns; nulls
        allowed.
        """
        parts = []
        for start in range(0, table.num_rows, BATCH):
            batch = table.slice(start, BATCH)
            feed = {
                c["name"]: _tensor(batch[c["name"]], c["type"]) for c in self.contract["columns"]
            }
            parts.append(self.session.run(None, feed)[0])
        return np.concatenate(parts) if parts else np.empty(0, np.float32)


def load(folder: Path) -> Scorer:
    """Open the bundle in `folder`. Raises UserError where it is missing."""
    import onnxruntime

    contract = stage.read_json(folder / CONTRACT)
    if not (folder / MODEL).is_file():
        raise UserError(f"{folder / MODEL} is missing; run dvc repro package")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        folder / MODEL, options, providers=["CPUExecutionProvider"]
    )
    return Scorer(contract, session)


def _tensor(column: pa.ChunkedArray, kind: str) -> npt.NDArray[Any]:
    """A column as the model takes it: missing text is "", a missing number is NaN."""
    if kind == "string":
        return np.asarray(column.fill_null("").to_numpy(), dtype=object)
    return np.asarray(column.cast(pa.float32()).fill_null(np.nan).to_numpy())
