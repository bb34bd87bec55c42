"""graph: dvc.yaml as a small manifest that Airflow reads without DVC.

in:   dvc.yaml, params.yaml
out:  dags/manifest.json: each stage with its parents, inputs and outs; the tasks' settings
run:  make manifest

DVC itself resolves the file: `foreach`, `matrix` and `${...}` mean what they mean to `dvc repro`.
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import params as parameters
from pipelines import stage
from pipelines.errors import UserError

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

MANIFEST = Path("dags/manifest.json")
# Records of a run beside those of its stages.
RESERVED = {
    "begin", "run", "unite", "lock", "register", "gate", "ask", "approval", "release", "champion",
    "decide", "retrain",
}  # fmt: skip


def read(repo: "Repo") -> dict[str, dict[str, list[str]]]:
    """Every stage of the graph, in an order in which it can run.

    parents: the stages whose outs it reads; inputs: those of their outs; outs: what it writes;
    metrics: which of the outs are small JSON files.
    """
    import networkx as nx

    stages = pipeline(repo)
    # Edges lead from a stage to those it depends on.
    edges = repo.index.graph.subgraph(stages)
    order = nx.lexicographical_topological_sort(edges.reverse(), key=_name)
    tracked = [out for one in repo.index.stages if one not in stages for out in one.outs]
    for one in stages:
        _refuse(one, tracked)
    return {one.name: _node(one, sorted(edges.successors(one), key=_name)) for one in order}


def pipeline(repo: "Repo") -> list["PipelineStage"]:
    """The stages of dvc.yaml; what `dvc add` tracks beside it is no stage.

    Raises UserError for a name that no task or record of a run can have.
    """
    from dvc.stage import PipelineStage

    stages = [one for one in repo.index.stages if isinstance(one, PipelineStage)]
    for name in map(_name, stages):
        if not re.fullmatch(r"[A-Za-z0-9_@.-]+", name) or name in RESERVED:
            raise UserError(f"dvc.yaml: {name} cannot name a stage that Airflow runs")
    for name, times in Counter(task_id(_name(one)) for one in stages).items():
        if times > 1:
            raise UserError(f"dvc.yaml: {times} stages would be the task {name}")
    return stages


def task_id(stage: str) -> str:
    """A stage's name as Airflow takes it: a member of a foreach has no @."""
    return stage.replace("@", ".")


def _refuse(stage: "PipelineStage", tracked: list["Output"]) -> None:
    """Raise UserError where another worker could not have what the stage reads or gives."""
    if Path(stage.wdir) != Path(stage.repo.root_dir):
        raise UserError(f"dvc.yaml: {stage.name} sets wdir; expected paths from the top")
    for out in stage.outs:
        if not out.use_cache:
            raise UserError(
                f"dvc.yaml: {stage.name} gives {out.def_path} with cache: false, which lets no "
                "other worker have it"
            )
    for out in tracked:
        if any(_overlap(out.fs_path, dep.fs_path) for dep in stage.deps):
            raise UserError(
                f"dvc.yaml: {stage.name} reads {out.def_path}, which dvc add tracks; expected an "
                "output of a stage"
            )


def _name(stage: "PipelineStage") -> str:
    return str(stage.name)


def _node(stage: "PipelineStage", parents: list["PipelineStage"]) -> dict[str, list[str]]:
    read = [
        out
        for parent in parents
        for out in parent.outs
        if any(_overlap(out.fs_path, dep.fs_path) for dep in stage.deps)
    ]
    return {
        "parents": list(map(_name, parents)),
        "inputs": sorted(out.def_path for out in read),
        "outs": sorted(out.def_path for out in stage.outs),
        "metrics": sorted(out.def_path for out in stage.outs if out.is_metric),
    }


def _overlap(one: str, other: str) -> bool:
    """Whether two paths are the same, or one lies in the other."""
    parts = Path(one).parts, Path(other).parts
    shared = min(map(len, parts))
    return parts[0][:shared] == parts[1][:shared]


def manifest() -> dict[str, Any]:
    """The graph of the current folder, and what its params say of the tasks."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    params = parameters.load()
    try:
        with Repo() as repo:
            stages = read(repo)
    except DvcException as error:
        raise UserError(f"dvc.yaml: {' '.join(str(error).split())}") from None
    settings = params.orchestrate.model_dump()
    return {"stages": stages, "orchestrate": settings, "approval": params.release.approval}


def main() -> int:
    """Write the manifest, or with --check say whether it is current. Exit 2 where it is not."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.orchestrate.graph",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 2 if it differs")
    check = parser.parse_args().check
    try:
        made = manifest()
    except UserError as error:
        print(f"graph: error: {error}", file=sys.stderr)
        return 2
    current = json.dumps(made, indent=2) + "\n"
    if check and (not MANIFEST.is_file() or MANIFEST.read_text() != current):
        print(
            f"graph: error: {MANIFEST} is not that of dvc.yaml and params.yaml: make manifest",
            file=sys.stderr,
        )
        return 2
    if not check:
        MANIFEST.parent.mkdir(exist_ok=True)
        MANIFEST.write_text(current)
        stage.say("graph", f"{MANIFEST}: {len(made['stages'])} stages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
