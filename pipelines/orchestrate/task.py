"""task: what an Airflow task does, as a process beside its worker or in a pod.

run:  python -m pipelines.orchestrate.task begin --run ID [--spec JSON]
      python -m pipelines.orchestrate.task stage  NAME --run ID
      python -m pipelines.orchestrate.task effect NAME --run ID
      python -m pipelines.orchestrate.task unite  --run ID STAGE...

begin   writes down what the run is: the commit, the params it overrides, the reason
stage   makes one stage of dvc.yaml, or finds that it was made before, and publishes its lock entry
effect  acts on the world once, with what stages made
unite   joins the entries of all stages into one dvc.lock, checks it and records it

Runs in the repository, on any machine that reaches the DVC remote. With --result FILE it leaves
there what Airflow shows. Exit status: 0 done, 1 a fault (retry), 2 a mistake of the user.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import lease, lineage
from pipelines import params as parameters
from pipelines import stage as stages
from pipelines.errors import UserError
from pipelines.exchange import Exchange, Record
from pipelines.orchestrate import graph, store, workspace
from pipelines.orchestrate.workspace import Run

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.repo import Repo
    from dvc.stage import PipelineStage


@dataclass(frozen=True)
class Effect:
    """An effect's module, the stages whose outs it reads, and the stage whose outs it gives."""

    module: str
    reads: tuple[str, ...] = ()
    gives: str | None = None


EFFECTS = {
    "register": Effect("pipelines.deploy.register", reads=("fit", "package")),
    "gate": Effect("pipelines.deploy.gate", reads=("validate", "featurize", "evaluate", "package")),
    "approval": Effect("pipelines.deploy.approval"),
    "release": Effect("pipelines.deploy.release", reads=("package",)),
    "champion": Effect("pipelines.deploy.champion", gives="package"),
}


# What `begin` may be told of a run.
SPEC = {"overrides", "force", "reason", "attempt"}


class FailedError(Exception):
    """A process of the run ended with this status and has said why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the process ended with status {status}; its log says why")
        self.status = status


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the task."""
    given = _parser().parse_args(arguments)
    # The first process of a pod ignores SIGTERM unless told; this way its lease is released.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    home = Path.cwd()
    _prepare()
    status, said = 0, ""
    try:
        result = _do(home, given)
    except FailedError as failed:  # it has said why
        result = {"status": failed.status, "error": str(failed)}
        status = failed.status
    except UserError as error:
        status, said = 2, f"{_task(given)}: error: {error}"
    except Exception as error:
        status, said = 1, f"{_task(given)}: fault: {stages.one_line(error)}"
    if said:
        result = {"status": status, "error": said}
        print(said, file=sys.stderr)
    if given.result:
        given.result.write_text(json.dumps(result))
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.orchestrate.task",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("begin", "stage", "effect", "unite"):
        one = verbs.add_parser(verb)
        one.add_argument("--run", required=True, metavar="ID", help="the id of the run")
        one.add_argument("--result", type=Path, metavar="FILE", help="leave the result here")
        if verb == "begin":
            one.add_argument(
                "--spec",
                type=json.loads,
                default={},
                metavar="JSON",
                help="overrides (dotted keys of params.yaml), force, reason, attempt",
            )
        elif verb == "unite":
            one.add_argument("stages", nargs="+", metavar="STAGE")
        else:
            one.add_argument("name", metavar="NAME", choices=EFFECTS if verb == "effect" else None)
        if verb == "effect":
            one.add_argument(
                "--with",
                dest="arguments",
                type=json.loads,
                default=[],
                metavar="JSON",
                help="a list of arguments for the effect",
            )
    return parser


def _task(given: argparse.Namespace) -> str:
    return str(getattr(given, "name", given.verb))


def _prepare() -> None:
    """This environment's python first on the path, which the commands of dvc.yaml name."""
    os.environ |= {
        "PATH": stages.search_path(),
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
        "PYTHONPATH": "",
    }
    import dvc.logger  # sets its own level when it is first imported

    logging.getLogger(dvc.__name__).setLevel(logging.ERROR)


def _do(home: Path, given: argparse.Namespace) -> Record:
    if given.verb == "begin":
        return begin(home, given.run, given.spec)
    run = _run(home, given.run)
    os.environ |= lineage.parent(run.id)
    if given.verb == "stage":
        return make(home, run, given.name)
    if given.verb == "effect":
        return act(home, run, given.name, given.arguments)
    return unite(home, run, given.stages)


