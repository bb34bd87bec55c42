"""Months: the unit in which tables grow. What a month was made of names it; made once, it is kept.

    .state/months/<stage>/<key>.<sha256>.parquet

A stage names every month by a hash of all that its rows depend on: files, code, params. One that is
kept is linked to where it belongs; its rows are neither read nor written. The others are made, some
at a time, so that memory holds a part of a table that grows for years. A rebuild gives the same
bytes as months that came one by one, for no month depends on which others are made beside it.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import pyarrow.parquet as pq

from pipelines import stage

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# What leaves its mark on the bytes of every month.
MAKERS = ("pyarrow", "pyspark", "pysail")
CODE = [Path(__file__).with_name(name) for name in ("engine.py", "months.py", "tables.py")]
# What nobody took for so long is removed.
RETENTION = 90 * 86400  # seconds


def begin(month: str, zone: str = "UTC") -> datetime:
    """The first moment of a month, such as 2013-05, on the clock of a zone."""
    return datetime.strptime(month, "%Y-%m").replace(tzinfo=ZoneInfo(zone))


def end(month: str, zone: str = "UTC") -> datetime:
    """The first moment after it."""
    return begin(after(month), zone)


def after(month: str) -> str:
    year, number = int(month[:4]), int(month[5:])
    return f"{year + number // 12:04}-{number % 12 + 1:02}"


def between(first: datetime, last: datetime, zone: str = "UTC") -> list[str]:
    """The months that hold a moment from `first` to just before `last`, on the clock of a zone."""
    found = [f"{first.astimezone(ZoneInfo(zone)):%Y-%m}"]
    while end(found[-1], zone) < last:
        found.append(after(found[-1]))
    return found


def runs(months: Sequence[str], rows: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Months that follow each other, together as long as they have at most so many rows."""
    run: list[str] = []
    held = 0
    for month in months:
        if run and (after(run[-1]) != month or held + rows[month] > most):
            yield run
            run, held = [], 0
        run.append(month)
        held += rows[month]
    if run:
        yield run


def only(frame: "DataFrame", time: str, run: Sequence[str]) -> "DataFrame":
    """The rows whose time lies in these months, which follow each other; or is missing, so that it
    is missed.
    """
    from pyspark.sql import functions as F

    first, last = F.lit(begin(run[0])), F.lit(end(run[-1]))
    at = F.col(time)
    return frame.where(at.isNull() | ((at >= first) & (at < last)))


def said(new: Collection[str], all_: Collection[str]) -> str:
    """How many months are new, for people."""
    return f"{len(new)} of {len(all_)} months are new"


def key(code: Sequence[Path], **made_of: object) -> str:
    """The name of all that a month is made of: the text of a stage's code, and values for JSON."""
    texts = [stage.sha256(path) for path in (*CODE, *code)]
    whole = {"code": texts, "makers": [version(name) for name in MAKERS], **made_of}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]


class Kept:
    """The months that one stage ever made on this machine."""

    def __init__(self, name: str) -> None:
        self.folder = stage.STATE / "months" / name
        # What has rows goes before what says that there are none.
        files = sorted(self.folder.glob("*"), key=lambda file: file.suffix == ".parquet")
        self.files = {file.name.split(".")[0]: file for file in files}

    def fill(
        self, out: Path, keys: Mapping[str, str], make: Callable[[list[str]], int]
    ) -> tuple[list[str], int]:
        """Put every month of `keys` into `out`: linked where it is kept, else by `make`, which
        returns the rows it made, and kept. Returns the months that were new, and their rows.
        """
        new = [name for name in keys if not self.take(keys[name], out / f"{name}.parquet")]
        made = make(new) if new else 0
        # One without rows has no file, but not every one without a file has no rows.
        files = [file for name in new if (file := out / f"{name}.parquet").exists()]
        found = sum(pq.read_metadata(file).num_rows for file in files)
        if found != made:
            raise RuntimeError(f"{out}: {made:,} rows were made, and {found:,} are there")
        for name in new:
            self.keep(keys[name], out / f"{name}.parquet")
        self.sweep()
        return new, made

    def take(self, key: str, target: Path) -> bool:
        """Link the month to `target`; False where it is not kept. One without rows has no file."""
        file = self.files.get(key)
        if file is None:
            return False
        if file.suffix == ".none":
            os.utime(file)
        elif stage.sha256(file) == file.name.split(".")[1]:
            os.utime(file)
            stage.link(target, file)
        else:  # damaged
            file.unlink(missing_ok=True)
            return False
        return True

    def keep(self, key: str, made: Path) -> None:
        """Keep the month; where `made` does not exist, that it has no rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not made.exists():
            (self.folder / f"{key}.none").touch()
            return
        file = self.folder / f"{key}.{stage.sha256(made)}.parquet"
        with suppress(FileExistsError):  # another made the same
            stage.link(file, made)

    def sweep(self) -> None:
        """Remove what nobody took for a long time."""
        for file in self.folder.glob("*"):
            if time.time() - file.stat().st_mtime > RETENTION:
                file.unlink(missing_ok=True)
