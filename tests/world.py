"""A checkout in a folder of its own: how a test changes params.yaml and runs a stage in it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pipelines import params as parameters
from pipelines.params import Params

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


def merged(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: merged(old.get(key), value) for key, value in new.items()}
    return new
