"""evaluate: how good is the model, where, against what, and is it honest?

in:   models/fit/, data/features/
out:  reports/evaluate/verdict.json: metrics with bootstrap intervals, the same for gradient
      boosting on the same rows, figures by month and by slice, how far slices lie apart, behaviour
      checks, the leak canary, and the verdict with its reasons
page: reports/evaluate/evaluate.png (for eyes, not tracked)
run:  dvc repro evaluate

A leak fails the stage: a feature known after prediction time, one that predicts alone, or a model
of the canary groups that is too good. A model that is merely not good enough gets `passed: false`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from pipelines import metrics, stage, tables
from pipelines.errors import UserError
from pipelines.params import Evaluate, Params
from pipelines.train import data, fitted
from pipelines.train.data import Encoding, Rows
from pipelines.train.fitted import Fitted

if TYPE_CHECKING:
    from pipelines.params import Dataset

PAGE = Path("reports/evaluate/evaluate.png")
VERDICT = Path("reports/evaluate/verdict.json")
FEW = 500  # rows of a slice below which a share says little
Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Predictions = npt.NDArray[np.floating]


def run(params: Params) -> None:
    stop_on_late_knowledge()
    model = fitted.load()
    with stage.scratch("evaluate") as scratch:
        splits = {
            name: data.materialise(model.encoding, name, scratch / "all")
            for name in ("train", "val", "test")
        }
        test = splits["test"]
        label, task = test.labels, metrics.TASKS[params.dataset.target.task]
        stop_on_single_leak(test, model.encoding, params.evaluate.leak_auc)
        canary = canary_auc(params, scratch)
        stage.say("evaluate", f"leak canary: AUC {canary:.3f}, allowed {params.evaluate.leak_auc}")
        if canary > params.evaluate.leak_auc:
            raise UserError(
                f"{data.FEATURES}: {' and '.join(params.dataset.canary)} features alone reach AUC "
                f"{canary:.3f}; above evaluate.leak_auc = {params.evaluate.leak_auc} they hold an "
                "outcome"
            )
        prediction = model.predict(test)
        behaviour = behave(model, test, params.dataset, params.evaluate)
        stage.say("evaluate", f"gradient boosting on {len(splits['train']):,} rows")
        boosted = baseline(splits, model.encoding, params.evaluate, params.fit.seed)
    resamples, seed = params.evaluate.resamples, params.fit.seed
    columns = _test_columns([*params.dataset.slices, params.dataset.time])
    months = columns[params.dataset.time].astype("datetime64[M]").astype(str)  # in UTC
    threshold = None if task.name == "regression" else params.package.threshold
    sliced = {
        name: cut(label, prediction, columns[name].astype(str), task.name, threshold)
        for name in params.dataset.slices
    }
    outcome: dict[str, Any] = {
        "rows": {name: len(rows) for name, rows in splits.items()},
        "task": task.name,
        "metrics": metrics.with_intervals(label, prediction, resamples, seed, task.name),
        "baseline": metrics.with_intervals(label, boosted, resamples, seed, task.name),
        "months": cut(label, prediction, months, task.name, threshold),
        "slices": sliced,
        "fairness": {name: apart(values) for name, values in sliced.items()},
        "few": FEW,
        "behaviour": behaviour,
        "canary": {"auc": round(canary, 4), "allowed": params.evaluate.leak_auc},
        "reliability": metrics.reliability(
            metrics.outcome(label, prediction), metrics.watched(prediction)
        ),
    }
    outcome |= judge(outcome, task, params.evaluate)
    with stage.page(PAGE, VERDICT):
        draw(outcome, params.dataset.target.classes, PAGE)
        stage.write_json(VERDICT, outcome)
    ours, reference = (outcome[who][task.main]["value"] for who in ("metrics", "baseline"))
    verdict = "passed" if outcome["passed"] else "; ".join(outcome["reasons"])
    stage.say(
        "evaluate", f"{metrics.title(task.main)} {ours:.4f}, boosting {reference:.4f}: {verdict}"
    )


def stop_on_late_knowledge() -> None:
    """Raise UserError where a row knows something of after its prediction time."""
    for file, month in zip(
        tables.months(data.FEATURES),
        tables.read_months(data.FEATURES, ["prediction_time", "known_at"]),
        strict=True,
    ):
        late = pc.indices_nonzero(pc.greater(month["known_at"], month["prediction_time"]))
        if len(late):
            row = late[0].as_py()
            raise UserError(
                f"{file}: row {row + 1} knows something of {month['known_at'][row]}, after its "
                f"prediction time {month['prediction_time'][row]} ({len(late):,} such rows)"
            )


def stop_on_single_leak(test: Rows, encoding: Encoding, allowed: float) -> None:
    """Raise UserError where one number alone surely orders the rows better than `allowed`: with
    few rows one of many numbers does so by chance.
    """
    event = happened(test, encoding)
    positives = int(event.sum())
    for at, name in enumerate(encoding.numbers):
        column = np.nan_to_num(np.asarray(test.arrays[1][:, at], np.float64), nan=-1e9)
        auc = metrics.point(event, _ranks(column))["auc"]
        auc = max(auc, 1 - auc)
        if metrics.auc_at_least(auc, positives, len(event) - positives) > allowed:
            raise UserError(
                f"{data.FEATURES}: feature {name} alone reaches AUC {auc:.3f}; surely above "
                f"evaluate.leak_auc = {allowed} it holds an outcome"
            )


def happened(rows: Rows, encoding: Encoding) -> Labels:
    """0 or 1 by row, for whatever task: the label; of classes the last one; of numbers those above
    their median.
    """
    label, target = rows.labels, encoding.target
    if target.task == "regression":
        return np.asarray(label > np.median(label), np.int64)
    return np.asarray(label == max(1, len(target.classes) - 1), np.int64)


def _ranks(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Dense ranks scaled to [0, 1]: a score with the same order."""
    distinct, place = np.unique(values, return_inverse=True)
    return place / max(1, len(distinct) - 1)


