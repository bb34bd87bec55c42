"""champion: bring the champion's bundle from the registry, byte for byte.

in:   the version of <dataset.name> that the log of promotions names
out:  models/bundle/, whole and with the hash that the version names, or not at all;
      reports/champion/record.json
run:  python -m pipelines.deploy.champion
"""

import shutil
from pathlib import Path

from pipelines import bundle, signing, stage
from pipelines.deploy import promotion, registry
from pipelines.deploy.registry import CHAMPION, Registry
from pipelines.errors import UserError
from pipelines.params import Params

RECORD = Path("reports/champion/record.json")
# Where MLflow keeps the files that register gave it beside its own copy of the model.
FILES = "extra_files"


def run(params: Params) -> None:
    held = registry.of(params)
    entry = promotion.reconcile(held)
    if entry is None:
        raise UserError(f"{held.model} has no {CHAMPION} at {params.tracking.uri}")
    with stage.fresh(bundle.FOLDER) as made:
        bring(held, entry.version, made)
    record = {"model": held.model, "version": entry.version, "bundle": entry.bundle}
    stage.write_json(RECORD, record)
    stage.say("champion", f"{held.model} version {entry.version}, bundle {entry.bundle[:12]}")


def bring(held: Registry, version: int, folder: Path) -> None:
    """Copy the bundle of a version into `folder`, which is empty.

    Raises UserError where it is not the bundle that was signed as this version.
    """
    import mlflow

    tags = held.version(version).tags
    wanted = str(tags["bundle"])
    if "signature" not in tags:
        raise UserError(
            f"{held.model} version {version} is not signed; register signs what it makes"
        )
    signing.check(held.statement(version, wanted), tags["signature"])
    with stage.scratch("champion") as scratch:
        mlflow.artifacts.download_artifacts(
            artifact_uri=f"models:/{held.model}/{version}", dst_path=str(scratch)
        )
        shutil.copytree(scratch / FILES, folder, dirs_exist_ok=True)
    found = stage.digest(folder)
    if found != wanted:
        raise UserError(
            f"{held.model} version {version} is damaged: its bundle is {found[:12]}, "
            f"expected {wanted[:12]}"
        )


if __name__ == "__main__":
    stage.main(run)
