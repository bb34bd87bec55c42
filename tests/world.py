"""A checkout in a folder of its own: how a test changes params.yaml and runs a stage in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pipelines import params as parameters
from pipelines.ingest import fetch
from pipelines.params import Params

KEPT = 12  # one flight number of so many
ROOT = Path(__file__).parent.parent
TRACKED = (
    "params.yaml", "dvc.yaml", "expectations", "infra/envoy", "pipelines", ".dvc/config",
    ".dvcignore",
)  # fmt: skip


class Checkout:
    """A folder with params.yaml, and how a test changes and runs it."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source = folder, source

    def set(self, **changes: Any) -> None:
        """Merge `changes` into params.yaml."""
        path = self.folder / "params.yaml"
        values = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(merged(values, changes), sort_keys=False))

    def params(self) -> Params:
        return parameters.load(self.folder / "params.yaml")

    def start(self, module: str, **popen: Any) -> subprocess.Popen[str]:
        """`python -m module` in this folder."""
        env = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        }
        return subprocess.Popen(
            [sys.executable, "-m", *module.split()],
            cwd=self.folder,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **popen,
        )

    def run(self, module: str) -> "Ended":
        process = self.start(module)
        out, err = process.communicate(timeout=600)
        return Ended(process.returncode, out, err)


def checked_out(folder: Path, source: Path) -> Checkout:
    """A copy of what the pipeline reads, on a copy of the small source."""
    made = Checkout(folder / "checkout", folder / "source")
    shutil.copytree(source, made.source)
    for name in TRACKED:
        target = made.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, target)
    # MLflow remembers a store by its URI: each checkout needs one of its own.
    tracking = {"uri": f"sqlite:///{made.folder}/.state/mlflow/mlflow.db"}
    made.set(
        tracking=tracking,
        as_of="2013-06-01",
        fetch={"source": str(made.source)},
        fit={"max_epochs": 2, "hidden": [32], "boosting": {"rounds": 20}},
    )
    return made


def lenient(checkout: Checkout) -> Checkout:
    """Training is short and the verdict lenient; under git, as DVC wants it."""
    checkout.set(
        fit={"max_epochs": 1, "batch_size": 512},
        evaluate={"resamples": 10, "baseline_iterations": 5, "min_auc": 0.3},
        drift={"max_auc_fall": 1.0, "max_loss_rise": 9.0},
    )
    path = checkout.folder / "params.yaml"
    path.write_text(yaml.safe_dump(narrowed(yaml.safe_load(path.read_text())), sort_keys=False))
    shutil.copy(ROOT / ".gitignore", checkout.folder)
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "t"],
    ):
        subprocess.run(["git", *command], cwd=checkout.folder, check=True)
    return checkout


class Ended:
    """How a process ended."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    def __repr__(self) -> str:
        return f"status {self.status}\n{self.out}\n{self.err}"


def thin(folder: Path, params: Params, until: str) -> Path:
    """The sample's months up to `until` as a folder source, one flight number of so many."""
    for file in fetch.listing(params):
        table, _, month = file.name.removesuffix(".csv").partition("/")
        if month > until:
            continue
        target = folder / file.name
        target.parent.mkdir(exist_ok=True)
        content = file.content
        target.write_bytes(_thinned(content) if table == "flights" else content)
    return folder


def _thinned(content: bytes) -> bytes:
    header, *lines = content.splitlines(keepends=True)
    flight = header.decode().split(",").index("flight")
    return header + b"".join(line for line in lines if int(line.split(b",")[flight]) % KEPT == 0)


def merged(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: merged(old.get(key), value) for key, value in new.items()}
    return new


def narrowed(values: dict[str, Any]) -> dict[str, Any]:
    """params.yaml with the features of two groups: for tests of the way there, not of the model.
    The time of training, of the picture of drift and of the export grows with the columns.
    """
    dataset = values["dataset"]
    groups = {name: dataset["features"][name] for name in ("schedule", "aircraft")}
    checks = {"raises": {}, "missing": {}}
    few = {"features": groups, "canary": ["schedule"], "behaviour": checks}
    return values | {"dataset": dataset | few}
