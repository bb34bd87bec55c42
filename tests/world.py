"""A checkout in a folder of its own: how a test changes params.yaml and runs a stage in it."""

import os
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
        content = file.read()
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
