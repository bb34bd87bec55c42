"""champion: bring the champion's bundle from the registry, byte for byte.

in:   the version of <dataset.name> that has the alias champion
out:  models/bundle/, whole and with the hash that the version names, or not at all;
      reports/champion/record.json
run:  python -m pipelines.deploy.champion
"""

import shutil
from pathlib import Path

from pipelines import bundle, stage, tracking
from pipelines.deploy.register import CHAMPION
from pipelines.errors import UserError
from pipelines.params import Params

RECORD = Path("reports/champion/record.json")
# Where MLflow keeps the files that register gave it beside its own copy of the model.
FILES = "extra_files"


def run(params: Params) -> None:
    store, _ = tracking.client(params)
    import mlflow
    from mlflow.exceptions import MlflowException

    name = params.dataset.name
    try:
        version = store.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise UserError(f"{name} has no {CHAMPION} at {params.tracking.uri}") from None
        raise
    wanted = version.tags["bundle"]
    with stage.scratch("champion") as folder, stage.fresh(bundle.FOLDER) as made:
        mlflow.artifacts.download_artifacts(
            artifact_uri=f"models:/{name}/{version.version}", dst_path=str(folder)
        )
        shutil.copytree(folder / FILES, made, dirs_exist_ok=True)
        found = stage.digest(made)
        if found != wanted:
            raise UserError(
                f"{name} version {version.version} is damaged: its bundle is {found[:12]}, "
                f"expected {wanted[:12]}"
            )
    entry = {"model": name, "version": int(version.version), "bundle": wanted}
    stage.write_json(RECORD, entry)
    stage.say("champion", f"{name} version {version.version}, bundle {wanted[:12]}")


if __name__ == "__main__":
    stage.main(run)
