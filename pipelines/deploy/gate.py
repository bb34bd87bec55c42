"""gate: may the registered version take the champion's place? An effect: the verdict is written on
the version.

in:   models/bundle/, data/features/, the verdicts of validate, evaluate and package, and the
      champion's bundle from the registry
out:  tags `gate`, `gate_reason`, `gate_against`, `gate_data` and `gate_evidence` (JSON) of the
      version; reports/gate/record.json; exit 2 where it may not
run:  python -m pipelines.deploy.gate

The checks of the run itself come first, then the budget of an answer on this machine. Then
challenger and champion score the same test rows, which neither was fitted or tuned on.
"""

import json
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import bundle, stage, tables
from pipelines.bundle import Scorer
from pipelines.deploy import comparison, promotion, registry
from pipelines.deploy.registry import Registry
from pipelines.errors import UserError
from pipelines.params import Gate, Params

OWN = ("validate", "evaluate", "package")
FEATURES = Path("data/features")
RECORD = Path("reports/gate/record.json")
REPEATS = 20


def run(params: Params) -> None:
    if not bundle.FOLDER.is_dir():
        raise UserError(f"{bundle.FOLDER} is missing; make it: make run")
    digest = stage.digest(bundle.FOLDER)
    task = bundle.task(bundle.contract())
    if task != "binary":
        raise UserError(f"{bundle.FOLDER}: its task is {task}; what is released is binary")
    held = registry.of(params)
    version = held.find(digest)
    if version is None:
        raise UserError(
            f"bundle {digest[:12]} is no version of {held.model}; register it: make run"
        )
    number = int(version.version)
    newest = promotion.reconcile(held)
    against = newest.version if newest and newest.version != number else None
    evidence, reasons = judge(held, params, against)
    passed = not reasons
    reason = "; ".join(reasons) or _praise(evidence)
    tags = {"gate": "passed" if passed else "failed", "gate_reason": reason,
            "gate_against": str(against or "none"), "gate_data": evidence["data"],
            "gate_evidence": json.dumps(evidence)}  # fmt: skip
    held.tag(number, tags)
    entry = {"model": held.model, "version": number, "bundle": digest, "against": against}
    entry |= {"gate": tags["gate"], "reason": reason, "evidence": evidence}
    stage.write_json(RECORD, entry)
    if not passed:
        raise UserError(f"{held.model} version {number} may not be released: {reason}")
    stage.say("gate", f"{held.model} version {number} passed: {reason}")


def judge(held: Registry, params: Params, against: int | None) -> tuple[dict[str, Any], list[str]]:
    """The evidence, and the reasons against the bundle in models/bundle/."""
    scorer = bundle.load(bundle.FOLDER)
    other = None if against is None else _champion(held, against)
    lacking = [] if other is None else _lacking(other)
    if lacking:
        other = None
    rows = test_rows(params, [one.contract for one in (scorer, other) if one is not None])
    evidence, reasons = own_verdicts(params)
    evidence["data"] = scorer.contract["data"]["features"]
    evidence["champion_lacks"] = lacking
    evidence["cost"], dear = cost(scorer, rows, params.gate)
    reasons += dear
    if other is None:
        return evidence, reasons
    new = rows.filter(pc.greater_equal(rows[params.dataset.time], pa.scalar(unseen_from(other))))
    if not new.num_rows:
        return evidence, [*reasons, f"version {against} was fitted on every one of the test rows"]
    found, worse = comparison.compare(_paired(new, scorer, other, params), params.gate)
    return evidence | {"comparison": found}, reasons + worse


def _lacking(scorer: Scorer) -> list[str]:
    """The columns that a bundle wants and the features of today lack: it can answer no more."""
    held = tables.footer(tables.months(FEATURES)[-1]).schema.names
    return [column["name"] for column in scorer.contract["columns"] if column["name"] not in held]


