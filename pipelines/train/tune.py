"""tune: are there better values of fit? An effect: the winner is a commit to params.yaml.

in:   data/features/ (train and validation rows; never the test rows), params.yaml as git holds it
out:  reports/tune/verdict.json (every trial, and why there is a winner or none) and tune.png;
      a commit of params.yaml alone, whose message is the evidence
log:  MLflow, a run of the study and below it one of each trial
run:  make tune; again, it goes on where it was stopped

tune.trials fits are drawn from tune.space by tune.workers processes; who falls behind is pruned.
Trials are compared on one seed, and the best of many is partly luck: so the best and the present
values are fitted on other seeds, and the best must win beyond the noise between those.
"""

import math
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import stage, tracking
from pipelines.errors import UserError
from pipelines.params import Fit, Params
from pipelines.train import data, study, trials, winner
from pipelines.train.trials import Job

if TYPE_CHECKING:
    from optuna import Study

VERDICT = Path("reports/tune/verdict.json")
PAGE = Path("reports/tune/tune.png")
SEEDS = 3
# Student's t for SEEDS pairs, one-sided, 95 %.
T = 2.92
DIGITS = 6  # of a loss


def run(params: Params) -> None:
    params = study.narrowed(params)
    before, present = winner.committed(), study.current(params)
    winner.checked(before, present)  # now, and not after hours
    if params.fit.trainer.devices > 1 or params.fit.trainer.nodes > 1:
        raise UserError("fit.trainer: a trial is one process; expected devices: 1 and nodes: 1")
    features = params.dataset.features
    with stage.scratch("tune") as rows:
        encoding = data.learn(features.categories, features.numbers, params.dataset.target)
        for split in trials.SPLITS:
            data.materialise(encoding, split, rows)
        name = study.named(params, encoding, rows)
        held = study.opened(params, name)
        study.prepare(held, params)
        done = len(study.trials(held, study.FINISHED))
        stage.say("tune", f"study {name}: {done} of {params.tune.trials} trials are done")
        with tracking.study(params, name) as above:
            job = Job(params, encoding, rows, name, above)
            trials.search(job, held)
            verdict = judged(job, held, present)
    with stage.page(PAGE, VERDICT):
        draw(verdict, PAGE)
        stage.write_json(VERDICT, verdict)
    if verdict["beats"]:
        changes = verdict["changes"]
        after = winner.checked(before, {key: new for key, (_, new) in changes.items()})
        print(winner.commit(before, after, message(verdict)), end="", flush=True)
    stage.say("tune", verdict["reason"])
    if verdict["beats"]:
        stage.say("tune", "params.yaml is committed; make run fits with it")


def judged(job: Job, held: "Study", present: dict[str, Any]) -> dict[str, Any]:
    """Every trial, and whether the best of them beats the present values."""
    fit = job.params.fit
    verdict: dict[str, Any] = {
        "study": job.study,
        "trials": [
            {
                "number": study.rank(held, one.number) + 1,
                "state": one.state.name.lower(),
                "value": one.value if one.state.name == "COMPLETE" else None,
                "values": one.user_attrs["values"],
            }
            for one in study.trials(held, study.FINISHED)
            if "values" in one.user_attrs
        ],
        "space": job.params.tune.space.model_dump(),
        "present": present,
        "beats": False,
    }
    best = study.best(held)
    values = present if best is None else best.user_attrs["values"]
    changes = {key: [present[key], new] for key, new in values.items() if new != present[key]}
    if not changes:
        return verdict | {"reason": "no trial is better than the present values: nothing changes"}
    seeds = [(fit.seed + more) % 2**32 for more in range(1, SEEDS + 1)]
    losses = {
        who: [_refitted(job, held, fit.changed(some), who, seed) for seed in seeds]
        for who, some in (("present", present), ("best", values))
    }
    number = None if best is None else study.rank(held, best.number) + 1
    return verdict | compared(losses, seeds) | {"best": number, "changes": changes}


def _refitted(job: Job, held: "Study", fit: Fit, who: str, seed: int) -> float:
    """The loss on another seed; the study remembers it."""
    other = fit.model_copy(update={"seed": seed})
    key = stage.digest_of({"fit": other.model_dump_json(exclude={"checkpoint"})})
    if key not in held.user_attrs:
        held.set_user_attr(key, trials.fitted_loss(job, other, f"{who}, seed {seed}"))
    loss = float(held.user_attrs[key])
    stage.say("tune", f"{who} values, seed {seed}: {loss:.4f}")
    return loss


