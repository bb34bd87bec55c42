"""Features as a network takes them: codes for categories, floats for numbers, both memory-mapped.

Shapes: codes (rows, categories) int32, 0 for missing or unseen; numbers (rows, numbers) float32,
NaN for missing; labels (rows,) float32.
"""

import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipelines import tables
from pipelines.errors import UserError, naming
from pipelines.params import Target

FEATURES = Path("data/features")
RARE = 20  # fewer train rows than this teach an embedding nothing
BATCH = 2048  # rows at a time where nothing is learned
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Encoding:
    """The columns in order, each category's values (the code of a value is its place), and what
    kind of label is learned from them.
    """

    vocabulary: dict[str, list[str]]
    numbers: list[str]
    target: Target

    @property
    def columns(self) -> list[str]:
        return [*self.vocabulary, *self.numbers]

    def codes(self, table: pa.Table) -> npt.NDArray[np.int32]:
        """Shape (rows, categories)."""
        columns = [_codes(table[name], values) for name, values in self.vocabulary.items()]
        return np.stack(columns, axis=1) if columns else np.empty((table.num_rows, 0), np.int32)

    def floats(self, table: pa.Table) -> npt.NDArray[np.float32]:
        """Shape (rows, numbers)."""
        out = np.empty((table.num_rows, len(self.numbers)), np.float32)
        for at, name in enumerate(self.numbers):
            out[:, at] = pc.fill_null(table[name], np.nan).to_numpy()
        return out


def learn(
    categories: Sequence[str], numbers: Sequence[str], target: Target, folder: Path = FEATURES
) -> Encoding:
    """The encoding of the train rows, read month by month; a value seen fewer than RARE times has
    no code.
    """
    counts: dict[str, Counter[str]] = {name: Counter() for name in categories}
    for month in tables.read_months(folder, [*categories, "split"]):
        train = month.filter(pc.equal(month["split"], "train"))
        for name in categories:
            for value in train[name].drop_null().value_counts().to_pylist():
                counts[name][value["values"]] += value["counts"]
    vocabulary = {
        name: sorted(value for value, count in counts[name].items() if count >= RARE)
        for name in categories
    }
    return Encoding(vocabulary, list(numbers), target)


def _codes(column: pa.ChunkedArray, values: list[str]) -> npt.NDArray[np.int32]:
    found = pc.index_in(column, pa.array(values, pa.string()))
    return pc.add(pc.fill_null(found, -1), 1).to_numpy().astype(np.int32)  # type: ignore[no-any-return]


class Rows:
    """The rows of one split in memory-mapped arrays; a whole batch is taken by its indices at
    once.
    """

    def __init__(self, folder: Path, numbers: str = "numbers") -> None:
        self.folder = folder
        names = ("codes", numbers, "labels")
        self.arrays = tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names)

    def __len__(self) -> int:
        return len(self.arrays[2])

    @property
    def labels(self) -> npt.NDArray[np.float64]:
        """Shape (rows,)."""
        return np.asarray(self.arrays[2]).astype(np.float64)

    def take(self, indices: npt.NDArray[np.int64]) -> Batch:
        # Twice as fast as array[indices].
        codes, numbers, labels = (torch.from_numpy(a.take(indices, axis=0)) for a in self.arrays)
        return codes, numbers, labels

    def batches(self) -> Iterator[Batch]:
        """All rows in order, BATCH at a time."""
        for at in range(0, len(self), BATCH):
            codes, numbers, labels = (torch.tensor(array[at : at + BATCH]) for array in self.arrays)
            yield codes, numbers, labels


