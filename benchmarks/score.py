"""score: rows a second of the stage, beside what ONNX Runtime can do at all on this machine.

Needs data/features and models/bundle (make run). In one run: the stage as a process over every
row, the same once more over the newest month alone, and the bare ceiling: prepared tensors, one
session of one thread for each core, no engine, no files. Run: python benchmarks/score.py
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from pipelines import bundle, tables
from pipelines.deploy import score

ROOT = Path(__file__).parent.parent
ROWS = 80_000  # of the ceiling
ROUNDS = 3


def main() -> None:
    os.chdir(ROOT)
    contract = bundle.load(bundle.FOLDER).contract
    names = [column["name"] for column in contract["columns"]]
    rows = tables.read(score.FEATURES, names).slice(0, ROWS).combine_chunks()
    feed = {c["name"]: bundle._tensor(rows[c["name"]], c["type"]) for c in contract["columns"]}
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        few, little = best(lambda: stage(Path(folder), days=30))
        many, much = best(lambda: stage(Path(folder), days=3650))
    per_second = (many - few) / (much - little)
    scorer = bundle.Scorer(contract, session(1))
    alone = best(lambda: timed(lambda: scorer.predict(rows)))
    ceiling = best(lambda: timed(lambda: bare(feed, cores)))
    print(f"{few:,} rows: {little:.1f} s; {many:,} rows: {much:.1f} s, on {cores} cores")
    print(f"the stage, without its start:    {per_second:>9,.0f} rows/s")
    print(f"Scorer.predict, one thread:      {alone[0] / alone[1]:>9,.0f} rows/s")
    top = ceiling[0] / ceiling[1]
    print(
        f"bare ONNX Runtime, {cores} threads:    {top:>9,.0f} rows/s; ratio {per_second / top:.2f}"
    )
    print("where a row's time goes: " + ", ".join(f"{n} {s:.0%}" for n, s in profile(feed)))


def best(measure: Callable[[], tuple[int, float]]) -> tuple[int, float]:
    """The fastest of some rounds: others use this machine too."""
    return min((measure() for _ in range(ROUNDS)), key=lambda found: found[1])


def timed(work: Callable[[], Any]) -> tuple[int, float]:
    begun = time.perf_counter()
    work()
    return ROWS, time.perf_counter() - begun


def stage(folder: Path, days: int) -> tuple[int, float]:
    """Rows and seconds of the stage as a process, over the newest days."""
    for name in ("data/features", "models/bundle"):
        (folder / name).parent.mkdir(exist_ok=True)
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    shutil.copytree("expectations", folder / "expectations", dirs_exist_ok=True)
    values = yaml.safe_load(Path("params.yaml").read_text())
    values["score"]["window_days"] = days
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pipelines.deploy.score"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return tables.count(folder / score.PREDICTIONS), time.perf_counter() - begun


def session(threads: int) -> Any:
    return bundle.open_session(bundle.FOLDER / bundle.MODEL, threads)


def bare(feed: dict[str, Any], threads: int) -> None:
    """Every row once, in batches that each thread takes in turn from its share."""

    def ask(number: int) -> None:
        own = session(1)
        for at in range(number * bundle.BATCH, ROWS, threads * bundle.BATCH):
            own.run(None, {name: rows[at : at + bundle.BATCH] for name, rows in feed.items()})

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(ask, range(threads)))


def profile(feed: dict[str, Any]) -> list[tuple[str, float]]:
    """The operators that take longest, with their share."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        profiled = onnxruntime.InferenceSession(bundle.FOLDER / bundle.MODEL, options)
        for at in range(0, 8192, bundle.BATCH):
            profiled.run(None, {name: rows[at : at + bundle.BATCH] for name, rows in feed.items()})
        events = json.loads(Path(profiled.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return [(name, time / spent.total()) for name, time in spent.most_common(5)]


if __name__ == "__main__":
    main()
