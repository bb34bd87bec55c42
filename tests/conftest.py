"""A small world: a folder of real flights, thinned, and a checkout that points at it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import params as parameters
from pipelines.ingest import fetch
from pipelines.params import Params

ROOT = Path(__file__).parent.parent
KEPT = 12  # one flight number of so many
TRACKED = ("params.yaml", "dvc.yaml", "expectations", "pipelines", ".dvc/config", ".dvcignore")


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_offline() -> None:
    """No test may depend on the network or on an account."""
    os.environ |= {"GX_ANALYTICS_ENABLED": "false", "DVC_NO_ANALYTICS": "1", "RUST_LOG": "error"}


@pytest.fixture(scope="session")
def params() -> Params:
    """The repository's own params."""
    return parameters.load(ROOT / "params.yaml")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Path:
    """January to May 2013 of the sample as a folder source, a twelfth of the flights."""
    folder = tmp_path_factory.mktemp("source")
    for file in fetch.listing(params):
        table, _, month = file.name.removesuffix(".csv").partition("/")
        if month > "2013-05":
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


@pytest.fixture
def checkout(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> "Checkout":
    """The current folder is a copy of what the pipeline reads, on a copy of the small source."""
    made = Checkout(tmp_path / "checkout", tmp_path / "source")
    shutil.copytree(source, made.source)
    for name in TRACKED:
        target = made.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, target)
    made.set(
        as_of="2013-06-01",
        fetch={"source": str(made.source)},
        fit={"max_epochs": 2, "hidden": [32]},
    )
    monkeypatch.chdir(made.folder)
    return made


class Checkout:
    """A folder with params.yaml, and how a test changes and runs it."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source = folder, source

    def set(self, **changes: Any) -> None:
        """Merge `changes` into params.yaml."""
        path = self.folder / "params.yaml"
        values = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(_merged(values, changes), sort_keys=False))

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


def _merged(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: _merged(old.get(key), value) for key, value in new.items()}
    return new


Edit = Callable[[str], str]