def begin(home: Path, run_id: str, spec: dict[str, Any]) -> Record:
    """Write the run down: of two attempts to begin it, the later holds."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run_id):
        raise UserError(f"{run_id!r} cannot name a run; expected letters, digits, . _ and -")
    if not isinstance(spec, dict) or set(spec) - SPEC:
        raise UserError(f"--spec is {spec}; expected a mapping of {', '.join(sorted(SPEC))}")
    run = Run(run_id, workspace.git(home, "rev-parse", "HEAD"), **spec)
    changed = workspace.git(home, "status", "--porcelain", "--untracked-files=no").splitlines()
    if changed:
        stages.say("begin", f"uncommitted changes of {len(changed)} files are no part of this run")
    with workspace.opened(home, run, "begin"):  # a wrong override ends here
        pass
    with _repo(home) as repo:
        meeting = workspace.exchange(repo)
    with lease.held(meeting, f"begin-{run_id}", _waits("begin")):
        begun = meeting.get(_path(run_id, "run"))
        if begun and begun["attempt"] >= run.attempt:
            if (begun["overrides"], begun["force"]) != (run.overrides, run.force):
                raise UserError(
                    f"the run {run_id} was begun with {begun['overrides']}, not {run.overrides}; "
                    "give this one another id"
                )
            run = Run(**begun)
        else:
            meeting.put(_path(run_id, "run"), run.record())
    set_ = ", ".join(f"{key}={value}" for key, value in run.overrides.items()) or "nothing"
    stages.say("begin", f"run {run.id} at {run.commit[:12]}, overrides {set_}")
    return run.record()


def make(home: Path, run: Run, name: str) -> Record:
    """Make one stage and publish its lock entry as the run's fragment."""
    with workspace.opened(home, run, name) as folder, contextlib.chdir(folder):
        with _repo(folder) as repo:
            meeting = workspace.exchange(repo)
            node = graph.read(repo).get(name)
        if node is None:
            raise UserError(f"dvc.yaml of {run.commit[:12]} has no stage {name}")
        parents = _locks(meeting, run, node["parents"])
        workspace.write_lock(folder, parents)
        with _repo(folder) as repo:
            store.take(repo, workspace.inputs(repo, node["inputs"]))
            key = _key(*workspace.stages(repo, [name]))
        with lease.held(meeting, f"{name}-{key}", _waits(name)):
            fragment = _before(folder, meeting, run, name, key, parents)
            if fragment is None:
                fragment = _compute(folder, run, name, key, node["inputs"])
                meeting.put(f"made/{name}/{key}.json", fragment)
            published = _publish(meeting, folder, run, name, fragment, parents)
    return published


def _key(stage: "PipelineStage") -> str:
    """The name of what goes into a stage: its command, inputs, code, params, and what it gives."""
    from dvc.stage.serialize import to_single_stage_lockfile

    stage.save_deps()
    entry = to_single_stage_lockfile(stage)
    inputs: Record = {part: entry.get(part) for part in ("cmd", "deps", "params")}
    inputs["outs"] = sorted([out.def_path, out.use_cache, out.persist] for out in stage.outs)
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _before(
    folder: Path, meeting: Exchange, run: Run, name: str, key: str, parents: dict[str, Record]
) -> Record | None:
    """What this run, or else any run, made of the same inputs, where the remote still holds it."""
    places = [_path(run.id, name)] + ([] if run.force else [f"made/{name}/{key}.json"])
    for place in places:
        found = meeting.get(place)
        if found and found["key"] == key and _intact(folder, name, found, parents):
            stages.say(name, "made before from the same inputs; nothing to compute")
            return found | {"ran": False}
    return None


def _intact(folder: Path, name: str, fragment: Record, parents: dict[str, Record]) -> bool:
    workspace.write_lock(folder, {**parents, name: fragment["lock"]})
    try:
        with _repo(folder) as repo:
            return store.intact(repo, _outs(repo, [name]))
    finally:
        workspace.write_lock(folder, parents)


