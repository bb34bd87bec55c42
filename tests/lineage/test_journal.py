"""The journal holds whole lines, whoever writes and however full the disk is."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from world import ROOT

from pipelines.errors import UserError
from pipelines.lineage import journal

WRITERS, LINES, LENGTH = 3, 200, 100_000


def test_processes_that_write_at_once_leave_whole_lines(tmp_path: Path) -> None:
    code = f"""
        import json, sys
        from pipelines.lineage import journal
        for number in range({LINES}):
            journal.append(json.dumps([sys.argv[1], number, sys.argv[1] * {LENGTH}]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = {"PYTHONPATH": str(ROOT)}
    writers = [subprocess.Popen([*command, str(n)], cwd=tmp_path, env=env) for n in range(WRITERS)]
    assert [one.wait() for one in writers] == [0] * WRITERS
    lines = [json.loads(line) for line in (tmp_path / journal.JOURNAL).open()]
    for writer in map(str, range(WRITERS)):
        mine = [line for line in lines if line[0] == writer]
        assert [number for _, number, _ in mine] == list(range(LINES))
        assert all(text == writer * LENGTH for _, _, text in mine)


def test_what_does_not_fit_leaves_no_half_line(tmp_path: Path) -> None:
    code = """
        import resource
        from pipelines.lineage import journal
        journal.append('"' + "a" * 5000 + '"')
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        try:
            journal.append('"' + "b" * 5000 + '"')
        except OSError as error:
            print(error.strerror)
        journal.append('"c"')
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "No space left on device"
    lines = (tmp_path / journal.JOURNAL).read_text().splitlines()
    assert [json.loads(line) for line in lines] == ["a" * 5000, "c"]


def test_a_line_of_somebody_else_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(journal.read()) == []
    journal.append('{"eventType": "START"}')
    journal.append("{half")
    with pytest.raises(UserError, match=r"events\.jsonl: line 2 is no event"):
        list(journal.read())
    for line in (b"[]", b"\xff", b"7"):
        journal.JOURNAL.write_bytes(line + b"\n")
        with pytest.raises(UserError, match=r"events\.jsonl: line 1 is no event"):
            list(journal.read())
