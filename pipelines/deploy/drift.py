"""drift: has the world moved away from what the bundle knows?

in:   models/bundle/ (bundle.json, reference.parquet), data/predictions/
out:  reports/drift/verdict.json
page: reports/drift/report.html (Evidently; for eyes, not tracked)
run:  dvc repro drift

Compares the newest rows that were scored with the bundle's reference: validation rows, which the
model was tuned on and never fitted to. Performance, predictions and labels decide.
Features are counted, but decide nothing: weather moves with every season. One that is empty in
either table is named, and left out of the page.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import bundle, metrics, stage, tables
from pipelines.params import Drift, Params

if TYPE_CHECKING:
    from evidently.core.report import Snapshot

PREDICTIONS = Path("data/predictions")
PAGE = Path("reports/drift/report.html")
VERDICT = Path("reports/drift/verdict.json")


def run(params: Params) -> None:
    contract = bundle.contract()
    reference = tables.read_file(bundle.FOLDER / bundle.REFERENCE)
    window = tables.read(PREDICTIONS)
    stage.say(
        "drift",
        f"{reference.num_rows:,} reference rows against {window.num_rows:,} of the newest window",
    )
    empty = [c["name"] for c in contract["columns"] if _empty(c["name"], reference, window)]
    report = compare(reference, window, contract, empty)
    measured = measure(report, reference, window, bundle.task(contract))
    measured["empty_features"] = empty
    outcome = judge(measured, params.drift)
    with stage.page(PAGE, VERDICT):
        with stage.whole(PAGE) as partial:
            report.save_html(str(partial))
        stage.write_json(VERDICT, outcome)
    stage.say("drift", "; ".join(outcome["reasons"]) or "no drift")


def _empty(name: str, *tables: pa.Table) -> bool:
    """Whether one of the tables holds no value of the column: then nothing measures how far it
    moved.
    """
    return any(pc.all(pc.is_null(table[name], nan_is_null=True)).as_py() for table in tables)


def compare(
    reference: pa.Table, window: pa.Table, contract: dict[str, Any], empty: Sequence[str] = ()
) -> "Snapshot":
    """Evidently's drift of the prediction and of every feature but the empty ones.

    Importing it takes seconds: only here.
    """
    import warnings

    warnings.filterwarnings("ignore")  # divisions by zero in columns that are nearly constant
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    columns = [c for c in contract["columns"] if c["name"] not in empty]
    categories = [c["name"] for c in columns if c["type"] == "string"]
    numbers = [c["name"] for c in columns if c["type"] != "string"] + [bundle.PREDICTION]
    definition = DataDefinition(categorical_columns=categories, numerical_columns=numbers)
    frames = (table.select(categories + numbers).to_pandas() for table in (window, reference))
    current, base = (Dataset.from_pandas(frame, definition) for frame in frames)
    # Distances, named: below 1,000 rows Evidently's defaults are p-values, which fall instead.
    preset = DataDriftPreset(num_method="wasserstein", cat_method="jensenshannon")
    return Report([preset]).run(current, base)


def measure(report: "Snapshot", reference: pa.Table, window: pa.Table, task: str) -> dict[str, Any]:
    """The numbers a verdict is made of, rounded to digits that repeat.

    auc and label_rate are of what is watched: the label; of classes the last one; of numbers those
    above the reference's median. loss is the log loss; of numbers the mean squared error over the
    variance of the reference's labels.
    """
    moves = [
        metric
        for metric in report.dict()["metrics"]
        if metric["config"]["type"].endswith(":ValueDrift")
    ]
    scores = {move["config"]["column"]: round(float(move["value"]), 4) for move in moves}
    thresholds = {move["config"]["column"]: move["config"]["threshold"] for move in moves}
    measured: dict[str, Any] = {"rows": {}, "auc": {}, "loss": {}, "label_rate": {}}
    known = reference["label"].to_numpy()
    middle, spread = np.median(known), known.var()
    for name, table in (("reference", reference), ("window", window)):
        label, prediction = table["label"].to_numpy(), bundle.answers(table)
        if task == "regression":
            event, loss = label > middle, float(np.mean((label - prediction) ** 2) / spread)
        else:
            event = metrics.outcome(label, prediction)
            loss = metrics.point(label, prediction, task)["log_loss"]
        measured["rows"][name] = table.num_rows
        measured["label_rate"][name] = round(float(event.mean()), 4)
        both = 0 < event.sum() < len(event)
        measured["auc"][name] = _auc(event, metrics.watched(prediction)) if both else None
        measured["loss"][name] = round(loss, 4)
    prediction_drift = scores.pop(bundle.PREDICTION)
    features = {name: score for name, score in scores.items() if score > thresholds[name]}
    return measured | {"prediction_drift": prediction_drift, "drifted_features": features}


def _auc(event: npt.NDArray[Any], watched: npt.NDArray[np.floating]) -> float:
    from sklearn.metrics import roc_auc_score

    return round(float(roc_auc_score(event, watched)), 4)


def judge(measured: dict[str, Any], limits: Drift) -> dict[str, Any]:
    """The verdict: `drift` where performance, predictions or labels moved beyond the limits, with
    reasons.
    """
    reasons = []
    before, now = measured["auc"]["reference"], measured["auc"]["window"]
    if before is not None and now is not None and before - now > limits.max_auc_fall:
        reasons.append(f"AUC fell from {before} to {now}; allowed {limits.max_auc_fall}")
    before, now = measured["loss"]["reference"], measured["loss"]["window"]
    if now - before > limits.max_loss_rise:
        reasons.append(f"loss rose from {before} to {now}; allowed {limits.max_loss_rise}")
    if measured["prediction_drift"] > limits.max_prediction_drift:
        reasons.append(
            f"predictions moved by {measured['prediction_drift']}; "
            f"allowed {limits.max_prediction_drift}"
        )
    before, now = measured["label_rate"]["reference"], measured["label_rate"]["window"]
    if abs(now - before) > limits.max_label_shift:
        reasons.append(f"label rate moved from {before} to {now}; allowed {limits.max_label_shift}")
    return measured | {"drift": bool(reasons), "reasons": reasons}


if __name__ == "__main__":
    stage.main(run)
