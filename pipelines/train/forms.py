"""forms: the network as it was fitted, and smaller ones made of it, of which one is packaged.

A form of package.forms is made, exported and measured on the validation rows. Of those whose loss
is at most package.max_loss_rise above that of the plain network, itself among them, the one of the
fewest bytes is chosen. Bytes and losses repeat, milliseconds do not: these are shown, and
decide nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa

from pipelines import bundle, metrics, quantize, stage
from pipelines.params import Params
from pipelines.train import data
from pipelines.train.data import Rows
from pipelines.train.fitted import Fitted
from pipelines.train.markdown import table

PLAIN = "plain"
ASKED = (1, 1000)  # rows of an answer that is timed, so often
REPEATS = 20
Export = Callable[[Fitted], onnx.ModelProto]
Contract = dict[str, Any]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A network, its export in floats, and what of it is packaged: for int8 another graph."""

    network: Fitted
    exported: onnx.ModelProto
    packaged: onnx.ModelProto


@dataclass(frozen=True)
class Choice:
    """The name of the form that is packaged, and all forms by name, the plain one first.

    figures: what of each repeats, and milliseconds: what an answer takes, for ASKED rows; both
    empty where there was nothing to choose.
    """

    name: str
    forms: dict[str, Form]
    figures: dict[str, Figures] = field(default_factory=dict)
    milliseconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def form(self) -> Form:
        return self.forms[self.name]

    @property
    def verdict(self) -> dict[str, Any]:
        """What the stage's verdict says of it."""
        return {"form": self.name, "forms": self.figures} if self.figures else {}


def exported(model: Fitted, export: Export) -> Form:
    """A network that is packaged as it is exported."""
    graph = export(model)
    return Form(model, graph, graph)


def make(
    params: Params, plain: Form, export: Export, contract: Contract, val: pa.Table, scratch: Path
) -> dict[str, Form]:
    """The plain form, and those of package.forms made of it, by name.

    val: the raw columns of the validation rows. Raises UserError for a form that fit.model cannot
    take.
    """
    asked, made = params.package.forms, {PLAIN: plain}
    if "int8" in asked:
        small = quantize.quantized(plain.exported, contract, val)
        made["int8"] = Form(plain.network, plain.exported, small)
    if trained := [name for name in asked if name != "int8"]:
        encoding = plain.network.encoding
        train, held = (data.materialise(encoding, one, scratch) for one in ("train", "val"))
        for name in trained:
            network = _trained(name, plain.network, params, train, held, scratch / name)
            made[name] = exported(network, export)
    return {name: made[name] for name in (PLAIN, *asked)}


def _trained(
    name: str, model: Fitted, params: Params, train: Rows, val: Rows, scratch: Path
) -> Fitted:
    """The pruned or the distilled network, calibrated on the validation rows."""
    # Here, since Lightning takes seconds to import.
    from pipelines.train import distillation, pruning
    from pipelines.train.fit import repeatable, train_model

    # Package is one process, whatever fit was.
    alone = params.fit.trainer.model_copy(update={"devices": 1, "nodes": 1})
    fit = params.fit.model_copy(update={"trainer": alone})
    repeatable(fit)
    begin = None
    if name == "pruned":
        asked = params.package.pruned
        begin, fit = pruning.pruned(model.network.model, model.encoding, fit, train, asked.share)
        fit = pruning.shorter(fit, asked.epochs)
    else:
        train = distillation.taught(model, train, scratch / "taught")
        fit = distillation.student(fit, params.package.distilled)
    stage.say("package", f"the {name} network learns")
    trained = train_model(model.encoding, train, val, fit, scratch, begin=begin).model
    trained.network.eval()
    return trained


def choose(
    forms: dict[str, Form], contract: Contract, val: pa.Table, max_loss_rise: float
) -> Choice:
    """Measure every form on the validation rows, and choose."""
    figures = {name: measured(form, contract, val) for name, form in forms.items()}
    task = bundle.task(contract)
    allowed = max_loss_rise * metrics.unit(val[contract["label"]].to_numpy(), task)
    name = smallest(figures, metrics.TASKS[task].loss, allowed)
    return Choice(name, forms, figures, milliseconds(forms, contract, val))


def measured(form: Form, contract: Contract, val: pa.Table) -> Figures:
    """Bytes, and quality on the validation rows: what repeats."""
    size = len(form.packaged.SerializeToString())
    label = val[contract["label"]].to_numpy()
    answers = scorer(form.packaged, contract).predict(val)
    return {"bytes": size} | metrics.point(label, answers, bundle.task(contract))


def smallest(figures: dict[str, Figures], loss: str, allowed: float) -> str:
    """The form of the fewest bytes among those whose `loss` rises no more than `allowed`; of
    equals the first. Notes beside the figures of each whether it is `within`.
    """
    least = figures[PLAIN][loss]
    for one in figures.values():
        # Of rounded figures the difference is not round.
        one["within"] = round(one[loss] - least, metrics.DIGITS) <= allowed
    within = [name for name, one in figures.items() if one["within"]]
    return min(within, key=lambda name: figures[name]["bytes"])


def milliseconds(
    forms: dict[str, Form], contract: Contract, val: pa.Table
) -> dict[str, list[float]]:
    """The median time of an answer of each form for each number of ASKED rows, on one thread. They
    are asked in turn, so that a busy moment of the machine is no form's own.
    """
    scorers = [scorer(form.packaged, contract) for form in forms.values()]
    asked = [val.take(pa.array(np.arange(count) % val.num_rows)) for count in ASKED]
    # Shape (repeats, forms, numbers of rows).
    spent = [[[_spent(one, rows) for rows in asked] for one in scorers] for _ in range(REPEATS)]
    medians = np.median(np.array(spent), axis=0)
    return dict(zip(forms, medians.tolist(), strict=True))


def _spent(one: bundle.Scorer, rows: pa.Table) -> float:
    begun = time.perf_counter()
    one.predict(rows)
    return 1000 * (time.perf_counter() - begun)


def scorer(model: onnx.ModelProto, contract: Contract) -> bundle.Scorer:
    """What answers as a bundle of this network will."""
    return bundle.Scorer(contract, bundle.open_session(model.SerializeToString()))


def page(choice: Choice) -> str:
    """How the forms compare, as a table in Markdown."""
    names = [name for name in choice.figures[PLAIN] if name not in ("bytes", "within")]
    head = ["form", "bytes", *(f"ms, rows: {rows:,}" for rows in ASKED)]
    head += [*map(metrics.title, names), "within", "packaged"]
    lines = []
    for form, held in choice.figures.items():
        cells = [form, f"{held['bytes']:,}"]
        cells += [f"{spent:.2f}" for spent in choice.milliseconds[form]]
        cells += [f"{held[name]:.4f}" for name in names]
        yes = "yes" if held["within"] else "no"
        lines.append([*cells, yes, "yes" if form == choice.name else ""])
    said = "On the validation rows; times on one thread of this machine."
    return "\n".join([said, "", *table(head, lines), ""])
