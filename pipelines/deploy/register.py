"""register: the bundle becomes a version in MLflow. An effect: told twice, it acts once.

in:   models/bundle/, reports/
out:  a version of the model <dataset.name> with the bundle's hash as a tag, signed;
      the first that passed its evaluation becomes champion, a later one that passed challenger,
      if its task is one that is served: binary;
      reports/register/record.json
run:  python -m pipelines.deploy.register
"""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import bundle, signing, stage, tracking
from pipelines.deploy import promotion, registry
from pipelines.deploy.registry import CHALLENGER, ROLLED_BACK, ConflictError, Registry
from pipelines.errors import naming
from pipelines.params import Params

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

FIT = Path("models/fit")
RECORD = Path("reports/register/record.json")


def run(params: Params) -> None:
    digest = stage.digest(bundle.FOLDER)
    contract = bundle.contract()
    held = registry.of(params)
    version = held.find(digest)
    new = version is None
    if version is None:
        bundle.verify(bundle.FOLDER, digest)
        with naming(params.tracking.artifacts):
            version = create(held, tracking.client(params)[1], digest, contract)
    drop_younger(held, digest, version)
    number = int(version.version)
    if "signature" not in version.tags:
        held.tag(number, {"signature": signing.sign(held.statement(number, digest))})
    if contract["passed"] and bundle.task(contract) == "binary":
        settle(held, number)
    aliases = held.aliases_of(number)
    entry = {"model": held.model, "version": number, "bundle": digest}
    stage.write_json(RECORD, entry | {"aliases": aliases})
    # Without aliases: they move, and only the registry knows.
    stage.write_json(record(params, digest), entry)
    state = "new" if new else "already there"
    said = ", ".join(aliases) or "no alias"
    stage.say("register", f"{held.model} version {number} ({said}), {state}, bundle {digest[:12]}")


def record(params: Params, digest: str) -> Path:
    """The ledger line of one registration at one tracking store, so that asking again costs no
    import.
    """
    return tracking.ledger(params.tracking.uri) / f"{digest}.json"


def create(
    held: Registry, experiment: str, digest: str, contract: dict[str, Any]
) -> "ModelVersion":
    """Log the bundle as an MLflow model and make it a version, complete from the start."""
    import mlflow
    import onnx
    from mlflow.exceptions import MlflowException

    store, name = held.store, held.model
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
    return held.find(digest) or made


def drop_younger(held: Registry, digest: str, kept: "ModelVersion") -> None:
    """Delete what two registrations at once, or one killed between, made beside the oldest."""
    from mlflow.exceptions import MlflowException

    for version in held.holders(digest):
        if version.version != kept.version:
            with suppress(MlflowException):  # the other deleted its own
                held.store.delete_model_version(held.model, version.version)


def _run_of(store: "MlflowClient", experiment: str) -> str:
    """The run that fitted these weights, or a new one where another machine fitted them."""
    fit = stage.digest(FIT)
    runs = store.search_runs([experiment], f"tags.fit = '{fit}'", max_results=1)
    if runs:
        return str(runs[0].info.run_id)
    run = store.create_run(experiment, tags={"fit": fit, "git_commit": tracking.git_commit()})
    return str(run.info.run_id)


def settle(held: Registry, version: int) -> None:
    """The first version becomes champion; one newer than champion and challenger is challenger,
    unless it was rolled back.
    """
    champion = promotion.reconcile(held)
    if champion is None:
        with suppress(ConflictError):  # another was first
            promotion.promote(held, version, None, "register", "the first that passed evaluate")
        champion = held.champion()
    newest = max(held.aliases().get(CHALLENGER, 0), champion.version if champion else 0)
    if version > newest and ROLLED_BACK not in held.version(version).tags:
        held.store.set_registered_model_alias(held.model, CHALLENGER, str(version))


if __name__ == "__main__":
    stage.main(run)
