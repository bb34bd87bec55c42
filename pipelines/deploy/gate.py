"""gate: may the registered version be released? An effect: the verdict is written on the version.

in:   models/bundle/, reports/evaluate/verdict.json
out:  tags `gate` and `gate_reason` of the version; reports/gate/record.json; exit 2 where it may
      not be released
run:  python -m pipelines.deploy.gate
"""

from pathlib import Path

from pipelines import bundle, stage, tracking
from pipelines.deploy import register
from pipelines.errors import UserError
from pipelines.params import Params

VERDICT = Path("reports/evaluate/verdict.json")
RECORD = Path("reports/gate/record.json")


def run(params: Params) -> None:
    digest = stage.digest(bundle.FOLDER)
    outcome = stage.read_json(VERDICT)
    store, _ = tracking.client(params)
    name = params.dataset.name
    version = register.find(store, name, digest)
    if version is None:
        raise UserError(f"bundle {digest[:12]} is no version of {name}; register it first")
    passed = bool(outcome["passed"])
    verdict = "passed" if passed else "failed"
    reason = "; ".join(outcome["reasons"]) or "every check of evaluate passed"
    for key, value in {"gate": verdict, "gate_reason": reason}.items():
        store.set_model_version_tag(name, version.version, key, value)
    if not passed:
        raise UserError(f"{name} version {version.version} may not be released: {reason}")
    entry = {"model": name, "version": int(version.version), "gate": verdict, "reason": reason}
    stage.write_json(RECORD, entry)
    stage.say("gate", f"{name} version {version.version} {verdict}: {reason}")


if __name__ == "__main__":
    stage.main(run)
