"""champion: bring the champion's bundle from the registry, byte for byte.

in:   the version of <dataset.name> that the log of promotions names
out:  models/bundle/, whole and with the hash that the version names, or not at all;
      reports/champion/record.json
run:  python -m pipelines.deploy.champion
"""

from pathlib import Path

from pipelines import bundle, stage
from pipelines.deploy import promotion, registry
from pipelines.deploy.registry import CHAMPION
from pipelines.errors import UserError
from pipelines.params import Params

RECORD = Path("reports/champion/record.json")


def run(params: Params) -> None:
    held = registry.of(params)
    entry = promotion.reconcile(held)
    if entry is None:
        raise UserError(f"{held.model} has no {CHAMPION} at {params.tracking.uri}")
    with stage.fresh(bundle.FOLDER) as made:
        held.bring(entry.version, made)
    record = {"model": held.model, "version": entry.version, "bundle": entry.bundle}
    stage.write_json(RECORD, record)
    stage.say("champion", f"{held.model} version {entry.version}, bundle {entry.bundle[:12]}")


if __name__ == "__main__":
    stage.main(run)