def _champion(held: Registry, version: int) -> Scorer:
    with stage.scratch("gate") as folder:
        held.bring(version, folder)
        return bundle.load(folder)


def own_verdicts(params: Params) -> tuple[dict[str, Any], list[str]]:
    """What the run itself found of its data, model and package."""
    data, model, package = (stage.read_json(Path(f"reports/{name}/verdict.json")) for name in OWN)
    quarantined = data["quarantined"] / max(1, data["rows"])
    evidence = {"quarantined": round(quarantined, 6), "parity": package["parity"]}
    reasons = [f"evaluate: {reason}" for reason in model["reasons"]]
    if quarantined > params.validate_.max_quarantine:
        reasons.append(f"validate: {quarantined:.2%} of the rows are in quarantine")
    if package["parity"] > params.package.parity:
        reasons.append(f"package: parity is {package['parity']}; allowed {params.package.parity}")
    return evidence, reasons


def test_rows(params: Params, contracts: Sequence[dict[str, Any]]) -> pa.Table:
    """The rows of the split test: time, label, slices, and the columns of all contracts."""
    wanted = [column["name"] for contract in contracts for column in contract["columns"]]
    names = list(dict.fromkeys([params.dataset.time, "label", *params.dataset.slices, *wanted]))
    parts = []
    for file in tables.months(FEATURES):
        rows = tables.read_file(file, list(dict.fromkeys([*names, "split"])))
        parts.append(rows.filter(pc.equal(rows["split"], "test")).select(names))
    return pa.concat_tables(parts)


def unseen_from(scorer: Scorer) -> datetime:
    """The first moment that a bundle was neither fitted nor tuned on."""
    days = scorer.contract["params"]["featurize"]["test_days"]
    return datetime.fromisoformat(scorer.contract["as_of"]) - timedelta(days=days)


def cost(scorer: Scorer, rows: pa.Table, limits: Gate) -> tuple[dict[str, float], list[str]]:
    """Milliseconds of one row and of a thousand, the best of some; megabytes of the bundle."""
    size = sum(file.stat().st_size for file in bundle.FOLDER.iterdir()) / 1e6
    found = {
        "row_ms": _milliseconds(scorer, rows.slice(0, 1)),
        "thousand_rows_ms": _milliseconds(scorer, rows.slice(0, 1000)),
        "bundle_mb": round(size, 3),
    }
    allowed = limits.model_dump()
    return found, [
        f"{name} is {value}; allowed {allowed[f'max_{name}']}"
        for name, value in found.items()
        if value > allowed[f"max_{name}"]
    ]


def _milliseconds(scorer: Scorer, rows: pa.Table) -> float:
    spent = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        scorer.predict(rows)
        spent.append(time.perf_counter() - begun)
    return round(min(spent) * 1e3, 3)


def _paired(rows: pa.Table, scorer: Scorer, other: Scorer, params: Params) -> comparison.Rows:
    days = pc.day_of_year(rows[params.dataset.time]).to_numpy()
    years = pc.year(rows[params.dataset.time]).to_numpy()
    _, day = np.unique(years * 1000 + days, return_inverse=True)
    return comparison.Rows(
        label=rows["label"].to_numpy(),
        champion=other.predict(rows).astype(np.float64),
        challenger=scorer.predict(rows).astype(np.float64),
        day=day,
        slices={
            name: rows[name].cast(pa.string()).fill_null("").to_numpy()
            for name in params.dataset.slices
        },
    )


def _praise(evidence: dict[str, Any]) -> str:
    if lacking := evidence["champion_lacks"]:
        return f"every check of its run passed; the champion wants {lacking[0]}, a feature no more"
    if "comparison" not in evidence:
        return "every check of its run passed, and there is no other champion"
    found = evidence["comparison"]
    gap = found["log_loss"]
    return (
        f"log loss {gap['value']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f}) against the "
        f"champion on {found['rows']:,} rows of {found['days']} days"
    )


if __name__ == "__main__":
    stage.main(run)
