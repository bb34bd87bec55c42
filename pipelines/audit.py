"""audit: does every stage give the same bytes again? Reads; writes nothing here.

in:   HEAD of this checkout
out:  on the screen: every stage, and which of its files differ and where; exit 1 where one does
run:  make audit

All stages run in two clean clones that share nothing: under another path, on another clock, in
another language and with another order of hashes. Where the inputs of a stage differ, what differs
after it may follow from them, and is said so.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipelines import stage
from pipelines.errors import UserError
from pipelines.params import Params

PLACES = {
    "here": {"TZ": "UTC", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "1"},
    "some where/else": {"TZ": "Pacific/Auckland", "LC_ALL": "C", "PYTHONHASHSEED": "2"},
}
MOST = 5  # differences of one file that are said


@dataclass(frozen=True)
class Audited:
    """A stage in both clones: its outputs, those that differ and how, and whether an input did."""

    name: str
    outs: int
    differ: list[str]
    follows: bool


def run(params: Params) -> None:
    """Raises UserError where there is nothing to clone, RuntimeError where a stage differs."""
    _say_what_is_left_out()
    with tempfile.TemporaryDirectory(prefix="audit-") as folder:
        places = [_made(Path(folder) / name, params, env) for name, env in PLACES.items()]
        found = list(compare(*places))
    print()
    for one in found:
        verdict = (
            "same" if not one.differ else "differs, as its inputs do" if one.follows else "DIFFERS"
        )
        print(f"  {one.name:<12}{one.outs:>4} files  {verdict}")
        for line in one.differ:
            print(f"{'':>14}{line}")
    if guilty := [one.name for one in found if one.differ and not one.follows]:
        raise RuntimeError(f"not the same bytes again: {', '.join(guilty)}")
    stage.say("audit", f"{len(found)} stages gave the same bytes twice")


def _say_what_is_left_out() -> None:
    done = subprocess.run(
        ["git", "status", "--porcelain"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{Path.cwd()} is no git repository; audit runs what is committed")
    if lines := [line for line in done.stdout.splitlines() if not line.startswith("??")]:
        stage.say("audit", f"{lines[0][3:]} and what else is not committed is left out")


def _made(place: Path, params: Params, env: dict[str, str]) -> Path:
    """A clone in which every stage ran."""
    place.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["git", "clone", "--quiet", str(Path.cwd()), str(place)], check=True)
    (place / "dvc.lock").unlink(missing_ok=True)
    source = Path(params.fetch.source)
    if not source.is_absolute() and source.is_dir() and not (place / source).exists():
        (place / source).parent.mkdir(parents=True, exist_ok=True)
        (place / source).symlink_to(source.resolve())
    own = {"PATH": stage.search_path(), "PYTHONPATH": str(place)}
    # A cache of its own, where DVC has one for all of the machine: both run what they are to show.
    cache = ["config", "--local", "cache.dir", str(place.resolve() / ".dvc" / "cache")]
    subprocess.run([sys.executable, "-m", "dvc", *cache], cwd=place, check=True)
    repro = [sys.executable, "-m", "dvc", "repro", "--no-run-cache"]
    with subprocess.Popen(
        repro, cwd=place, env=os.environ | own | env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("Running stage"):
                stage.say("audit", f"{place.name}: {line.split()[2].strip(chr(39) + ':')}")
    if process.returncode:
        said = next((one for one in lines if ": error: " in one), lines[-1] if lines else "no word")
        raise UserError(f"a stage failed in a clean clone: {said}")
    return place


def compare(one: Path, two: Path) -> Iterator[Audited]:
    """Every stage, in order, of two checkouts that ran it."""
    locks = [yaml.safe_load((place / "dvc.lock").read_text())["stages"] for place in (one, two)]
    wrong: set[str] = set()
    for name, entry in locks[0].items():
        differ, outs = [], 0
        for out in (item["path"] for item in entry["outs"]):
            files = sorted({*_files(one / out, one), *_files(two / out, two)})
            outs += len(files)
            for file in files:
                lines = list(differences(one / file, two / file))
                differ += [f"{file}: {line}" for line in lines[:MOST]]
            if any(line.startswith(out) for line in differ):
                wrong.add(out)
        follows = any(item["path"] in wrong for item in entry.get("deps", []))
        yield Audited(name, outs, differ, follows)


def _files(path: Path, root: Path) -> list[str]:
    held = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return [file.relative_to(root).as_posix() for file in held]


def differences(one: Path, two: Path) -> Iterator[str]:
    """How two files differ, in the words of what they hold; nothing where their bytes are equal."""
    if not (one.exists() and two.exists()):
        yield f"only in the {'first' if one.exists() else 'second'} clone"
        return
    if one.read_bytes() == two.read_bytes():
        return
    found = []
    if one.suffix == ".parquet":
        found = list(_of_tables(pq.read_table(one), pq.read_table(two)))
    elif one.suffix == ".json":
        found = list(_of_values(json.loads(one.read_text()), json.loads(two.read_text()), ""))
    pairs = zip(one.read_bytes(), two.read_bytes(), strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    yield from found or [f"from byte {same} on"]


def _of_tables(one: pa.Table, two: pa.Table) -> Iterator[str]:
    if one.schema != two.schema:
        yield f"columns {one.schema.names} against {two.schema.names}, or their types"
    elif one.num_rows != two.num_rows:
        yield f"{one.num_rows} rows against {two.num_rows}"
    else:
        for name in one.column_names:
            a, b = (table[name].combine_chunks() for table in (one, two))
            if not a.equals(b):
                same = sum(x == y for x, y in zip(a.to_pylist(), b.to_pylist(), strict=True))
                yield f"column {name}, in {len(a) - same} of {len(a)} rows"


def _of_values(one: Any, two: Any, where: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(two, dict):
        for key in sorted({*one, *two}):
            yield from _of_values(one.get(key), two.get(key), f"{where}.{key}" if where else key)
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for number, pair in enumerate(zip(one, two, strict=True)):
            yield from _of_values(*pair, f"{where}[{number}]")
    elif one != two:
        yield f"{where} is {str(one)[:60]} and {str(two)[:60]}"


def main() -> int:
    """Exit status: 0, 1 where a stage differs, 2 where there is nothing to run."""
    return stage.guarded(stage.asked(), run)


if __name__ == "__main__":
    sys.exit(main())
