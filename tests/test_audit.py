"""An audit finds what differs between two clean clones, and names file, field and stage."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from pipelines import audit, stage, tables
from pipelines.errors import UserError
from pipelines.params import Params

# Each writes one file, by what Python says.
STAGES = {
    "constant": "print('the same')",
    "clock": "import time; print(time.tzname[0])",
    "after": "print(open('clock.txt').read())",
    "order": "print(list({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}))",
}


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A repository whose graph has the stages of these names, committed."""

    def make(*names: str, **more: str) -> Path:
        stages = {}
        for name in names:
            (tmp_path / f"{name}.py").write_text((STAGES | more)[name])
            deps = [f"{name}.py", *(["clock.txt"] if name == "after" else [])]
            out = f"{name}.txt"
            stages[name] = {"cmd": f"python {name}.py > {out}", "deps": deps, "outs": [out]}
        (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
        for command in (
            "git init --quiet", "dvc init --quiet", "git add --all",
            "git -c user.name=a -c user.email=a@b commit --quiet --message=one",
        ):  # fmt: skip
            env = {"PATH": stage.search_path(), "HOME": str(tmp_path)}
            subprocess.run(command.split(), cwd=tmp_path, check=True, env=env)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make


def test_what_depends_on_more_than_its_inputs_is_found_and_blamed(
    graph: Callable[..., Path], params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    graph(*STAGES)
    with pytest.raises(
        RuntimeError, match=r"^not the same bytes again: (clock, order|order, clock)$"
    ):
        audit.run(params)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    verdicts = {line[0]: " ".join(line[3:]) for line in lines if line[2:3] == ["files"]}
    assert verdicts == {
        "constant": "same",
        "clock": "DIFFERS",
        "after": "differs, as its inputs do",
        "order": "DIFFERS",
    }
    assert ["clock.txt:", "from", "byte", "0", "on"] in lines


def test_what_repeats_is_said_so(
    graph: Callable[..., Path], params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    place = graph("constant")
    (place / "constant.py").write_text("print('not committed')")
    audit.run(params)
    said = capsys.readouterr().out
    assert "1 stages gave the same bytes twice" in said
    assert "constant.py and what else is not committed is left out" in said
    assert [file.name for file in place.iterdir() if file.suffix == ".txt"] == []


def test_a_stage_that_fails_in_a_clean_clone_is_one_line(
    graph: Callable[..., Path], params: Params
) -> None:
    failing = "import sys; sys.exit('fetch: error: no such bucket')"
    graph("failing", failing=failing)
    with pytest.raises(UserError, match=r"in a clean clone: fetch: error: no such bucket"):
        audit.run(params)


def test_where_there_is_no_repository_one_line_says_it(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is no git repository"):
        audit.run(params)


ROWS: dict[str, Any] = {"key": [1, 2, 3], "value": [0.5, None, 0.25]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"value": [0.5, 1.0, 0.25]}, ["column value, in 1 of 3 rows"]),
        ({"key": [3, 2, 1]}, ["column key, in 2 of 3 rows"]),
        ({"more": [1, 1, 1]}, ["columns ['key', 'value'] against"]),
    ],
)
def test_tables_differ_by_columns_and_rows(
    tmp_path: Path, change: dict[str, Any], said: list[str]
) -> None:
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    tables.write(pa.table(ROWS), one)
    tables.write(pa.table(ROWS | change), two)
    found = list(audit.differences(one, two))
    assert [line[: len(start)] for line, start in zip(found, said, strict=True)] == said
    assert list(audit.differences(one, one)) == []


def test_records_differ_by_fields(tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    stage.write_json(one, {"a": {"b": [1, {"c": 2}]}, "same": 1})
    stage.write_json(two, {"a": {"b": [1, {"c": 3}]}, "same": 1, "new": None, "more": 1})
    assert list(audit.differences(one, two)) == ["a.b[1].c is 2 and 3", "more is None and 1"]
    assert list(audit.differences(one, tmp_path / "none.json")) == ["only in the first clone"]
    two.write_text(one.read_text() + " ")
    size = one.stat().st_size
    assert list(audit.differences(one, two)) == [f"from byte {size} on"]