def canary_auc(params: Params, scratch: Path) -> float:
    """Test AUC of the same model on the canary groups alone, trained for evaluate.canary_epochs."""
    from pipelines.train.fit import train_model

    groups = [params.dataset.features.root[name] for name in params.dataset.canary]
    encoding = data.learn(
        [name for group in groups for name in group.categories],
        [name for group in groups for name in group.numbers],
        params.dataset.target,
    )
    rows = {
        name: data.materialise(encoding, name, scratch / "canary")
        for name in ("train", "val", "test")
    }
    alone = params.fit.trainer.model_copy(update={"devices": 1, "nodes": 1})
    short = params.fit.model_copy(
        update={"max_epochs": params.evaluate.canary_epochs, "trainer": alone}
    )
    stage.say("evaluate", f"the leak canary learns from {len(encoding.columns)} features")
    model = train_model(encoding, rows["train"], rows["val"], short, scratch).model
    found = metrics.watched(model.predict(rows["test"]))
    return metrics.point(happened(rows["test"], encoding), _ranks(found))["auc"]


def baseline(
    splits: Mapping[str, Rows], encoding: Encoding, limits: Evaluate, seed: int
) -> npt.NDArray[np.float64]:
    """Test predictions of scikit-learn's histogram gradient boosting: same features, rows and
    stopping rule.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    numeric = encoding.target.task == "regression"
    boosting = (HistGradientBoostingRegressor if numeric else HistGradientBoostingClassifier)(
        max_iter=limits.baseline_iterations,
        learning_rate=0.1,
        # Bins hold at most 255 codes; a larger category is left as an ordered number.
        categorical_features=[
            at
            for at in range(len(encoding.vocabulary))
            if int(splits["train"].arrays[0][:, at].max()) < 255
        ],
        early_stopping=True,
        random_state=seed,
    )
    boosting.fit(
        matrix(splits["train"]),
        splits["train"].labels,
        X_val=matrix(splits["val"]),
        y_val=splits["val"].labels,
    )
    rows = matrix(splits["test"])
    if isinstance(boosting, HistGradientBoostingRegressor):
        return boosting.predict(rows)  # type: ignore[no-any-return]
    found = boosting.predict_proba(rows)
    return found[:, 1] if encoding.target.task == "binary" else found  # type: ignore[no-any-return]


def matrix(rows: Rows) -> npt.NDArray[np.float32]:
    """Shape (rows, categories + numbers), as boosting takes them."""
    return np.concatenate([rows.arrays[0], rows.arrays[1]], axis=1, dtype=np.float32)


def _test_columns(names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """Columns of the test rows."""
    wanted = list(dict.fromkeys([*names, "split"]))
    read = tables.read_months(data.FEATURES, wanted)
    parts = [month.filter(pc.equal(month["split"], "test")) for month in read]
    return {name: np.concatenate([part[name].to_numpy() for part in parts]) for name in names}


def cut(
    label: Floats,
    prediction: Predictions,
    values: npt.NDArray[Any],
    task: str,
    threshold: float | None,
) -> dict[str, dict[str, float | None]]:
    """Figures for the rows of each value. From the threshold on, where there is one, a row is
    flagged; caught are those of what is watched, false alarms the others (null where there is no
    such row).
    """
    found: dict[str, dict[str, float | None]] = {}
    watched, happened = metrics.watched(prediction), metrics.outcome(label, prediction)
    for value in np.unique(values):
        rows = values == value
        figures = {"mean_label": _share(happened, rows), "mean_prediction": _share(watched, rows)}
        if threshold is not None:
            flagged = watched >= threshold
            figures |= {
                "flagged": _share(flagged, rows),
                "caught": _share(flagged, rows & (happened == 1)),
                "false_alarms": _share(flagged, rows & (happened == 0)),
            }
        found[str(value)] = {
            "rows": int(rows.sum()),
            **figures,
            **metrics.point(label[rows], prediction[rows], task),
        }
    return found


def _share(values: npt.NDArray[Any], rows: npt.NDArray[np.bool_]) -> float | None:
    return round(float(values[rows].mean()), metrics.DIGITS) if rows.any() else None


def apart(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How far the values of a slice lie apart, largest less smallest of those with FEW rows or more
    (null of fewer than two): in the share that is flagged (demographic parity), that is caught
    (equal opportunity), of false alarms (with that, equalised odds; Hardt et al., "Equality of
    Opportunity in Supervised Learning", 2016), and in how far the mean prediction is from the mean
    label.
    """
    many = {name: held for name, held in values.items() if held["rows"] >= FEW}
    found: dict[str, Any] = {"values": len(many), "left_out": len(values) - len(many)}
    for figure in ("flagged", "caught", "false_alarms"):
        shares = [held[figure] for held in many.values() if held.get(figure) is not None]
        found[figure] = round(max(shares) - min(shares), metrics.DIGITS) if shares[1:] else None
    gaps = [held["mean_prediction"] - held["mean_label"] for held in many.values()]
    found["calibration"] = round(max(gaps) - min(gaps), metrics.DIGITS) if gaps[1:] else None
    return found