def compared(losses: dict[str, list[float]], seeds: list[int]) -> dict[str, Any]:
    """Whether `best` is below `present` beyond the noise of the seeds: the end of the interval of
    the mean of pairs (Student 1908).
    """
    gains = [one - other for one, other in zip(losses["present"], losses["best"], strict=True)]
    gain = statistics.fmean(gains)
    surely = gain - T * statistics.stdev(gains) / math.sqrt(len(gains))
    means = {who: round(statistics.fmean(some), DIGITS) for who, some in losses.items()}
    figures = (
        f"validation loss {means['best']:.4f}, with the present values {means['present']:.4f} "
        f"(means of seeds {', '.join(map(str, seeds))}; best less present {-gain:+.4f}, with 95 % "
        f"confidence at most {-surely:+.4f})"
    )
    reason = (
        f"better: {figures}" if surely > 0 else f"not surely better, nothing changes: {figures}"
    )
    return {
        "seeds": seeds,
        "losses": losses,
        "means": means,
        "gain": round(gain, DIGITS),
        "surely": round(surely, DIGITS),
        "beats": surely > 0,
        "reason": reason,
    }


def message(verdict: dict[str, Any]) -> str:
    """The commit's message: what changes, and the evidence."""
    changes, losses = verdict["changes"], verdict["losses"]
    pruned = sum(one["state"] == "pruned" for one in verdict["trials"])
    table = [
        f"  {who:<8} {verdict['means'][who]:.6f}   {'  '.join(f'{one:.6f}' for one in losses[who])}"
        for who in ("present", "best")
    ]
    lines = [
        f"Set what tuning found better: {', '.join(changes)}",
        "",
        *(f"  {key}: {old} -> {new}" for key, (old, new) in changes.items()),
        "",
        f"Validation loss, mean and each of the seeds {', '.join(map(str, verdict['seeds']))}:",
        "",
        *table,
        "",
        f"Lower by {verdict['gain']}, with 95 % confidence by {verdict['surely']}.",
        f"Study {verdict['study']}: {len(verdict['trials'])} trials, {pruned} pruned; the best is "
        f"number {verdict['best']}.",
    ]
    return "\n".join(lines)


def draw(verdict: dict[str, Any], path: Path) -> None:
    """One picture: the trials in order with the best so far, and each key against the loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    keys = list(verdict["present"])
    columns = min(4, len(keys) + 1)
    rows = math.ceil((len(keys) + 1) / columns)
    size = (4.2 * columns, 3.4 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    first, *others = grid.flat
    complete = [one for one in verdict["trials"] if one["state"] == "complete"]
    losses = [one["value"] for one in complete]
    numbers = [one["number"] for one in complete]
    first.plot(numbers, losses, "o", color="tab:blue")
    lowest = [min(losses[: at + 1]) for at in range(len(losses))]
    first.step(numbers, lowest, where="post", color="tab:orange", label="best so far")
    for one in verdict["trials"]:
        if one["state"] == "pruned":
            first.axvline(one["number"], color="0.9", zorder=0)
    first.set(title="Trials (grey: pruned)", xlabel="trial", ylabel="validation loss")
    first.xaxis.set_major_locator(MaxNLocator(integer=True))
    first.legend()
    ranges, choices = verdict["space"]["ranges"], verdict["space"]["choices"]
    for key, axes in zip(keys, others, strict=False):
        values = [one["values"][key] for one in complete]
        axes.set(title=f"fit.{key}")
        if key in choices:  # perhaps lists: drawn by their places
            values = [choices[key].index(one) for one in values]
            axes.set_xticks(range(len(choices[key])), [str(one) for one in choices[key]])
        elif ranges[key]["log"]:
            axes.set_xscale("log")
        elif isinstance(verdict["present"][key], int):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.plot(values, losses, "o", color="tab:blue")
    for axes in others[len(keys) :]:
        axes.set_axis_off()
    with stage.whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)


def main() -> int:
    """Exit status: 0, 1 for a fault, 2 where params.yaml or git is not as it must be."""
    return stage.guarded(stage.asked(stage.NUMBERS), run)


if __name__ == "__main__":
    sys.exit(main())
