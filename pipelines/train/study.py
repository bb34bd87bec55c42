"""A study: trials of values of `fit` in Optuna's storage, which any number of workers share.

Its name is a hash of all that the value of a trial depends on: train and validation rows, the fixed
keys of `fit`, the space, the code. A trial that is killed is no trial: its values are queued again,
and what comes after is drawn as if it had not been.
"""

import json
import math
import socket
import warnings
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import stage
from pipelines.errors import TransientError, UserError
from pipelines.params import Params, Space
from pipelines.tracking import SQLITE
from pipelines.train import fit as fitting
from pipelines.train import models
from pipelines.train.data import Encoding

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

FINISHED = {"COMPLETE", "PRUNED"}
BEGUN = FINISHED | {"RUNNING"}
# A worker of another machine that is silent for so long is dead; of this one it is known at once.
BEAT, GRACE = 30, 120  # seconds
# Values that killed their worker so often count as tried: they may want more memory than there is.
ATTEMPTS = 3
# A new study begins with the best of so many earlier ones.
EARLIER = 5
DIGITS = 3  # of a number that is tried: what is tried is what can be written


def named(params: Params, encoding: Encoding, rows: Path) -> str:
    """The name of the study of these rows, which lie in arrays below `rows`."""
    free = {"checkpoint", *params.tune.space.keys}
    fixed = {key: value for key, value in params.fit.flat().items() if key not in free}
    made_of = fitting.code()
    made_of["rows"] = stage.digest(rows)
    made_of["columns"] = json.dumps(
        [encoding.vocabulary, encoding.numbers, encoding.target.model_dump()]
    )
    made_of["fit"] = json.dumps(fixed, sort_keys=True)
    made_of["space"] = params.tune.space.model_dump_json()
    return f"{params.dataset.name}-{params.fit.model}-{stage.digest_of(made_of)[:12]}"


def narrowed(params: Params) -> Params:
    """With a space of those keys alone that the model depends on. Raises UserError where it has
    none.
    """
    models.check(params.fit.model)
    space = {
        kind: {key: one for key, one in held.items() if models.uses(params.fit.model, key)}
        for kind, held in params.tune.space.model_dump().items()
    }
    if not any(space.values()):
        raise UserError(f"tune.space: {params.fit.model} depends on none of its keys")
    tune = params.tune.model_copy(update={"space": Space.model_validate(space)})
    return params.model_copy(update={"tune": tune})


