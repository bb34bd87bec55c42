"""MLflow: where runs and versions are kept, and which commit a run belongs to."""

import hashlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import naming
from pipelines.params import Params
from pipelines.stage import STATE, lives, me, turn

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from pytorch_lightning.loggers import MLFlowLogger

SQLITE = "sqlite:///"


def client(params: Params) -> tuple["MlflowClient", str]:
    """A client of tracking.uri and the id of the dataset's experiment, both made where they are
    missing.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import logging

    logging.getLogger("alembic").setLevel(logging.WARNING)
    # It logs, traceback and all, what it raises.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    import mlflow

    with naming(params.tracking.uri):
        _prepare(params.tracking.uri)
        mlflow.set_tracking_uri(params.tracking.uri)
        store = mlflow.MlflowClient()
        return store, _experiment(store, params.dataset.name, params.tracking.artifacts)


def ledger(uri: str) -> Path:
    """The folder of ledger lines for the store at `uri`."""
    return STATE / "ledger" / hashlib.sha256(uri.encode()).hexdigest()[:12]


def _prepare(uri: str) -> None:
    """Make the database of a file store, whole or not at all, by one process at a time.

    MLflow builds its tables in many steps: killed between two, or joined by another process, it
    leaves a database that no later run can open.
    """
    import mlflow

    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or path.is_file():
        return
    with turn(path.parent / "lock"):
        if not path.is_file():
            partial = path.with_name(f".{path.name}.partial")
            partial.unlink(missing_ok=True)
            # A new database knows nothing of what was told to the one before it.
            shutil.rmtree(ledger(uri), ignore_errors=True)
            mlflow.MlflowClient(tracking_uri=f"{SQLITE}{partial}").search_experiments()
            partial.rename(path)


def _experiment(store: "MlflowClient", name: str, artifacts: str) -> str:
    """The id of the experiment, which two processes may want to make at once."""
    from mlflow.exceptions import MlflowException

    location = artifacts if "://" in artifacts else Path(artifacts).resolve().as_uri()
    for _ in range(2):
        found = store.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        with suppress(MlflowException):
            return str(store.create_experiment(name, artifact_location=location))
    raise RuntimeError(f"experiment {name} can neither be found nor made at {store.tracking_uri}")


def exists(params: Params) -> bool:
    """Whether the store can hold anything yet: a file store that is gone holds nothing."""
    uri = params.tracking.uri
    return not uri.startswith(SQLITE) or Path(uri.removeprefix(SQLITE)).is_file()


@contextmanager
def run(
    params: Params, stage: str, name: str | None = None, tags: Mapping[str, str] | None = None
) -> Iterator["MLFlowLogger"]:
    """Yield Lightning's logger on a new run with the params of the stage and `tags`, named as the
    stage where nothing else is said; it ends as finished or failed.
    """
    from pytorch_lightning.loggers import MLFlowLogger

    store, experiment = client(params)
    with naming(params.tracking.uri):
        end_killed(store, experiment)
        made = store.create_run(
            experiment,
            run_name=name or stage,
            tags=_origin(params) | dict(tags or {}),
        )
        for name, value in getattr(params, stage).model_dump().items():
            store.log_param(made.info.run_id, f"{stage}.{name}", value)
    logger = MLFlowLogger(
        params.dataset.name, tracking_uri=params.tracking.uri, run_id=made.info.run_id
    )
    with _ending(store, made.info.run_id):
        yield logger


@contextmanager
def study(params: Params, name: str) -> Iterator[str]:
    """Yield the id of the run above the runs of a study: of one that was begun before, the same."""
    store, experiment = client(params)
    with naming(params.tracking.uri):
        end_killed(store, experiment)
        found = store.search_runs([experiment], f"tags.study = '{name}'")
        if found:
            run_id = found[0].info.run_id
            store.update_run(run_id, status="RUNNING")
            for key, value in _origin(params).items():
                store.set_tag(run_id, key, value)
        else:
            made = store.create_run(experiment, run_name="tune", tags=_origin(params))
            run_id = made.info.run_id
            store.set_tag(run_id, "study", name)
    with _ending(store, run_id):
        try:
            yield run_id
        finally:
            end_killed(store, experiment)


def _origin(params: Params) -> dict[str, str]:
    """The tags that say what a run was made of, where, and by which process."""
    return {
        "git_commit": git_commit(),
        "as_of": params.as_of.isoformat(),
        "host": socket.gethostname(),
        "process": me(),
    }


@contextmanager
def _ending(store: "MlflowClient", run_id: str) -> Iterator[None]:
    """End the run as finished, or as failed where the block raises."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except BaseException:
        with suppress(MlflowException):  # a store that fails must not hide the fault itself
            store.set_terminated(run_id, "FAILED")
        raise
    store.set_terminated(run_id, "FINISHED")


def end_killed(store: "MlflowClient", experiment: str) -> None:
    """Mark as killed what still runs here by the store and whose process is gone."""
    here = f"attributes.status = 'RUNNING' and tags.host = '{socket.gethostname()}'"
    for run in store.search_runs([experiment], here):
        process = run.data.tags.get("process")
        if process is None or not lives(process):
            store.set_terminated(run.info.run_id, "KILLED")


def tag(logger: "MLFlowLogger", tags: dict[str, str]) -> None:
    """Put tags on the run of `logger`."""
    for name, value in tags.items():
        logger.experiment.set_tag(logger.run_id, name, value)


def git_commit() -> str:
    """The commit of the working tree, with `-dirty` where tracked files differ, or `unknown`.

    dvc.lock does not count: it changes with every stage, and says what came out, not what went in.
    """
    changed = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock"]
    try:
        commit, dirty = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["git", "rev-parse", "HEAD"], changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if dirty else commit
