"""The workspace: a checkout of the run's commit in which one attempt of one task works.

No two attempts share a folder, so a killed one leaves nothing that the next could trip over. What
they share is content: the DVC cache of this machine and the remote, and the exchange.
"""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from pipelines import params as parameters
from pipelines import stage
from pipelines.errors import UserError
from pipelines.exchange import Exchange, beside
from pipelines.orchestrate import graph

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

ROOT = stage.STATE / "workspaces"
# Of this machine and not of the run: every workspace sees the same.
SHARED = (
    "mlflow", "ledger", "lineage", "months", "fit", "serving", "keys", "capture", "labels", "edge",
)  # fmt: skip
Lock = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run is, from its first task on.

    `overrides` are keys of params.yaml, dotted. `attempt` says which beginning of the run it is,
    and sorts after those before: who clears the whole run begins it anew, at the commit of that
    time, and what an earlier beginning left at work yields.
    """

    id: str
    commit: str
    overrides: dict[str, Any] = field(default_factory=dict)
    attempt: str = ""
    force: bool = False
    reason: str = ""

    def record(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def opened(home: Path, run: Run, task: str) -> Iterator[Path]:
    """Yield a new checkout for one attempt; while it is open, no collector removes it."""
    folder, held = _claim(home / ROOT / run.id, task)
    with held:
        params = _check_out(home, folder, run)
        # Here and not at a run's end: of many workers, each collects its own. And before the work,
        # so that the last line is what the work said.
        for old in collect(home, params.orchestrate.keep):
            stage.say(task, f"workspaces of {old} removed")
        yield folder


def _claim(base: Path, task: str) -> tuple[Path, TextIO]:
    """The folder of the first attempt that nobody took, and its lock, which is held."""
    number = 1
    while True:
        folder = base / f"{task}-{number}"
        base.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
            held = (base / f".{folder.name}.lock").open("w")
        except FileExistsError:
            number += 1
        except FileNotFoundError:
            pass  # a collector took the base away: once more
        else:
            fcntl.flock(held, fcntl.LOCK_EX)
            return folder, held


def _check_out(home: Path, folder: Path, run: Run) -> parameters.Params:
    """The files of the run's commit and its params, linked to the cache and state of `home`."""
    # A clone that borrows the objects: a worktree would write into the repository of `home`.
    git(home, "clone", "--quiet", "--shared", "--no-checkout", str(home), str(folder))
    if not _has(folder, run.commit):
        if "origin" not in git(home, "remote").split():
            raise UserError(f"{home} has neither the run's commit {run.commit} nor an origin")
        origin = git(home, "remote", "get-url", "origin")
        git(folder, "fetch", "--quiet", origin, run.commit)
    git(folder, "checkout", "--quiet", "--detach", run.commit)
    params = set_params(folder, run)
    for name in SHARED:
        shared = home.resolve() / stage.STATE / name
        shared.mkdir(parents=True, exist_ok=True)
        link = folder / stage.STATE / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(shared)
    _link_source(home, folder, params.fetch.source)
    _configure(home, folder)
    return params


def _link_source(home: Path, folder: Path, source: str) -> None:
    """A folder of raw files that is named from the checkout is that of `home`, whole: git may track
    a part of it.
    """
    if Path(source).is_absolute() or not (home / source).is_dir():
        return
    link = Path(os.path.normpath(folder / source))
    if folder in link.parents:  # and of this workspace alone
        shutil.rmtree(link, ignore_errors=True)
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((home / source).resolve())


def _has(folder: Path, commit: str) -> bool:
    asked = ["git", "cat-file", "-e", f"{commit}^{{commit}}"]
    return subprocess.run(asked, cwd=folder, capture_output=True).returncode == 0


def set_params(folder: Path, run: Run) -> parameters.Params:
    """Write the run's overrides into params.yaml, commit them, and return what it says then.

    Author and time are those of the commit before, so every task of the run, wherever it runs,
    makes the very same commit.
    """
    path = folder / parameters.FILE
    text = before = path.read_text(encoding="utf-8")
    for key, value in run.overrides.items():
        text = _with(text, key, value)
    path.write_text(text, encoding="utf-8")
    params = parameters.load(path)
    if text != before:
        said = ", ".join(f"{key}: {value}" for key, value in run.overrides.items())
        commit(folder, f"Set {said} for the run {run.id}", [parameters.FILE])
    return params


def commit(folder: Path, message: str, paths: list[Path]) -> str:
    """Commit the paths as of the time of HEAD and return the hash; HEAD's where nothing changed."""
    when = git(folder, "show", "--no-patch", "--format=%cI", "HEAD")
    who = {"NAME": "Headrace", "EMAIL": "headrace@localhost", "DATE": when}
    env = {
        f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()
    }
    git(folder, "add", "--force", *map(str, paths))
    if not git(folder, "diff", "--cached", "--name-only"):
        return git(folder, "rev-parse", "HEAD")
    git(
        folder,
        "-c",
        "commit.gpgsign=false",
        "commit",
        "--quiet",
        "--no-verify",
        "-m",
        message,
        env=env,
    )
    return git(folder, "rev-parse", "HEAD")


