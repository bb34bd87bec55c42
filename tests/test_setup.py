"""make setup says which Pythons it takes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from world import ROOT


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_a_python_that_cannot_install_is_one_line(tmp_path: Path, version: tuple[int, int]) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "python"
    fake.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c "
        f"'import sys; sys.version_info = {(*version, 0)}; exec(sys.argv[1])' \"$2\"\n"
    )
    fake.chmod(0o755)
    done = subprocess.run(
        # Told by a make itself, it would say which folder it enters.
        ["make", "--no-print-directory", "setup", f"PYTHON={fake}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    said = done.stderr.splitlines()[0]
    assert said.startswith(
        f"setup: error: {fake} is Python {version[0]}.{version[1]}; expected 3.11"
    )
    assert not (tmp_path / ".venv").exists()
