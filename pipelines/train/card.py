"""card: what whoever meets the model has to know, filled from what the stages before it found.

in:   models/bundle/, reports/{validate,evaluate,package}/verdict.json, the dataset's contract.yaml
out:  reports/model_card.md
page: reports/model_card.html, with the picture of evaluate (for eyes, not tracked)
run:  dvc repro card

After Mitchell et al., "Model Cards for Model Reporting", 2019. Nobody writes it: purpose, uses and
limits are the contract's, every figure is a verdict's, and what moves the model most is explained
on rows of the bundle's reference (pipelines/explain.py).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import bundle, explain, metrics, stage, tables
from pipelines import params as parameters
from pipelines.errors import UserError
from pipelines.explain import Explained, Floats
from pipelines.params import Contract, Params
from pipelines.train.markdown import table

CARD = Path("reports/model_card.md")
PAGE = Path("reports/model_card.html")
VERDICTS = ("validate", "evaluate", "package")
# Rows of the reference, and orders of the columns on each.
ROWS, ORDERS = 300, 8
SHOWN = 15
CLASSES = (
    "Mean prediction and mean label are of the class that is watched; the calibration error is the "
    "mean of all classes."
)
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}img{max-width:100%}"
    "td,th{padding:.2rem .8rem;text-align:left;border-bottom:1px solid #ddd}"
)
Verdicts = Mapping[str, Any]


def run(params: Params) -> None:
    name = params.dataset.name
    where = Path("pipelines/ingest/datasets") / name / "contract.yaml"
    contract = parameters.checked(where, Contract)
    target = params.dataset.target.column
    if target not in contract.purpose:
        raise UserError(f"{where}: purpose: {target}, which dataset.target names, has no question")
    verdicts = {one: stage.read_json(Path(f"reports/{one}/verdict.json")) for one in VERDICTS}
    scorer = bundle.load(bundle.FOLDER)
    text = "\n".join(
        [
            f"# Model card: {name}",
            *_purpose(contract, target, scorer.contract, verdicts["evaluate"]),
            *_data(contract, scorer.contract, verdicts),
            *_figures(verdicts["evaluate"], scorer.contract),
            *_slices(verdicts["evaluate"], scorer.contract),
            *_behaviour(verdicts["evaluate"]),
            *_moving(scorer),
            *_made(scorer.contract, verdicts["package"]),
            "",
        ]
    )
    with stage.whole(CARD) as partial:
        partial.write_text(text, encoding="utf-8")
    with stage.page(PAGE, CARD), stage.whole(PAGE) as partial:
        partial.write_text(page(text, f"Model card: {name}"), encoding="utf-8")
    stage.say("card", f"{CARD}, and as a page {PAGE}")


def page(text: str, title: str) -> str:
    """The card as one HTML page; nothing in it is taken for HTML."""
    import html

    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    picture = '<p><img src="evaluate/evaluate.png" alt="calibration, figures, slices"></p>'
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return (
        f'<!doctype html><html lang="en"><head>{head}</head><body>{body}{picture}</body></html>\n'
    )


def _purpose(
    contract: Contract, target: str, made: Mapping[str, Any], verdict: Verdicts
) -> list[str]:
    said = "**passed every check**"
    if not verdict["passed"]:
        said = f"**did not pass**: {'; '.join(verdict['reasons'])}"
    return [
        "",
        f"{contract.purpose[target]} {_meaning(made)} As of {made['as_of'][:10]} it {said}. "
        f"{contract.owner} answers for it.",
        *_section("Use"),
        *(f"- {use}" for use in contract.uses),
        *_section("Limits"),
        *(f"- {limit}" for limit in contract.limits),
    ]


def _meaning(made: Mapping[str, Any]) -> str:
    """What the prediction is."""
    task = bundle.task(made)
    if task == "regression":
        return "It says that number."
    if task == "multiclass":
        return f"It says how likely each is of {', '.join(made['classes'])}; the last is watched."
    return f"It says how likely that is; from {made['threshold']} on it may be called so."


def _data(contract: Contract, made: Mapping[str, Any], verdicts: Verdicts) -> list[str]:
    rows, seen = verdicts["evaluate"]["rows"], verdicts["validate"]
    days = made["params"]["featurize"]
    personal = [name for name, column in contract.events.items() if column.pii != "none"]
    return [
        *_section("Data"),
        f"{seen['rows']:,} events, of which {seen['quarantined']:,} broke an expectation and were "
        f"left out. {rows['train']:,} rows to learn from, the {days['val_days']} days after them "
        f"({rows['val']:,} rows) to choose and calibrate, the last {days['test_days']} "
        f"({rows['test']:,}) to measure. {len(made['columns'])} columns; personal: "
        f"{', '.join(personal) or 'none'}.",
    ]


def _figures(verdict: Verdicts, made: Mapping[str, Any]) -> list[str]:
    def told(figure: Mapping[str, float]) -> str:
        return f"{figure['value']:.4f} ({figure['low']:.4f} to {figure['high']:.4f})"

    names = metrics.TASKS[verdict["task"]].names
    ours, boosted = verdict["metrics"], verdict["baseline"]
    lines = [[metrics.title(name), told(ours[name]), told(boosted[name])] for name in names]
    worse = [metrics.title(name) for name in names if _is_worse(name, ours[name], boosted[name])]
    said = f" Gradient boosting is surely better in {', '.join(worse)}." if worse else ""
    return [
        *_section("Figures"),
        "On the test rows, with 95 % intervals, beside scikit-learn's gradient boosting, which is "
        f"not tuned.{said}{_form(made)}",
        "",
        *table(["", "model", "gradient boosting"], lines),
        *_section("Calibration by month"),
        *([CLASSES, ""] if verdict["task"] == "multiclass" else []),
        *_cuts("month", verdict["months"], verdict["task"]),
    ]


def _is_worse(name: str, model: Mapping[str, float], baseline: Mapping[str, float]) -> bool:
    """Whether the whole interval of the baseline is better than that of the model."""
    bad, good = metrics.ends(name)
    return metrics.sign(name) * (model[good] - baseline[bad]) < 0


def _form(made: Mapping[str, Any]) -> str:
    """Said where the bundle holds another network than the one that evaluate measured."""
    if "form" not in made:
        return ""
    task = metrics.TASKS[bundle.task(made)]
    told = " and ".join(
        f"{metrics.title(name)} {made['metrics'][name]:.4f}"
        for name in dict.fromkeys([task.main, task.loss])
    )
    return (
        f" They are of the network as it was fitted; the bundle holds its form {made['form']}, "
        f"which has {told} there."
    )


def _cuts(by: str, values: Verdicts, task: str, few: int = 0) -> list[str]:
    """A line for each value; one of fewer than `few` rows has its rows alone."""
    figures = ("mean_prediction", "mean_label", "calibration_error", metrics.TASKS[task].main)
    lines = []
    for name, held in values.items():
        told = [_told(held[figure] if held["rows"] >= few else None) for figure in figures]
        lines.append([name, f"{held['rows']:,}", *told])
    return table([by, "rows", *map(metrics.title, figures)], lines)


def _slices(verdict: Verdicts, made: Mapping[str, Any]) -> Iterator[str]:
    threshold = None if verdict["task"] == "regression" else made["threshold"]
    names = {"values": "values", "left_out": "left out", "calibration": "prediction less label"}
    if threshold is not None:
        names |= {"flagged": "flagged", "caught": "caught", "false_alarms": "false alarms"}
    lines = [
        [column, *(_told(gaps[name]) for name in names)]
        for column, gaps in verdict["fairness"].items()
    ]
    header = ["cut by", *names.values()]
    few = verdict["few"]
    yield from _section("How far slices lie apart")
    yield (
        f"The largest value less the smallest, of those with {few} rows or more; of fewer nothing "
        "is said."
    )
    if threshold is not None:
        yield (
            f"Flagged: the share from {threshold} on; caught: of those that were; false alarms: of "
            "those that were not."
        )
    yield ""
    yield from table(header, lines)
    for column, values in verdict["slices"].items():
        yield from _section(f"By {column}")
        yield from _cuts(column, values, verdict["task"], few)


def _told(value: float | None) -> str:
    """A count, a share, or nothing."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _behaviour(verdict: Verdicts) -> list[str]:
    lines = [
        [
            one["name"] + (f" (at most {one['allowed']:.4f} away)" if "allowed" in one else ""),
            f"{one['before']:.4f}",
            f"{one['after']:.4f}",
            "yes" if one["passed"] else "no",
        ]
        for one in verdict["behaviour"]
    ]
    return [
        *_section("Behaviour"),
        "What should raise the mean of what is foretold must not lower it; without a reading it "
        "must stay near where it was (`evaluate.max_missing_shift`).",
        "",
        *table(["change", "mean before", "after", "holds"], lines),
    ]


