"""What a path of the graph holds, read from its files: rows and columns of tables, and the hash by
which dvc.lock names it.
"""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 20


@dataclass(frozen=True)
class File:
    """One file: its path within the dataset, its bytes; of a table its rows and the types of its
    columns ("" where text has none).
    """

    path: str
    md5: str
    size: int | None = None
    rows: int | None = None
    columns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Dataset:
    """A file, or a folder of files in the order of their paths."""

    name: str
    files: tuple[File, ...]

    @property
    def md5(self) -> str:
        """As DVC has it: of a folder, that of the list of its files."""
        if [file.path for file in self.files] == [""]:
            return self.files[0].md5
        listed = [{"md5": file.md5, "relpath": file.path} for file in self.files]
        return _md5(json.dumps(listed, sort_keys=True).encode()) + ".dir"

    @property
    def rows(self) -> int | None:
        """None where one of the files is no table."""
        counts = [file.rows for file in self.files if file.rows is not None]
        return sum(counts) if counts and len(counts) == len(self.files) else None

    @property
    def size(self) -> int:
        return sum(file.size or 0 for file in self.files)

    @property
    def columns(self) -> dict[str, str]:
        """Of the newest file: all have the same. None where not all files are tables."""
        return {} if self.rows is None else dict(self.files[-1].columns)


def read(path: str) -> Dataset:
    """The dataset at the path. Raises FileNotFoundError."""
    top = Path(path)
    if top.is_dir():
        found = [file for file in top.rglob("*") if file.is_file()]
        named = sorted((file.relative_to(top).as_posix(), file) for file in found)
    else:
        named = [("", top)]
    with ThreadPoolExecutor() as pool:  # hashing lets the others run
        return Dataset(path, tuple(pool.map(lambda one: _file(*one), named)))


def tables(dataset: Dataset) -> list[Dataset]:
    """The tables in a folder of text, each `<table>.csv` or `<table>/…`; any other is one."""
    if not dataset.files or not all(file.path.endswith(".csv") for file in dataset.files):
        return [dataset]
    grouped: dict[str, list[File]] = {}
    for file in dataset.files:
        table, _, rest = file.path.partition("/")
        part = File(rest, file.md5, file.size, file.rows, file.columns)
        grouped.setdefault(table.removesuffix(".csv"), []).append(part)
    return [Dataset(f"{dataset.name}/{table}", tuple(files)) for table, files in grouped.items()]


def cached(path: str, md5: str) -> Dataset | None:
    """What DVC's cache says of a folder that is not on the disk: the hashes of its files."""
    listed = Path(".dvc/cache/files/md5", md5[:2], md5[2:])
    if not md5.endswith(".dir") or not listed.is_file():
        return None
    files = json.loads(listed.read_text(encoding="utf-8"))
    return Dataset(path, tuple(File(file["relpath"], file["md5"]) for file in files))


def _file(name: str, path: Path) -> File:
    md5, lines, header = hashlib.md5(usedforsecurity=False), 0, b""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            header = header or chunk.partition(b"\n")[0]
            lines += chunk.count(b"\n")
            md5.update(chunk)
    rows: int | None = None
    columns: Iterable[tuple[str, str]] = ()
    if path.suffix == ".parquet":
        from pipelines import tables

        footer = tables.footer(path)
        rows = footer.num_rows
        columns = [(field.name, str(field.type)) for field in footer.schema.to_arrow_schema()]
    elif path.suffix == ".csv":  # `load` takes no line that is not a row
        rows = lines - 1
        names = header.decode("utf-8-sig", errors="replace").split(",")
        columns = [(name.strip(' "\r'), "") for name in names]
    return File(name, md5.hexdigest(), path.stat().st_size, rows, tuple(columns))


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