def behave(model: Fitted, test: Rows, dataset: "Dataset", limits: Evaluate) -> list[dict[str, Any]]:
    """What must hold of the mean risk when a column is changed, on every test row."""
    before = mean_risk(model, test)
    unit = metrics.unit(test.labels, model.encoding.target.task)
    checks = []
    for name, added in dataset.behaviour.raises.items():
        after = mean_risk(model, test, add=added)
        checks.append({"name": name, "before": before, "after": after, "passed": after >= before})
    for name, columns in dataset.behaviour.missing.items():
        after = mean_risk(model, test, missing=columns)
        allowed = round(float(unit * limits.max_missing_shift), metrics.DIGITS)
        passed = abs(after - before) <= allowed
        checks.append(
            {"name": name, "before": before, "after": after, "allowed": allowed, "passed": passed}
        )
    return checks


@torch.inference_mode()
def mean_risk(
    model: Fitted,
    rows: Rows,
    add: Mapping[str, float] | None = None,
    missing: list[str] | None = None,
) -> float:
    """The mean of what is watched, with `add` added to some numbers and others taken away."""
    total = 0.0
    for codes, numbers, _ in rows.batches():
        for name, value in (add or {}).items():
            numbers[:, model.encoding.numbers.index(name)] += value
        for name in missing or []:
            numbers[:, model.encoding.numbers.index(name)] = torch.nan
        total += float(metrics.watched(model.network(codes, numbers).double().numpy()).sum())
    return round(total / len(rows), metrics.DIGITS)


