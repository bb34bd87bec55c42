"""dvc.yaml names everything a stage's bytes depend on."""

import ast
from pathlib import Path

import pytest
import yaml
from world import ROOT

from pipelines.run import STAGES

GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# They carry no bytes into an output: configuration is named by `params`, the rest is plumbing.
PLUMBING = {
    "pipelines",
    "pipelines.errors",
    "pipelines.params",
    "pipelines.stage",
    "pipelines.tracking",
}


def test_the_closing_screen_knows_every_stage() -> None:
    assert (*GRAPH, "register") == STAGES


@pytest.mark.parametrize("name", GRAPH)
def test_a_stage_depends_on_the_code_it_imports(name: str) -> None:
    stage = GRAPH[name]
    module = stage["cmd"].removeprefix("python -m ")
    listed = [
        ROOT / dep for dep in stage["deps"] if dep.startswith("pipelines/") and "$" not in dep
    ]
    # Imported for the name of their output folder.
    others = {f"pipelines.ingest.{one}" for one in ("fetch", "load", "validate") if one != name}
    for path in _imported(module, others):
        if path.name == "__init__.py" and path.parent.name in (
            "ingest",
            "train",
            "deploy",
            "datasets",
        ):
            continue  # a docstring, or the reader of the SQL that is listed itself
        assert any(path == item or item in path.parents for item in listed), f"{name} misses {path}"


def _imported(module: str, seen: set[str]) -> set[Path]:
    """The source files of `module` and of all it imports below `pipelines`, plumbing left out."""
    if module in seen or module in PLUMBING or not module.startswith("pipelines"):
        return set()
    seen.add(module)
    path = ROOT / (module.replace(".", "/") + ".py")
    if not path.is_file():
        path = ROOT / module.replace(".", "/") / "__init__.py"
    if not path.is_file():
        return set()
    files = {path}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]:
                files |= _imported(name, seen)
    return files


def test_every_param_named_exists() -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage in GRAPH.values():
        for key in stage["params"]:
            node = values
            for part in key.split("."):
                node = node[part]