def _compute(folder: Path, run: Run, name: str, key: str, inputs: list[str]) -> Record:
    """Run the stage and give its outs to the remote."""
    from dvc.exceptions import ReproductionError

    with _repo(folder) as repo:
        try:
            repo.reproduce(targets=[name], single_item=True, force=run.force)
        except ReproductionError as error:
            raise _failed(name, error) from None
    with _repo(folder) as repo:
        # Inputs may be links into the cache: who writes into one changes it for every other task.
        if store.drop(repo.cache.local, store.objects(workspace.inputs(repo, inputs))):
            raise RuntimeError(f"{name} wrote into one of its inputs: {', '.join(inputs)}")
        outs = _outs(repo, [name])
        sent = store.give(repo, outs)
        metrics = {
            out.def_path: stages.read_json(folder / out.def_path) for out in outs if out.is_metric
        }
    stages.say(name, f"{sent} objects given to the store")
    return {
        "stage": name,
        "key": key,
        "lock": workspace.read_lock(folder)[name],
        "metrics": metrics,
        "ran": True,
    }


def _failed(name: str, error: Exception) -> Exception:
    """What DVC says of a stage that did not end well."""
    cause = " ".join(str(error.__cause__ or error).split())
    status = re.search(r"exited with (-?\d+)$", cause)
    if status is None:
        return RuntimeError(cause)
    return _ended(name, int(status[1]))


def _ended(name: str, code: int) -> Exception:
    """A process that ended with this code has said itself what is wrong, unless it was killed."""
    killed = -code if code < 0 else code - 128
    if killed > 0:
        hint = " (out of memory?)" if killed == signal.SIGKILL else ""
        return RuntimeError(f"{name} was killed by signal {killed}{hint}")
    return FailedError(2 if code == 2 else 1)


def _publish(
    meeting: Exchange,
    folder: Path,
    run: Run,
    name: str,
    fragment: Record,
    parents: dict[str, Record],
) -> Record:
    """Put the fragment under the run's id. Of two attempts the first wins, while what it made
    stands.
    """
    path = _path(run.id, name)
    mine = fragment | _stamp(run)
    if _locks(meeting, run, parents) != parents:
        raise RuntimeError("an input was made anew meanwhile; what this attempt made is of the old")
    if meeting.put_new(path, mine):
        return mine
    first = _found(meeting, run.id, name)
    if first["attempt"] > run.attempt:
        raise UserError(f"the run {run.id} was begun anew; this attempt yields")
    if first["key"] == mine["key"] and _intact(folder, name, first, parents):
        if first["lock"] != mine["lock"]:
            stages.say(name, "another attempt was first and made other bytes; its bytes stay")
        return first
    meeting.put(path, mine)
    return mine


def act(home: Path, run: Run, name: str, arguments: list[str]) -> Record:
    """Act on the world, one at a time, and write down what was done."""
    effect = EFFECTS[name]
    with workspace.opened(home, run, name) as folder, contextlib.chdir(folder):
        with _repo(folder) as repo:
            meeting = workspace.exchange(repo)
        workspace.write_lock(folder, _locks(meeting, run, effect.reads))
        with _repo(folder) as repo:
            store.take(repo, _outs(repo, list(effect.reads)))
        with lease.held(meeting, f"effect-{name}", _waits(name)) as held:
            before = meeting.get(_path(run.id, name))
            if before and before["attempt"] == run.attempt and _given(folder, meeting, run, effect):
                stages.say(name, "done before in this run; what it gave stays")
                return before
            status = subprocess.run([sys.executable, "-m", effect.module, *arguments]).returncode
            if status:
                raise _ended(name, status)
            held.check()
            done = stages.read_json(folder / "reports" / name / "record.json")
            mine = {"effect": name, "record": done} | _stamp(run)
            if effect.gives:
                _hand_over(folder, meeting, run, effect.gives, mine)
            meeting.put(_path(run.id, name), mine)
    return mine


def _given(folder: Path, meeting: Exchange, run: Run, effect: Effect) -> bool:
    """Whether the store still holds what the effect gave to the run."""
    given = meeting.get(_path(run.id, effect.gives)) if effect.gives else None
    return given is not None and _intact(folder, str(effect.gives), given, {})


def _hand_over(folder: Path, meeting: Exchange, run: Run, stage: str, record: Record) -> None:
    """Publish what an effect brought into the workspace as if `stage` had made it."""
    from dvc.stage.serialize import to_single_stage_lockfile

    with _repo(folder) as repo:
        (made,) = workspace.stages(repo, [stage])
        present = [out for out in made.outs if out.exists]
        for out in present:
            out.save()
            out.commit()
        entry = json.loads(json.dumps(to_single_stage_lockfile(made)))
        paths = [out.def_path for out in present]
        entry = {"cmd": entry["cmd"], "outs": [o for o in entry["outs"] if o["path"] in paths]}
        store.give(repo, present)
    meeting.put(_path(run.id, stage), record | {"stage": stage, "lock": entry, "metrics": {}})


