"""bench: speed, repeatability and quality, measured again.

Clones HEAD twice, runs everything stale in both, compares their locks, runs once more with
nothing changed, then fits and evaluates the public split (train before October 2013, test
October to December) on several seeds. Run: make bench
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
SEEDS = (7, 8, 9)
PUBLIC = {"as_of": "2014-01-01T05:00:00Z", "featurize": {"test_days": 92, "val_days": 31}}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = (clone(Path(folder) / name) for name in ("first", "second"))
        for place in (first, second):
            print(f"\nmake run, everything stale: {run(place, '-m', 'pipelines.run'):.1f} s")
            for usage in sorted((place / ".state" / "usage").glob("*.json")):
                use = json.loads(usage.read_text())
                print(f"  {usage.stem:<10}{use['seconds']:>7.1f} s{use['peak_mb']:>7,} MB")
        same = (first / "dvc.lock").read_bytes() == (second / "dvc.lock").read_bytes()
        print(f"\nsame dvc.lock in two clones: {same}")
        print(f"make run, nothing changed: {run(first, '-m', 'pipelines.run'):.1f} s")
        quality(second)


def clone(place: Path) -> Path:
    """HEAD in a folder of its own, without its lock: every stage is stale."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(place)], check=True)
    (place / "dvc.lock").unlink(missing_ok=True)
    return place


def run(place: Path, *command: str) -> float:
    """Seconds of one quiet `python command` in `place`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(place)}
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *command], cwd=place, env=env, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - started


def quality(place: Path) -> None:
    """The public split on every seed, beside the baseline on the same rows."""
    print("\npublic split: train before 2013-10-01, test October to December")
    for seed in SEEDS:
        path = place / "params.yaml"
        values = yaml.safe_load(path.read_text()) | PUBLIC
        values["fit"]["seed"] = seed
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        run(place, "-m", "dvc", "repro", "--quiet", "evaluate")
        outcome = json.loads((place / "reports" / "evaluate" / "verdict.json").read_text())
        for who in ("metrics", "baseline"):
            figures = ", ".join(
                f"{name} {outcome[who][name]['value']:.4f} "
                f"({outcome[who][name]['low']:.4f} to {outcome[who][name]['high']:.4f})"
                for name in ("auc", "ap", "log_loss")
            )
            print(f"  seed {seed} {who:<9} {figures}", flush=True)


if __name__ == "__main__":
    main()