def judge(outcome: dict[str, Any], task: metrics.Task, limits: Evaluate) -> dict[str, Any]:
    """Whether the model is good enough, and every reason why it is not."""
    model, boosted = outcome["metrics"], outcome["baseline"]
    reasons = []
    if "auc" in model and model["auc"]["value"] < limits.min_auc:
        reasons.append(
            f"AUC {model['auc']['value']:.4f} is below evaluate.min_auc = {limits.min_auc}"
        )
    # Of numbers it is in their unit, of which a share says nothing.
    gap = model["calibration_error"]["value"]
    if task.name != "regression" and gap > limits.max_calibration_error:
        reasons.append(
            f"calibration error {gap:.4f} is above "
            f"evaluate.max_calibration_error = {limits.max_calibration_error}"
        )
    for name in task.compared:
        end, _ = metrics.ends(name)
        value, reached = model[name]["value"], boosted[name][end]
        if metrics.sign(name) * (value - reached) < 0:
            side = "below" if value < reached else "above"
            what = f"the baseline's interval, whose {end} end is {reached:.4f}"
            reasons.append(f"{name} {value:.4f} is {side} {what}")
    reasons += [
        f"behaviour: {check['name']}" for check in outcome["behaviour"] if not check["passed"]
    ]
    return {"passed": not reasons, "reasons": reasons}


def draw(outcome: dict[str, Any], classes: Sequence[str], path: Path) -> None:
    """One picture: calibration (of classes, the last one's), the figures beside the baseline's, and
    AUC by slice.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a class or a slice may have a dollar
    import matplotlib.pyplot as plt

    names = list(outcome["metrics"])
    figure = plt.figure(figsize=(15, 5), layout="constrained")
    grid = figure.add_gridspec(len(names), 3)
    left, right = (figure.add_subplot(grid[:, column]) for column in (0, 2))
    points = outcome["reliability"]
    left.axline((0, 0), slope=1, color="0.8", linewidth=1)
    left.plot(
        [p["prediction"] for p in points], [p["label"] for p in points], "o-", color="tab:blue"
    )
    ends = [end for p in points for end in (p["prediction"], p["label"])]
    low, top = min(0, *ends), 1.1 * max(ends)
    left.set(
        title="Calibration on the test rows" + "".join(f": {name}" for name in classes[-1:]),
        xlabel="predicted",
        ylabel="observed",
        xlim=(low, top),
        ylim=(low, top),
    )

    for at, name in enumerate(names):
        axis = figure.add_subplot(grid[at, 1])
        for row, (who, color) in enumerate((("baseline", "tab:orange"), ("metrics", "tab:blue"))):
            found = outcome[who][name]
            # Drawn apart: with few resamples a point may lie outside its interval.
            axis.hlines(row, found["low"], found["high"], colors=color)
            axis.plot(found["value"], row, "o", color=color)
        better = "more" if metrics.sign(name) > 0 else "less"
        axis.set(ylim=(-0.6, 1.6), yticks=(0, 1), yticklabels=("gradient boosting", "model"))
        axis.set_title(f"{metrics.title(name)}, 95 % ({better} is better)", fontsize="small")
        axis.tick_params(labelsize=7)

    main = metrics.TASKS[outcome["task"]].main
    bars = [
        (f"{value}", cut[main])
        for part in outcome["slices"].values()
        for value, cut in part.items()
        if cut["rows"] >= FEW
    ]
    right.barh([name for name, _ in bars], [one for _, one in bars], color="tab:blue", alpha=0.7)
    right.axvline(outcome["metrics"][main]["value"], color="0.3", linewidth=1)
    right.set(title=f"{metrics.title(main)} by slice of {FEW} rows or more (line: all)")
    if main == "auc":
        right.set_xlim(0.5, 1)
    right.tick_params(axis="y", labelsize=7)
    right.invert_yaxis()
    with stage.whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)


if __name__ == "__main__":
    stage.main(run)