def unite(home: Path, run: Run, names: list[str]) -> Record:
    """Join the fragments into one dvc.lock that `dvc repro` finds nothing to do for, and record
    it.
    """
    with workspace.opened(home, run, "unite") as folder, contextlib.chdir(folder):
        with _repo(folder) as repo:
            meeting = workspace.exchange(repo)
            nodes = graph.read(repo)
        if unknown := sorted(set(names) - set(nodes)):
            raise UserError(f"dvc.yaml of {run.commit[:12]} has no stage {unknown[0]}")
        given = {one for name in names for one in nodes[name]["parents"]} - set(names)
        if not given and set(nodes) != set(names):
            raise UserError("dags/manifest.json is not that of the run's dvc.yaml: make manifest")
        found = {one: _found(meeting, run.id, one) for one in nodes if one in names or one in given}
        made = {
            out["path"]: out["md5"] for one in found.values() for out in one["lock"].get("outs", [])
        }
        _refuse_mixed(found, made)
        workspace.join_lock(folder, {one: fragment["lock"] for one, fragment in found.items()})
        with _repo(folder) as repo:
            outs = [out for out in _outs(repo, list(found)) if out.hash_info]
            store.take(repo, outs)
            store.give(repo, outs)
        with _repo(folder) as repo:
            stale = repo.status(targets=names)
        if stale:
            raise RuntimeError(f"the united lock does not hold: {json.dumps(stale)[:300]}")
        record = _record(home, folder, meeting, run, made)
    computed = sum(bool(fragment.get("ran")) for fragment in found.values())
    stages.say("unite", f"{len(found)} stages, {computed} computed, lock {record['lock_md5']}")
    return record


def _refuse_mixed(found: dict[str, Record], made: dict[str, str]) -> None:
    """Every stage has read what the run made, by path. Raises UserError where one has not."""
    for name, fragment in found.items():
        for dep in fragment["lock"].get("deps", []):
            if dep["md5"] != made.get(dep["path"], dep["md5"]):
                raise UserError(
                    f"{name} was made of another {dep['path']} than the run holds; "
                    f"clear the task {name}"
                )


def _record(home: Path, folder: Path, meeting: Exchange, run: Run, made: dict[str, str]) -> Record:
    lock = (folder / "dvc.lock").read_text(encoding="utf-8")
    record = {
        "run": run.id,
        "dvc.lock": lock,
        "at": _now(),
        "commit": run.commit,
        "lock_md5": hashlib.md5(lock.encode(), usedforsecurity=False).hexdigest(),
        "outs": made,
    }
    if parameters.load().orchestrate.record == "branch":
        record["commit"] = workspace.commit(folder, f"Lock of the run {run.id}", [Path("dvc.lock")])
        branch = f"refs/heads/runs/{run.id}"
        workspace.git(folder, "push", "--quiet", "--force", str(home), f"HEAD:{branch}")
    meeting.put(_path(run.id, "lock"), record)
    return record


def _waits(name: str) -> Callable[[str], None]:
    return lambda holder: stages.say(name, f"the same is done by {holder}; waiting for it")


def _repo(folder: Path) -> "Repo":
    from dvc.repo import Repo

    return Repo(str(folder))


def _outs(repo: "Repo", names: list[str]) -> list["Output"]:
    return [out for stage in workspace.stages(repo, names) for out in stage.outs]


def _run(home: Path, run_id: str) -> Run:
    with _repo(home) as repo:
        return Run(**_found(workspace.exchange(repo), run_id, "run"))


def _locks(meeting: Exchange, run: Run, names: Iterable[str]) -> dict[str, Record]:
    """The lock entries that these stages published."""
    return {one: _found(meeting, run.id, one)["lock"] for one in names}


def _stamp(run: Run) -> Record:
    """Of which run a record is, and which beginning of it; where and when it was written."""
    here = {"host": socket.gethostname(), "at": _now()}
    return {"run": run.id, "attempt": run.attempt} | here


def _found(meeting: Exchange, run_id: str, task: str) -> Record:
    """What a task published. Raises UserError where it did not."""
    found = meeting.get(_path(run_id, task))
    if found is None:
        raise UserError(f"{task} published nothing in the run {run_id}; clear that task")
    return found


def _path(run_id: str, task: str) -> str:
    return f"runs/{run_id}/{task}.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