class Held(Rows):
    """The same rows in the memory of a device, where a batch is taken."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        self.folder, self.arrays = rows.folder, rows.arrays
        self.tensors = [
            torch.tensor(array[:0], device=device).new_empty(array.shape) for array in rows.arrays
        ]
        for at, batch in enumerate(rows.batches()):
            for tensor, part in zip(self.tensors, batch, strict=True):
                tensor[at * BATCH : (at + 1) * BATCH] = part

    def take(self, indices: npt.NDArray[np.int64]) -> Batch:
        at = torch.from_numpy(indices).to(self.tensors[0].device)
        codes, numbers, labels = (tensor[at] for tensor in self.tensors)
        return codes, numbers, labels


def near(rows: Rows, device: torch.device) -> Rows:
    """The rows held by a CUDA GPU, where they take less than a third of its free memory: a small
    network learns a batch sooner than the next one can be sent.
    """
    if device.type != "cuda":
        return rows
    # Lightning's objects hold one another, and with them the rows of an earlier fit.
    gc.collect()
    torch.cuda.empty_cache()
    size = sum(array.nbytes for array in rows.arrays)
    return Held(rows, device) if 3 * size < torch.cuda.mem_get_info(device)[0] else rows


def materialise(encoding: Encoding, split: str, into: Path, source: Path = FEATURES) -> Rows:
    """Write the arrays of one split below `into`, month by month, and map them."""
    folder = into / split
    folder.mkdir(parents=True, exist_ok=True)
    files = tables.months(source)
    wanted = (
        ("codes", np.int32, (len(encoding.vocabulary),)),
        ("numbers", np.float32, (len(encoding.numbers),)),
    )
    total = sum(_count(file, split) for file in files)
    if total == 0:
        raise UserError(
            f"{source}: no {split} row; check featurize.test_days and val_days against as_of"
        )
    outs = {
        name: _mapped(folder / f"{name}.npy", kind, (total, *shape))
        for name, kind, shape in (*wanted, ("labels", np.float32, ()))
    }
    start = 0
    for month in tables.read_months(source, [*encoding.columns, "label", "split"]):
        rows = month.filter(pc.equal(month["split"], split))
        at = slice(start, start + rows.num_rows)
        outs["codes"][at] = encoding.codes(rows)
        outs["numbers"][at] = encoding.floats(rows)
        outs["labels"][at] = rows["label"].to_numpy()
        _check(outs["labels"][at], encoding.target)
        start += rows.num_rows
    for out in outs.values():
        out.flush()
    return Rows(folder)


def _check(labels: npt.NDArray[np.float32], target: Target) -> None:
    if target.task == "regression":
        wrong, expected = ~np.isfinite(labels), "a number"
    else:
        classes = max(2, len(target.classes))
        wrong = ~np.isin(labels, np.arange(classes, dtype=np.float32))
        expected = f"0 to {classes - 1}, as dataset.target has it"
    if wrong.any():
        raise UserError(f"{FEATURES}: a label is {labels[wrong][0]}; expected {expected}")


def _mapped(path: Path, kind: npt.DTypeLike, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A new memory-mapped array whose space on disk is taken: a write to mapped memory that the
    disk cannot hold kills the process.
    """
    with naming(path):
        out = np.lib.format.open_memmap(path, "w+", dtype=kind, shape=shape)
        if sys.platform != "darwin":  # macOS has no call for it
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return out


def _count(file: Path, split: str) -> int:
    column = tables.read_file(file, ["split"])["split"]
    return int(pc.sum(pc.equal(column, split)).as_py() or 0)


@torch.inference_mode()
def encode(encoder: Callable[[torch.Tensor], torch.Tensor], rows: Rows) -> Rows:
    """The same rows with their numbers encoded, on disk: done once, not once an epoch."""
    width = encoder(torch.zeros(1, rows.arrays[1].shape[1])).shape[1]
    out = _mapped(rows.folder / "encoded.npy", np.float32, (len(rows), width))
    start = 0
    for _, numbers, labels in rows.batches():
        out[start : start + len(labels)] = encoder(numbers).numpy()
        start += len(labels)
    out.flush()
    return Rows(rows.folder, "encoded")
