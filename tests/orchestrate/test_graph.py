"""The manifest is dvc.yaml, and the rendered DAG is the manifest: nobody writes an edge twice."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from orchestrate.place import commit, environment, git, python, task
from world import ROOT

from pipelines.errors import UserError
from pipelines.orchestrate import graph

# Prints each task of a DAG file with its parents, and what was imported to parse it.
RENDER = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(dag_folder=sys.argv[1])
assert not bag.import_errors, bag.import_errors
print("RESULT" + json.dumps({
    dag.dag_id: {task.task_id: sorted(task.upstream_task_ids) for task in dag.tasks}
    for dag in bag.dags.values()
}))
"""


def _result(folder: Path, code: str, *arguments: str) -> Any:
    done = python(folder, "-c", code, *arguments)
    return json.loads(done.stdout.rpartition("RESULT")[2])


def _dvc_edges(folder: Path) -> set[tuple[str, str]]:
    """(parent, child) as `dvc dag` draws them."""
    done = subprocess.run(
        ["dvc", "dag", "--dot"], cwd=folder, env=environment(folder),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(re.findall(r'"(.+?)" -> "(.+?)"', done.stdout))


def _edges(stages: dict[str, Any]) -> set[tuple[str, str]]:
    return {(parent, name) for name, node in stages.items() for parent in node["parents"]}


def test_the_manifest_in_git_is_current() -> None:
    done = python(ROOT, "-m", "pipelines.orchestrate.graph", "--check", check=False)
    assert done.returncode == 0, done.stderr


def test_the_rendered_edges_are_those_of_dvc_dag() -> None:
    dags = _result(ROOT, RENDER, str(ROOT / "dags"))
    drawn = _dvc_edges(ROOT)
    assert len(drawn) > 8
    stages = {name for edge in drawn for name in edge}
    rendered = {
        (parent, name)
        for name, parents in dags["retrain"].items()
        for parent in parents
        if {name, parent} <= stages
    }
    assert rendered == drawn
    assert dags["retrain"]["fetch"] == ["begin"]
    assert dags["retrain"]["register"] == ["unite"]
    assert dags["retrain"]["gate"] == ["register"]
    assert dags["watch"]["score"] == ["champion", "featurize"]
    assert not {"fit", "evaluate", "package"} & set(dags["watch"])


def test_parsing_imports_airflow_and_the_standard_library_alone() -> None:
    allowed = {"airflow", "pipelines"} | set(sys.stdlib_module_names)
    parts = ("orchestrate.render", "orchestrate.execute", "exchange", "errors", "s3")
    files = [*(ROOT / "dags").glob("*.py")]
    files += [ROOT / "pipelines" / f"{part.replace('.', '/')}.py" for part in parts]
    parsed = {"pipelines.orchestrate", *(f"pipelines.{part}" for part in parts)}
    for file in files:
        for node in ast.parse(file.read_text()).body:  # what stands in a function is not run
            names = [alias.name for alias in getattr(node, "names", [])]
            module = getattr(node, "module", None)
            if module == "pipelines":
                module, names = None, [f"pipelines.{name}" for name in names]
            imports = isinstance(node, ast.Import | ast.ImportFrom)
            for name in [module] if module else names if imports else []:
                assert name.partition(".")[0] in allowed, f"{file.name} imports {name}"
                assert not name.startswith("pipelines") or name in parsed, f"{file.name}: {name}"


def _repository(folder: Path, text: str) -> Path:
    """A repository with this dvc.yaml beside the params of this one."""
    folder.mkdir(parents=True)
    for name in ("params.yaml", ".dvc"):
        target = folder / name
        if (ROOT / name).is_dir():
            target.mkdir()
            (target / "config").write_text((ROOT / name / "config").read_text())
        else:
            target.write_text((ROOT / name).read_text())
    (folder / "dvc.yaml").write_text(text)
    git(folder, "init", "-q")
    return folder


def _read(folder: Path) -> dict[str, Any]:
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        return dict(graph.read(repo))


def test_foreach_and_matrix_are_expanded(tmp_path: Path) -> None:
    text = """\
stages:
  raw: {cmd: "true", outs: [raw]}
  part:
    foreach: [a, b]
    do: {cmd: "true", deps: [raw], outs: ["part/${item}"]}
  cell:
    matrix: {x: [1, 2], y: [u]}
    cmd: "true"
    deps: [raw]
    outs: ["cell/${item.x}-${item.y}"]
  all: {cmd: "true", deps: [part, cell], outs: [all], metrics: [all.json]}
"""
    stages = _read(_repository(tmp_path / "r", text))
    assert next(iter(stages)) == "raw"
    assert list(stages)[-1] == "all"
    members = {"part@a", "part@b", "cell@1-u", "cell@2-u"}
    assert set(stages) == {"raw", "all"} | members
    assert stages["all"] == {
        "parents": sorted(members),
        "inputs": ["cell/1-u", "cell/2-u", "part/a", "part/b"],
        "outs": ["all", "all.json"],
        "metrics": ["all.json"],
    }
    assert _edges(stages) == _dvc_edges(tmp_path / "r")


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    parents=st.lists(st.lists(st.integers(0, 20), max_size=3, unique=True), min_size=2, max_size=7)
)
def test_any_graph_has_the_edges_of_dvc_dag(
    tmp_path_factory: pytest.TempPathFactory, parents: list[list[int]]
) -> None:
    lines = ["stages:"]
    for number, wanted in enumerate(parents):
        deps = [f"out/{parent}" for parent in wanted if parent < number]
        lines.append(f'  s{number}: {{cmd: "true", deps: {deps}, outs: [out/{number}]}}')
    folder = _repository(tmp_path_factory.mktemp("graph") / "r", "\n".join(lines) + "\n")
    stages = _read(folder)
    assert _edges(stages) == _dvc_edges(folder)
    seen: set[str] = set()
    for name, node in stages.items():
        assert set(node["parents"]) <= seen, "an order in which it can run"
        seen.add(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('a: {cmd: "true", outs: [{a: {cache: false}}]}', "a gives a with cache: false"),
        ('a: {cmd: "true", metrics: [{m.json: {cache: false}}]}', "a gives m.json with cache: fal"),
        ('a: {cmd: "true", wdir: pipelines, outs: [a]}', "a sets wdir; expected paths from the"),
        ('a: {cmd: "true", deps: [raw.csv], outs: [a]}', "a reads raw.csv, which dvc add tracks"),
        ('gate: {cmd: "true", outs: [a]}', "gate cannot name a stage that Airflow runs"),
        (
            'p.1: {cmd: "true", outs: [a]}\n  p: {foreach: [1], do: {cmd: "true", outs: [b]}}',
            "2 stages would be the task p.1",
        ),
    ],
)
def test_what_another_worker_could_not_have_is_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    folder = _repository(tmp_path / "r", f"stages:\n  {text}\n")
    (folder / "raw.csv").write_text("x")
    if "raw.csv" in text:
        python(folder, "-m", "dvc", "add", "-q", "raw.csv")
    with pytest.raises(UserError, match=said):
        _read(folder)


def test_a_run_whose_lock_is_committed_already_unites(tmp_path: Path) -> None:
    """As after `make run` and a commit of dvc.lock. A stage may give nothing."""
    text = 'stages:\n  a: {cmd: echo 1 > a, outs: [a]}\n  b: {cmd: "true", deps: [a]}\n'
    folder = _repository(tmp_path / "r", text)
    python(folder, "-m", "dvc", "repro", "-q")
    head = commit(folder, "with its lock")
    task(folder, "begin", "--run", "n1")
    for name in ("a", "b"):
        task(folder, "stage", name, "--run", "n1")
    task(folder, "unite", "--run", "n1", "a", "b")
    assert git(folder, "rev-parse", "runs/n1") == head


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["begin", "--run", "../evil"], "'../evil' cannot name a run"),
        (["begin", "--run", "n", "--spec", '{"x": 1}'], "expected a mapping of attempt, force"),
        (["begin", "--run", "n", "--spec", "[]"], "--spec is []; expected a mapping"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    folder = _repository(tmp_path / "r", 'stages:\n  a: {cmd: "true", outs: [a]}\n')
    commit(folder, "first")
    done = task(folder, *arguments, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