def _moving(scorer: bundle.Scorer) -> list[str]:
    """The columns that move predictions most."""
    reference = tables.read_file(bundle.FOLDER / bundle.REFERENCE)
    rows: pa.Table = reference.take(pa.array(tables.spaced(reference.num_rows, ROWS)))
    # Each from other rows and orders, so that chance does not lift the same column in all.
    found = [
        explain.explain(scorer, rows.slice(at, 1), reference, ORDERS, seed=at)
        for at in range(rows.num_rows)
    ]
    sizes, errors = size(found)
    names = [column["name"] for column in scorer.contract["columns"]]
    first = np.argsort(-sizes, kind="stable")[:SHOWN]
    return [
        *_section("What moves it most"),
        "The size (root mean square) of what a column adds to the prediction, with its standard "
        f"error, on {rows.num_rows} rows of the reference. Of one row: `python -m "
        "pipelines.explain`.",
        "",
        *table(
            ["column", "adds"], [[names[at], f"{sizes[at]:.3f} ± {errors[at]:.3f}"] for at in first]
        ),
    ]


def size(found: Sequence[Explained]) -> tuple[Floats, Floats]:
    """(columns,) the root of the mean square of what each adds, and its standard error to first
    order.
    """
    added, noise = (
        np.array([getattr(one, name) for one in found]) for name in ("contributions", "errors")
    )
    # An estimate's own error makes its square larger.
    squares = added**2 - noise**2
    sizes = np.sqrt(np.maximum(squares.mean(axis=0), 0.0))
    spread = squares.std(axis=0, ddof=1) / math.sqrt(len(found))
    return sizes, spread / np.maximum(2 * sizes, np.sqrt(spread))


def _made(made: Mapping[str, Any], verdict: Verdicts) -> list[str]:
    fit = made["params"]["fit"]
    lines = [[name, json.dumps(value)] for name, value in _leaves("fit", fit)]
    lines += [
        ["bundle", stage.digest(bundle.FOLDER)[:12]],
        ["model.onnx", f"{verdict['model_bytes']:,} bytes"],
        ["ONNX Runtime and torch differ by at most", f"{verdict['parity']:.0e}"],
    ]
    return [*_section("How it was made"), *table(["", ""], lines)]


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every value below, by its key in params.yaml."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(f"{name}.{key}", inner)


def _section(title: str) -> list[str]:
    return ["", f"## {title}", ""]


if __name__ == "__main__":
    stage.main(run)
