"""scale: load, validate and featurize on the flights of many years, beside other engines.

Every stage of every engine is a process of its own, measured with its children: seconds, seconds
of processor, peak memory. Engines: embedded (Sail), jvm (local[2]), and duckdb and polars, which
do the same in peers.py; every value of every table is compared with the embedded engine's. MOST
says how many years an engine is asked for at most, where it would take longer than it tells.

Needs what `make setup` installs. Run: python benchmarks/scale.py [YEARS …] [ENGINE …], such as
1 10 embedded duckdb. TMPDIR takes 130 MB a year and engine at work, and is left empty.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grown
import psutil
import pyarrow.parquet as pq
import yaml
from bench import ROOT

from pipelines import params as parameters
from pipelines.ingest import featurize, load, validate

SIZES = (1, 10, 50, 100)
STAGES = ("load", "validate", "featurize")
TABLES = (load.EVENTS, validate.ACCEPTED, validate.QUARANTINE, featurize.FEATURES)
ENGINES = {"embedded": "embedded", "jvm": "local[2]", "duckdb": None, "polars": None}
MOST = {"embedded": 100, "jvm": 10, "duckdb": 50, "polars": 50}
IMPORTED = "import great_expectations"
PAUSE = 0.05  # seconds between two looks at the memory


@dataclass(frozen=True)
class Cost:
    """What a process and its children took: seconds, of processor too, and megabytes at most."""

    wall: float
    cpu: float
    peak: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.wall + other.wall, self.cpu + other.cpu, max(self.peak, other.peak))

    def __str__(self) -> str:
        return f"{self.wall:>9.1f}{self.cpu:>9.1f}{self.peak:>9,.0f}"


Costs = dict[tuple[int, str, str], Cost]


def main() -> None:
    sizes = [int(word) for word in sys.argv[1:] if word.isdigit()] or list(SIZES)
    engines = [word for word in sys.argv[1:] if word in ENGINES] or list(ENGINES)
    costs: Costs = {}
    print(f"{'years':>5}  {'engine':<10}{'stage':<12}{'wall s':>9}{'cpu s':>9}{'peak MB':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            one_size(Path(folder), size, engines, costs)
        for size in [size for size in sizes if "embedded" in engines and size <= MOST["jvm"]]:
            costs |= a_month(Path(folder), size)
        imported = measured(["-c", IMPORTED], Path(folder))
    promises(costs, sizes, imported)


def one_size(folder: Path, size: int, engines: Sequence[str], costs: Costs) -> None:
    raw = folder / "raw"
    grown.grow(parameters.load(ROOT / "params.yaml"), size, raw)
    held: dict[str, Path] = {}
    for engine in engines:
        if size > MOST[engine]:
            continue
        held[engine] = workspace(folder / engine, raw, f"{grown.years(size)[-1] + 1}-01-02", engine)
        for stage in STAGES:
            costs[size, engine, stage] = cost = measured(command(engine, stage), held[engine])
            print(f"{size:>5}  {engine:<10}{stage:<12}{cost}", flush=True)
        whole = total(costs, size, engine)
        print(f"{size:>5}  {engine:<10}{'all':<12}{whole}", flush=True)
        if "embedded" in held and engine != "embedded":
            print(f"{'':>7}{same(held['embedded'], held[engine])}", flush=True)
            shutil.rmtree(held.pop(engine))
    for place in (raw, *held.values()):
        shutil.rmtree(place)


def command(engine: str, stage: str) -> list[str]:
    if ENGINES[engine]:
        return ["-m", f"pipelines.ingest.{stage}"]
    return [str(ROOT / "benchmarks" / "peers.py"), engine, stage]


def workspace(place: Path, raw: Path, as_of: str, engine: str) -> Path:
    """A checkout with these raw files."""
    (place / "data").mkdir(parents=True)
    (place / "data" / "raw").symlink_to(raw)
    for name in ("expectations", "pipelines", "dvc.yaml"):
        (place / name).symlink_to(ROOT / name)
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values |= {"engine": ENGINES[engine] or "embedded", "as_of": as_of}
    (place / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return place


def measured(words: Sequence[str], place: Path) -> Cost:
    """What `python …` takes in a folder. A tree's memory is the sum of its processes', which counts
    what they share more than once.
    """
    begun = time.perf_counter()
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    log = place / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=place, env=env, stdout=out, stderr=subprocess.STDOUT
        )
        peak, cpu = 0, {}
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            taken = 0
            for one in family(tree):
                try:
                    taken += one.memory_info().rss
                    cpu[one.pid] = sum(one.cpu_times()[:2])
                except psutil.Error:
                    continue  # it has just ended
            peak = max(peak, taken)
            time.sleep(PAUSE)
    wall = time.perf_counter() - begun
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)}: status {process.returncode}\n{log.read_text()}")
    return Cost(wall, sum(cpu.values()), peak / 1e6)


def family(root: psutil.Process) -> Iterator[psutil.Process]:
    try:
        yield from (root, *root.children(recursive=True))
    except psutil.Error:
        return


def same(one: Path, other: Path) -> str:
    """Whether both have the same rows and values in the same files, in words."""
    rows = 0
    for table in TABLES:
        names = [sorted(file.name for file in (place / table).glob("*")) for place in (one, other)]
        if names[0] != names[1]:
            return f"NOT EQUAL: {table} has other months"
        for name in names[0]:
            left, right = (pq.read_table(place / table / name) for place in (one, other))
            rows += left.num_rows
            if left.num_rows != right.num_rows:
                return f"NOT EQUAL: {table / name} has {left.num_rows} and {right.num_rows} rows"
            for column in left.column_names:
                if column == validate.REASONS.name:
                    continue  # only GX's names say them
                values = left[column].combine_chunks()
                if not values.equals(right[column].cast(values.type).combine_chunks()):
                    return f"NOT EQUAL: {table / name}: {column}"
    return f"every value of {rows:,} rows of {len(TABLES)} tables is equal"


def a_month(folder: Path, size: int) -> Costs:
    """Years of features, from nothing; then their last month, on the others before it."""
    raw, costs, last = folder / "raw", {}, grown.years(size)[-1]
    grown.grow(parameters.load(ROOT / "params.yaml"), size, raw)
    before, after = f"{last}-12-01", f"{last + 1}-01-01"
    for name, clocks in (("rebuild", [after]), ("month", [before, after])):
        place = workspace(folder / name, raw, clocks[0], "embedded")
        for clock in clocks:
            path = place / "params.yaml"
            values = yaml.safe_load(path.read_text()) | {"as_of": clock}
            path.write_text(yaml.safe_dump(values, sort_keys=False))
            for stage in STAGES:
                cost = measured(command("embedded", stage), place)
                costs[size, name, stage] = cost
        for stage in STAGES:
            print(f"{size:>5}  {name:<10}{stage:<12}{costs[size, name, stage]}", flush=True)
    print(f"{'':>7}{same(folder / 'rebuild', folder / 'month')}", flush=True)
    for place in (raw, folder / "rebuild", folder / "month"):
        shutil.rmtree(place)
    return costs


def total(costs: Costs, size: int, engine: str) -> Cost:
    first, *rest = (costs[size, engine, stage] for stage in STAGES)
    for one in rest:
        first += one
    return first


def promises(costs: Costs, sizes: Sequence[int], imported: Cost) -> None:
    """A line for each promise that this run can tell of: what was asked, and what was measured."""
    small, large = min(sizes), max(sizes)
    growth = ((large, "embedded"), (small, "embedded"))
    asked = [
        *(("jvm / embedded (>= 5 at 1)", (size, "jvm"), (size, "embedded")) for size in sizes),
        *(
            ("embedded / duckdb (<= 2 at 10)", (size, "embedded"), (size, "duckdb"))
            for size in sizes
        ),
        *(("embedded / polars", (size, "embedded"), (size, "polars")) for size in sizes),
        (f"embedded, {large} years / {small} (<= {large // small})", *growth),
        *(
            ("a new month / a rebuild (<= 0.25)", (size, "month"), (size, "rebuild"))
            for size in sizes
        ),
    ]
    print()
    for what, one, other in asked:
        if (*one, "load") in costs and (*other, "load") in costs:
            left, right = total(costs, *one), total(costs, *other)
            print(
                f"  {one[0]:>4}  {what:<38}{left.wall / right.wall:>7.2f} of the wall"
                f"{left.cpu / right.cpu:>7.2f} of the processor"
            )
    for size in sizes:
        if (size, "embedded", "validate") in costs:
            cost, peak = costs[size, "embedded", "validate"], total(costs, size, "embedded").peak
            print(
                f"  {size:>4}  {'validate beyond the import (<= 5 at 50)':<38}"
                f"{cost.wall - imported.wall:>7.2f} of the wall"
                f"{cost.cpu - imported.cpu:>7.2f} of the processor"
            )
            print(f"  {size:>4}  {'peak of embedded (< 16,000 at 100)':<38}{peak:>7,.0f} MB")


if __name__ == "__main__":
    main()