def opened(params: Params, name: str) -> "Study":
    """The study of that name, made where it is missing."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    held = optuna.create_study(
        study_name=name,
        storage=_storage(params.tune.storage),
        pruner=optuna.pruners.MedianPruner(),
        direction="minimize",
        load_if_exists=True,
    )
    held.set_user_attr("about", _about(params))
    return held


def _about(params: Params) -> list[str]:
    """What studies must agree in for one to begin with the best of the other."""
    return [params.dataset.name, params.dataset.target.column, params.fit.model]


def _storage(url: str) -> "RDBStorage":
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

    patient = {}
    try:
        if url.startswith(SQLITE):
            Path(url.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
            patient = {"connect_args": {"timeout": 60}}  # seconds, while another worker writes
        return RDBStorage(
            url,
            patient,
            heartbeat_interval=BEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=_queue_again,
        )
    except OperationalError as error:
        raise TransientError(
            f"tune.storage: {url}: {stage.one_line(error.orig or error)}"
        ) from None
    except (ArgumentError, DBAPIError, ImportError, OSError) as error:
        said = stage.one_line(getattr(error, "orig", None) or error)
        raise UserError(f"tune.storage: {url} is no database that can be opened: {said}") from None


def trials(held: "Study", states: set[str]) -> list["FrozenTrial"]:
    """The trials in any of the states, by number."""
    return [one for one in held.get_trials(deepcopy=False) if one.state.name in states]


def rank(held: "Study", number: int) -> int:
    """How many trials that are not void come before: no two have the same, whoever asks when."""
    return sum(one.number < number for one in trials(held, BEGUN | {"WAITING"}))


def prepare(held: "Study", params: Params) -> None:
    """Free what dead workers of this machine held, and queue the present values; in a new study,
    after them, the best of earlier studies.
    """
    free_dead(held)
    new = not held.get_trials(deepcopy=False)
    space, present = params.tune.space, current(params)
    if present not in [one.user_attrs.get("values") for one in trials(held, BEGUN)]:
        held.enqueue_trial(_told(present, space), skip_if_exists=True)
    for best in _earlier(held, params) if new else []:
        inside = space.within(best)
        if inside and inside != present:
            held.enqueue_trial(_told(inside, space), skip_if_exists=True)


def current(params: Params) -> dict[str, Any]:
    """The present values of the keys of the space. Raises UserError where one lies outside."""
    held, space = params.fit.flat(), params.tune.space
    values = {key: held[key] for key in space.keys}
    inside = space.within(values)
    for key, value in values.items():
        if key not in inside:
            raise UserError(
                f"tune.space: fit.{key} = {value} lies outside; expected within, as it is tried "
                "first"
            )
    return values


def _earlier(held: "Study", params: Params) -> list[dict[str, Any]]:
    """The best values of the newest earlier studies of the dataset and model, the newest first: one
    of each, since values on other rows do not compare.
    """
    from optuna import get_all_study_summaries, load_study

    storage = _storage(params.tune.storage)
    about = _about(params)
    summaries = get_all_study_summaries(storage)
    others = [
        one
        for one in sorted(summaries, key=lambda one: one.datetime_start or datetime.min)
        if one.study_name != held.study_name and one.user_attrs.get("about") == about
    ]
    found = [best(load_study(study_name=one.study_name, storage=storage)) for one in others]
    return [one.user_attrs["values"] for one in found if one is not None][: -EARLIER - 1 : -1]


def best(held: "Study") -> "FrozenTrial | None":
    """The trial with the lowest value, the first of equal ones; None before one is complete."""
    complete = trials(held, {"COMPLETE"})
    return min(complete, key=loss) if complete else None


def loss(trial: "FrozenTrial") -> float:
    """Of the trial; infinite where it has none."""
    return math.inf if trial.value is None else trial.value


def suggested(trial: "Trial", params: Params) -> dict[str, Any]:
    """The values of a trial: those it was queued with, or drawn."""
    space, present = params.tune.space, params.fit.flat()
    values: dict[str, Any] = {}
    for key, one in space.ranges.items():
        if isinstance(present[key], int):
            values[key] = trial.suggest_int(key, int(one.low), int(one.high), log=one.log)
            continue
        drawn = trial.suggest_float(key, one.low, one.high, log=one.log)
        short = min(max(float(f"{drawn:.{DIGITS}g}"), one.low), one.high)
        values[key] = drawn if drawn == present[key] else short
    for key, choices in space.choices.items():
        texts = [json.dumps(choice) for choice in choices]
        values[key] = json.loads(trial.suggest_categorical(key, texts))
    return values


def _told(values: dict[str, Any], space: Space) -> dict[str, Any]:
    """The values as Optuna keeps them: it knows no list, so a choice is JSON."""
    return {
        key: json.dumps(value) if key in space.choices else value for key, value in values.items()
    }


def owner() -> str:
    """This process, wherever it is asked for."""
    return f"{socket.gethostname()} {stage.me()}"


def _dead(trial: "FrozenTrial") -> bool:
    """Whether who began the trial on this machine is gone. Another machine tells by silence."""
    held = trial.user_attrs.get("owner")
    if held is None:  # it was killed at once, or is just beginning
        begun = trial.datetime_start or datetime.min
        return datetime.now() - begun > timedelta(seconds=GRACE)
    host, _, process = held.partition(" ")
    return host == socket.gethostname() and not stage.lives(process)


def free_dead(held: "Study") -> None:
    """Queue again what dead workers of this machine had begun."""
    from optuna.trial import TrialState

    for trial in trials(held, {"RUNNING"}):
        if _dead(trial):
            again = _attempt(trial) < ATTEMPTS
            # By ValueError Optuna says that another machine was faster.
            with suppress(ValueError):
                held.tell(trial.number, state=TrialState.FAIL if again else TrialState.PRUNED)
                _queue_again(held, trial)


def _queue_again(held: "Study", trial: "FrozenTrial") -> None:
    attempt = _attempt(trial)
    if attempt < ATTEMPTS:
        values = trial.system_attrs.get("fixed_params", {}) | trial.params
        held.enqueue_trial(values, user_attrs={"attempt": attempt + 1})


def _attempt(trial: "FrozenTrial") -> int:
    return int(trial.user_attrs.get("attempt", 1))
