"""A recorder that cannot start, ends or hangs is said in one line, and raises nothing."""

import sys
from pathlib import Path

import pytest

from pipelines import recorder


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (None, "its recorder could not be started"),
        ("exit 1", "its recorder has ended"),
        ("exec sleep 5", "not told within 0.5 s"),
    ],
)
def test_a_recorder_that_fails_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: str | None,
    said: str,
) -> None:
    python = tmp_path / "python"
    if program:
        python.write_text(f"#!/bin/sh\n{program}\n")
        python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(recorder, "PATIENCE", 0.5)
    one = recorder.Recorder("demo", None)
    one.end("COMPLETE")
    assert capsys.readouterr().err == f"demo: lineage: {said}\n"
