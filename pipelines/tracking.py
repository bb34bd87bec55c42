"""MLflow: where runs and versions are kept, and which commit a run belongs to."""

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.params import Params

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"


def client(params: Params) -> tuple["MlflowClient", str]:
    """A client of tracking.uri and the id of the dataset's experiment, both made where they are missing."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import logging

    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    import mlflow

    uri = params.tracking.uri
    if uri.startswith(SQLITE):
        Path(uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    store = mlflow.MlflowClient()
    name = params.dataset.name
    experiment = store.get_experiment_by_name(name)
    if experiment is not None:
        return store, str(experiment.experiment_id)
    artifacts = Path(params.tracking.artifacts)
    location = str(artifacts) if "://" in params.tracking.artifacts else artifacts.resolve().as_uri()
    return store, str(store.create_experiment(name, artifact_location=location))


def git_commit() -> str:
    """The commit of the working tree, `-dirty` behind it where tracked files differ, or `unknown`."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