def _with(text: str, key: str, value: Any) -> str:
    """The YAML text with one value replaced and everything else, comments too, as it was."""
    node = yaml.compose(text)
    for part in key.split("."):
        held = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((item for name, item in held if name.value == part), None)
    if node is None:
        raise UserError(f"params.yaml has no key {key}")
    return text[: node.start_mark.index] + json.dumps(value) + text[node.end_mark.index :]


def _configure(home: Path, folder: Path) -> None:
    """Point DVC at the cache and the remote of `home`; a path there is relative to its .dvc."""
    from dvc.config import Config

    config = Config(str(home / ".dvc"))
    name = config["core"].get("remote")
    if name is None:
        raise UserError(".dvc/config names no remote; set one: dvc remote add --default NAME URL")
    cache = config["cache"].get("dir", str(home / ".dvc" / "cache"))
    (folder / ".dvc" / "config.local").touch(mode=0o600)  # it may hold a key
    with Config(str(folder / ".dvc")).edit("local") as local:
        # Inputs are links into the cache, read-only, where the file system can.
        local["cache"] = {"dir": cache, "type": ["reflink", "hardlink", "copy"]}
        # DVC's own notes go with the workspace.
        site = folder.resolve() / ".dvc" / "tmp" / "site"
        local["core"] = {"remote": name, "site_cache_dir": str(site)}
        local["remote"] = {name: config["remote"][name] | {"verify": True}}


def git(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> str:
    """Run git in `folder` and return what it said. Raises RuntimeError with git's last line."""
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise RuntimeError(f"git {' '.join(arguments)}: {said[-1]}")
    return done.stdout.strip()


def exchange(repo: "Repo") -> Exchange:
    """The exchange beside the repository's default remote."""
    return beside(repo.config)


def write_lock(folder: Path, entries: dict[str, Lock]) -> None:
    """Write dvc.lock with these stages alone."""
    from dvc.utils.serialize import dump_yaml

    dump_yaml(folder / "dvc.lock", {"schema": "2.0", "stages": entries})


def read_lock(folder: Path) -> dict[str, Lock]:
    """The entries of dvc.lock."""
    entries = yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    return {str(name): dict(entry) for name, entry in entries.items()}


def join_lock(folder: Path, entries: dict[str, Lock]) -> None:
    """Put the entries into the dvc.lock of the run's commit, as `dvc repro` does: in place, new
    ones last.
    """
    from dvc.utils.serialize import modify_yaml

    with modify_yaml(folder / "dvc.lock") as lock:
        lock.setdefault("schema", "2.0")
        lock.setdefault("stages", {}).update(entries)


def stages(repo: "Repo", names: list[str]) -> list["PipelineStage"]:
    """The stages of these names. Raises UserError where dvc.yaml has no such stage."""
    known = {one.name: one for one in graph.pipeline(repo)}
    for name in names:
        if name not in known:
            raise UserError(f"dvc.yaml has no stage {name}; it has {', '.join(known)}")
    return [known[name] for name in names]


def inputs(repo: "Repo", paths: list[str]) -> list["Output"]:
    """The outs with these paths."""
    return [out for out in repo.index.outs if out.def_path in paths]


def collect(home: Path, keep: int) -> list[str]:
    """Remove the workspaces of all but the newest `keep` runs and return the ids of those runs.

    A run with an attempt still at work is left alone; so is one that another collector removes.
    """
    for left in (home / ROOT).glob(".*"):  # by a collector that was killed
        with suppress(FileNotFoundError):
            if not _at_work(left):
                shutil.rmtree(left, ignore_errors=True)
    runs = {}
    for one in (home / ROOT).glob("[!.]*"):
        with suppress(FileNotFoundError):
            runs[one] = one.stat().st_mtime
    removed = []
    for run in sorted(runs, key=runs.__getitem__, reverse=True)[keep:]:
        gone = run.with_name(f".{run.name}.{os.getpid()}")
        with suppress(OSError):  # another collector was here, or a new attempt
            if _at_work(run):
                continue
            run.rename(gone)  # whoever opens a workspace of this run now makes the folder anew
            if _at_work(gone):
                gone.rename(run)
                continue
            shutil.rmtree(gone, ignore_errors=True)
            removed.append(run.name)
    return removed


def _at_work(run: Path) -> bool:
    return any(_held(lock) for lock in run.glob(".*.lock"))


def _held(lock: Path) -> bool:
    with lock.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
