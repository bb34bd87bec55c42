"""register: the bundle becomes a version in MLflow. An effect: told twice, it acts once.

in:   models/bundle/, reports/
out:  a version of the model <dataset.name> with the bundle's hash as a tag; the first that passed
      its evaluation becomes champion, any other challenger; reports/register/record.json
run:  python -m pipelines.deploy.register
"""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import bundle, stage, tracking
from pipelines.errors import naming
from pipelines.params import Params

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
FIT = Path("models/fit")
RECORD = Path("reports/register/record.json")


def run(params: Params) -> None:
    digest = stage.digest(bundle.FOLDER)
    contract = stage.read_json(bundle.FOLDER / bundle.CONTRACT)
    store, experiment = tracking.client(params)
    name = params.dataset.name
    version = find(store, name, digest)
    new = version is None
    if version is None:
        with naming(params.tracking.artifacts):
            version = create(store, experiment, name, digest, contract)
    drop_younger(store, name, digest, version)
    aliases = settle(store, name, version, passed=contract["passed"])
    entry = {"model": name, "version": int(version.version), "bundle": digest}
    stage.write_json(RECORD, entry | {"aliases": aliases})
    # Without aliases: they move, and only the registry knows.
    stage.write_json(record(params, digest), entry)
    state = "new" if new else "already there"
    stage.say(
        "register",
        f"{name} version {version.version} ({', '.join(aliases)}), {state}, bundle {digest[:12]}",
    )


def record(params: Params, digest: str) -> Path:
    """The ledger line of one registration at one tracking store, so that asking again costs no
    import.
    """
    return tracking.ledger(params.tracking.uri) / f"{digest}.json"


def find(store: "MlflowClient", name: str, digest: str) -> "ModelVersion | None":
    """The oldest version whose bundle has this hash."""
    return next(iter(holders(store, name, digest)), None)


def holders(store: "MlflowClient", name: str, digest: str) -> "list[ModelVersion]":
    """The versions whose bundle has this hash, the oldest first."""
    found = store.search_model_versions(f"name = '{name}' and tags.bundle = '{digest}'")
    return sorted(found, key=lambda version: int(version.version))


def create(
    store: "MlflowClient", experiment: str, name: str, digest: str, contract: dict[str, Any]
) -> "ModelVersion":
    """Log the bundle as an MLflow model and make it a version, complete from the start."""
    import mlflow
    import onnx
    from mlflow.exceptions import MlflowException

    run_id = _run_of(store, experiment)
    with mlflow.start_run(run_id=run_id):
        mlflow.log_metrics({f"test.{name}": value for name, value in contract["metrics"].items()})
        info = mlflow.onnx.log_model(
            onnx.load(bundle.FOLDER / bundle.MODEL),
            name="bundle",
            # The bundle itself, byte for byte; MLflow's own copy of the model is for its own
            # server.
            extra_files=[str(path) for path in sorted(bundle.FOLDER.glob("*"))],
            pip_requirements=["onnxruntime", "numpy"],
            save_as_external_data=False,
        )
    try:
        store.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        "bundle": digest,
        "git_commit": tracking.git_commit(),
        "as_of": contract["as_of"],
        "passed": str(contract["passed"]).lower(),
    }
    made = store.create_model_version(
        name, source=info.model_uri, run_id=run_id, tags=tags, model_id=info.model_id
    )
    return find(store, name, digest) or made


def drop_younger(store: "MlflowClient", name: str, digest: str, kept: "ModelVersion") -> None:
    """Delete what two registrations at once, or one killed between, made beside the oldest."""
    from mlflow.exceptions import MlflowException

    for version in holders(store, name, digest):
        if version.version != kept.version:
            with suppress(MlflowException):  # the other deleted its own
                store.delete_model_version(name, version.version)


def _run_of(store: "MlflowClient", experiment: str) -> str:
    """The run that fitted these weights, or a new one where another machine fitted them."""
    fit = stage.digest(FIT)
    runs = store.search_runs([experiment], f"tags.fit = '{fit}'", max_results=1)
    if runs:
        return str(runs[0].info.run_id)
    run = store.create_run(experiment, tags={"fit": fit, "git_commit": tracking.git_commit()})
    return str(run.info.run_id)


def settle(store: "MlflowClient", name: str, version: "ModelVersion", *, passed: bool) -> list[str]:
    """Give the version its alias and return all it has.

    The first that passed its evaluation is champion; any other is challenger.
    """
    aliases: dict[str, str] = dict(store.get_registered_model(name).aliases)
    number = str(version.version)
    if CHAMPION not in aliases and passed:
        store.set_registered_model_alias(name, CHAMPION, number)
    elif number not in (str(held) for held in aliases.values()):
        store.set_registered_model_alias(name, CHALLENGER, number)
    return aliases_of(store, name, number)


def aliases_of(store: "MlflowClient", name: str, number: str) -> list[str]:
    """The aliases of a version as they are now."""
    held = dict(store.get_registered_model(name).aliases)
    return sorted(alias for alias, holder in held.items() if str(holder) == number)


if __name__ == "__main__":
    stage.main(run)
