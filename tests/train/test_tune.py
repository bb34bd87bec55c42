"""tune seeks on validation rows alone, loses no trial to a kill, and commits what surely won."""

import json
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from orchestrate import servers
from world import ROOT, Checkout

from pipelines import params as parameters
from pipelines import tracking
from pipelines.errors import UserError
from pipelines.params import Params, Space
from pipelines.train import study, tune, winner

pytestmark = pytest.mark.pipeline
TUNE = "pipelines.train.tune"
DROPOUT = {"dropout": {"low": 0.0, "high": 0.5, "log": False}}


def space(**ranges: Any) -> dict[str, Any]:
    return {"ranges": ranges, "choices": {}}


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def commit() -> None:
    git("add", "-A")
    git("commit", "-qm", "state")


@pytest.fixture
def tunable(features: Checkout) -> Checkout:
    """A checkout under git whose trials take a second."""
    features.set(fit={"trainer": {"threads": 1}}, tune={"trials": 4})
    _set_space(features, space(**DROPOUT))
    shutil.copy(ROOT / ".gitignore", features.folder)
    git("init", "-q")
    git("config", "user.name", "t")
    git("config", "user.email", "t@t")
    commit()
    return features


def verdict() -> dict[str, Any]:
    return json.loads(tune.VERDICT.read_text())  # type: ignore[no-any-return]


def held(params: Params) -> Any:
    """The only study of the storage."""
    import optuna

    (name,) = optuna.get_all_study_names(params.tune.storage)
    return study.opened(params, name)


def past_a_trial(checkout: Checkout) -> tuple[subprocess.Popen[str], psutil.Process, int]:
    """A tune in the middle of a trial after the first, its only worker, and the trial's number."""
    store, experiment = tracking.client(checkout.params())  # an import takes longer than a trial
    process = checkout.start(TUNE)
    assert process.stdout is not None
    for line in process.stdout:
        if "trial 1 of" in line:
            break
    running, names = set[int](), set[str]()
    while not (both := [one for one in running if f"trial {one + 1}" in names]):
        assert process.poll() is None, process.stderr and process.stderr.read()
        # A trial is begun before its run in MLflow, and over soon.
        running = {one.number for one in study.trials(held(checkout.params()), {"RUNNING"})}
        under = store.search_runs([experiment], "attributes.status = 'RUNNING'")
        names = {str(run.info.run_name) for run in under}
    workers = psutil.Process(process.pid).children()
    (worker,) = [one for one in workers if "spawn_main" in " ".join(one.cmdline())]
    return process, worker, both[0]


def values(checkout: Checkout) -> list[dict[str, Any]]:
    """What the finished trials tried, in their order."""
    finished = study.trials(held(checkout.params()), study.FINISHED)
    return [one.user_attrs["values"] for one in finished]


def test_the_test_rows_are_never_read(tunable: Checkout) -> None:
    """With other test rows, and with none, the study is the same to the last digit."""
    tune.run(tunable.params())
    first = verdict()
    file = "data/features/2013.parquet"
    table = pq.read_table(file)
    split = np.array(table["split"].to_pylist())
    pq.write_table(table.filter(pa.array(split != "test")), file)
    shutil.rmtree(".state/tune")
    tune.run(tunable.params())
    assert verdict() == first


def test_a_worker_that_is_killed_loses_no_trial_and_counts_none_twice(
    tunable: Checkout, capfd: pytest.CaptureFixture[str]
) -> None:
    """Taken up again, the trials are those of a study that nobody killed."""
    tune.run(tunable.params())
    expected = values(tunable)
    git("reset", "-q", "--hard", "HEAD~1" if verdict()["beats"] else "HEAD")
    shutil.rmtree(".state/tune")
    process, worker, number = past_a_trial(tunable)
    worker.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    done = f"{number} of 4 trials are done"
    assert f"{done}, and workers ended with status -9: run again" in err
    capfd.readouterr()
    tune.run(tunable.params())
    assert done in capfd.readouterr().out
    assert values(tunable) == expected
    states = [one.state.name for one in held(tunable.params()).get_trials()]
    assert sorted(states) == ["COMPLETE"] * 4 + ["FAIL"]
    store, experiment = tracking.client(tunable.params())
    killed = store.search_runs([experiment], "attributes.status = 'KILLED'")
    assert [run.info.run_name for run in killed] == [f"trial {number + 1}"]


def test_a_tune_that_is_killed_takes_its_workers_along(tunable: Checkout) -> None:
    tunable.set(tune={"trials": 100})  # it ends by the kill alone
    commit()
    process, worker, _ = past_a_trial(tunable)
    process.kill()
    process.communicate(timeout=60)
    worker.wait(timeout=20)


def test_ctrl_c_ends_it_in_a_line_and_leaves_nothing_running(tunable: Checkout) -> None:
    tunable.set(tune={"trials": 100})
    commit()
    process, worker, _ = past_a_trial(tunable)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "tune: interrupted\n"
    assert not worker.is_running()
    assert not study.trials(held(tunable.params()), {"RUNNING"})
    store, experiment = tracking.client(tunable.params())
    assert not store.search_runs([experiment], "attributes.status = 'RUNNING'")


def test_two_workers_share_a_study_whose_runs_are_children_and_prune(tunable: Checkout) -> None:
    wide = {"learning_rate": {"low": 1e-6, "high": 0.03, "log": True}}
    tunable.set(fit={"max_epochs": 3}, tune={"trials": 12, "workers": 2})
    _set_space(tunable, space(**wide))
    commit()
    ended = tunable.run(TUNE)
    assert ended.status == 0, ended
    finished = study.trials(held(tunable.params()), study.FINISHED)
    assert len(finished) == 12
    assert len({one.user_attrs["owner"] for one in finished}) == 2
    assert finished[0].user_attrs["values"] == {"learning_rate": 0.008}
    pruned = [one.number for one in finished if one.state.name == "PRUNED"]
    assert pruned
    assert ": pruned: " in ended.out

    store, experiment = tracking.client(tunable.params())
    (above,) = store.search_runs([experiment], f"tags.study = '{verdict()['study']}'")
    below = store.search_runs(
        [experiment], f"tags.`mlflow.parentRunId` = '{above.info.run_id}'", max_results=100
    )
    assert {run.info.status for run in [above, *below]} == {"FINISHED"}
    runs = {run.info.run_name: run for run in below}
    assert {f"trial {one.number + 1}" for one in finished} <= set(runs)
    for one in finished:
        run = runs[f"trial {one.number + 1}"]
        tried = one.user_attrs["values"]["learning_rate"]
        assert float(run.data.params["fit.learning_rate"]) == tried
        assert run.data.tags["state"] == one.state.name.lower()
        epochs = store.get_metric_history(run.info.run_id, "val_loss")
        # And of the whole, once its trees are grown.
        assert len(epochs) == 4 or one.number in pruned


@servers.needed
def test_a_study_may_lie_in_postgresql(tunable: Checkout) -> None:
    with servers.postgres(["tune"]) as urls:
        tunable.set(tune={"trials": 5, "workers": 2, "storage": urls["tune"]})
        commit()
        tune.run(tunable.params())
        assert len(values(tunable)) == 5
        assert not Path(".state/tune").exists()


def test_what_a_model_does_not_depend_on_is_not_sought(params: Params) -> None:
    logistic = params.model_copy(
        update={"fit": params.fit.model_copy(update={"model": "logistic"})}
    )
    sought = study.narrowed(logistic).tune.space.keys
    assert sought == ["learning_rate", "weight_decay", "batch_size"]
    trees = Space.model_validate(space(**{"boosting.l2": DROPOUT["dropout"]}))
    tune_ = params.tune.model_copy(update={"space": trees})
    with pytest.raises(UserError, match=r"tune\.space: logistic depends on none of its keys"):
        study.narrowed(logistic.model_copy(update={"tune": tune_}))


@pytest.mark.parametrize("place", ["/proc/nope/t.db", "/etc/hostname"])
def test_a_storage_that_is_none_is_one_line(tunable: Checkout, place: str) -> None:
    tunable.set(tune={"storage": f"sqlite:///{place}"})
    commit()
    with pytest.raises(UserError, match=rf"tune\.storage: sqlite:///{place} is no database"):
        tune.run(tunable.params())


def test_values_that_diverge_are_pruned_and_win_nothing(tunable: Checkout) -> None:
    tunable.set(fit={"learning_rate": 1e30}, tune={"trials": 2})
    _set_space(tunable, space(learning_rate={"low": 1e29, "high": 1e31, "log": True}))
    commit()
    ended = tunable.run(TUNE)
    assert ended.status == 0, ended
    assert "trial 2 of 2: pruned: it diverged" in ended.out
    assert "no trial is better than the present values: nothing changes" in ended.out
    assert not verdict()["beats"]


def test_a_loss_that_is_no_number_is_pruned_though_the_weights_are(tunable: Checkout) -> None:
    one_step = {"model": "mlp", "max_epochs": 2, "batch_size": 100_000}
    tunable.set(fit=one_step | {"learning_rate": 1e25}, tune={"trials": 2})
    _set_space(tunable, space(learning_rate={"low": 1e24, "high": 1e26, "log": True}))
    commit()
    ended = tunable.run(TUNE)
    assert ended.status == 0, ended
    assert "trial 2 of 2: pruned: it diverged" in ended.out


def test_a_winner_is_a_commit_of_its_values_alone(tunable: Checkout) -> None:
    """Present values that learn nothing are beaten; a comment stays, and so does what is staged."""
    tunable.set(fit={"learning_rate": 1e-6})
    _set_space(tunable, space(learning_rate={"low": 1e-6, "high": 0.03, "log": True}))
    path = Path("params.yaml")
    old = path.read_text().replace("learning_rate: 1.0e-06", "learning_rate:  1.0e-06   # slow")
    path.write_text(old)
    commit()
    Path("other").write_text("staged")
    git("add", "other")
    ended = tunable.run(TUNE)
    assert ended.status == 0, ended
    rate = tunable.params().fit.learning_rate
    assert path.read_text() == old.replace("1.0e-06   # slow", f"{winner.written(rate)}   # slow")
    assert f"\n+  learning_rate:  {winner.written(rate)}   # slow\n" in ended.out
    assert "tune: better: validation loss" in ended.out
    assert git("show", "--name-only", "--format=", "HEAD") == "params.yaml"
    assert git("status", "--porcelain") == "A  other"
    said, found = git("log", "-1", "--format=%B"), verdict()
    assert said.startswith("Set what tuning found better: learning_rate\n")
    assert f"learning_rate: 1e-06 -> {rate}" in said
    assert all(f"{figure:.6f}" in said for figure in found["means"].values())
    assert found["study"] in said
    assert tune.PAGE.stat().st_size > 10_000
    again = tunable.run(TUNE)
    assert again.status == 0, again
    assert "4 of 4 trials are done" in again.out
    assert "no trial is better than the present values: nothing changes" in again.out
    assert len(git("log", "--format=%h").splitlines()) == 3


@pytest.mark.parametrize(
    ("losses", "beats"),
    [
        ([0.40, 0.41, 0.42], True),  # lower by 0.1 on each seed
        ([0.40, 0.52, 0.53], False),  # lower in the mean, and by luck
        ([0.50, 0.51, 0.52], False),
    ],
)
def test_only_a_gain_beyond_the_noise_of_seeds_wins(losses: list[float], beats: bool) -> None:
    found = tune.compared({"present": [0.50, 0.51, 0.52], "best": losses}, [8, 9, 10])
    assert found["beats"] is beats
    assert ("nothing changes" in found["reason"]) is not beats
    assert f"at most {-found['surely']:+.4f})" in found["reason"]


def test_a_new_study_begins_with_the_present_and_the_best_of_earlier_ones(
    tunable: Checkout,
) -> None:
    """Of the same dataset and model, the newest first, and what lies in the space of today."""
    params = tunable.params()
    for name, about, best in (
        ("older", ["flights", "late", "blend"], {"dropout": 0.2}),
        ("newer", ["flights", "late", "blend"], {"dropout": 0.1, "members": 3}),
        ("outside", ["flights", "late", "blend"], {"dropout": 0.7}),
        ("another model", ["flights", "tabm"], {"dropout": 0.4}),
        ("another dataset", ["trains", "mlp"], {"dropout": 0.4}),
    ):
        earlier = study.opened(params, name)
        earlier.set_user_attr("about", about)
        for value, tried in ((0.3, best), (0.4, {"dropout": 0.05})):
            trial = earlier.ask()
            trial.set_user_attr("values", tried)
            earlier.tell(trial, value)
    new = study.opened(params, "new")
    for _ in range(2):
        study.prepare(new, params)
        queued = [one.system_attrs["fixed_params"] for one in study.trials(new, {"WAITING"})]
        assert queued == [{"dropout": 0.3}, {"dropout": 0.1}, {"dropout": 0.2}]


def test_values_that_kill_their_worker_again_and_again_count_as_tried(tunable: Checkout) -> None:
    new = study.opened(tunable.params(), "new")
    new.enqueue_trial({"dropout": 0.3})
    for attempt in range(1, study.ATTEMPTS + 1):
        trial = new.ask()
        trial.set_user_attr("owner", f"{socket.gethostname()} 1 17")
        assert trial.suggest_float("dropout", 0.0, 0.5) == 0.3
        study.free_dead(new)
        assert len(study.trials(new, {"WAITING"})) == (attempt < study.ATTEMPTS)
    states = [one.state.name for one in new.get_trials()]
    assert states == ["FAIL", "FAIL", "PRUNED"]


def test_who_is_silent_elsewhere_is_left_to_its_heartbeat(tunable: Checkout) -> None:
    new = study.opened(tunable.params(), "new")
    for owner in ("elsewhere 1 17", study.owner()):
        new.ask().set_user_attr("owner", owner)
    study.free_dead(new)
    assert len(study.trials(new, {"RUNNING"})) == 2


@given(st.permutations(range(6)), st.integers(1, 6))
def test_of_workers_that_begin_at_once_so_many_go_on_as_are_asked_for(
    order: list[int], asked: int
) -> None:
    """In whatever order they look, and whatever the others have done by then."""
    import optuna

    one = optuna.create_study()
    numbers = [one.ask().number for _ in order]
    accepted = []
    for at in order:
        if study.rank(one, numbers[at]) < asked:
            accepted.append(at)
            one.tell(numbers[at], 0.0)
        else:
            one.tell(numbers[at], state=optuna.trial.TrialState.FAIL)
    assert sorted(accepted) == list(range(asked))


SETTABLE = st.one_of(
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.integers(), min_size=1),
)
BLANKS = st.text(" ", min_size=1, max_size=3)
REMARKS = st.sampled_from(["", "  # why: because", " #", "\n", "\n  # learning_rate: 7\n", "   "])


@given(st.data(), st.lists(st.sampled_from(sorted(parameters.TUNABLE)), min_size=1, unique=True))
def test_a_value_is_replaced_where_it_stands_and_nothing_else_is_touched(
    data: st.DataObject, keys: list[str]
) -> None:
    old = {key: data.draw(SETTABLE) for key in keys}
    changes = {key: data.draw(SETTABLE) for key in data.draw(st.sets(st.sampled_from(keys)))}
    layout = [(key, data.draw(BLANKS), data.draw(REMARKS)) for key in keys]

    def text(values: dict[str, Any]) -> str:
        lines = {
            key: f"{key.rpartition('.')[2]}:{blank}{winner.written(values[key])}{remark}\n"
            for key, blank, remark in layout
        }
        outer = [f"  {line}" for key, line in lines.items() if "." not in key]
        inner = [f"    {line}" for key, line in lines.items() if "." in key]
        block = "".join([*outer, *(["  boosting:\n"] if inner else []), *inner])
        return f"# params\nother: {{dropout: 1}}\n\nfit:  # of fit\n{block}\nlast: 0.3 # x\n"

    new = winner.edited(text(old), changes)
    assert new == text(old | changes)
    found = yaml.safe_load(new)["fit"]
    found |= {f"boosting.{key}": value for key, value in found.pop("boosting", {}).items()}
    assert found == old | changes


def test_the_repositorys_own_params_take_any_of_their_space() -> None:
    text = (ROOT / "params.yaml").read_text()
    changes = {"learning_rate": 1e-05, "hidden": [512, 256], "members": 4, "dropout": 0.0}
    changes |= {"boosting.leaves": 8}
    new = winner.checked(text, changes)
    changed = [line for line in new.splitlines() if line not in text.splitlines()]
    assert changed == [
        "  learning_rate: 1.0e-05", "  dropout: 0.0", "  hidden: [512, 256]", "  members: 4",
        "    rounds: 400, patience: 20, learning_rate: 0.07, leaves: 8, leaf_rows: 200, l2: 5, "
        "features: 0.4,",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("hidden: [256, 128]", "hidden:\n  - 256", "fit.hidden fills several lines; expected one"),
        ("hidden: [256, 128]", "hidden: [256,\n    128]", "fit.hidden fills several lines"),
        ("members: 2", "members: *two", "keys that cannot be set alone"),
    ],
)
def test_what_cannot_be_edited_alone_is_one_line(before: str, after: str, said: str) -> None:
    text = (ROOT / "params.yaml").read_text()
    text = text.replace("val_days: 30", "val_days: &two 2").replace(before, after)
    with pytest.raises(UserError, match=said):
        winner.checked(text, {"hidden": [512], "members": 3})


def test_without_a_clean_params_yaml_it_does_not_begin(tunable: Checkout) -> None:
    tunable.set(fit={"dropout": 0.2})
    ended = tunable.run(TUNE)
    assert ended.status == 2
    assert ended.err == (
        "tune: error: params.yaml has changes that are in no commit; commit them first\n"
    )
    git("commit", "-qam", "t")
    git("rm", "-q", "--cached", "params.yaml")
    git("commit", "-qm", "t")
    with pytest.raises(UserError, match=r"params\.yaml: git takes no commit of it.*Did you forget"):
        tune.run(tunable.params())
    shutil.rmtree(".git")
    with pytest.raises(UserError, match=r"params\.yaml: git takes no commit of it"):
        tune.run(tunable.params())
    assert not Path(".state/tune").exists()


def test_a_commit_that_git_refuses_leaves_params_as_they_were(tunable: Checkout) -> None:
    before = winner.committed()
    hook = Path(".git/hooks/pre-commit")
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho not on a Friday >&2; exit 1\n")
    hook.chmod(0o755)
    after = winner.checked(before, {"dropout": 0.1})
    with pytest.raises(UserError, match="git refused the commit: not on a Friday"):
        winner.commit(before, after, "t")
    assert winner.committed() == before


def test_params_that_changed_meanwhile_are_not_overwritten(tunable: Checkout) -> None:
    before = winner.committed()
    tunable.set(fit={"seed": 8})
    git("commit", "-qam", "t")
    with pytest.raises(UserError, match=r"params\.yaml was changed meanwhile: run again"):
        winner.commit(before, winner.checked(before, {"dropout": 0.1}), "t")
    assert tunable.params().fit.seed == 8


@pytest.mark.parametrize(
    ("fit", "tuning", "said"),
    [
        ({"dropout": 0.7}, {}, r"tune\.space: fit\.dropout = 0\.7 lies outside"),
        ({"trainer": {"devices": 2}}, {}, "fit.trainer: a trial is one process"),
        ({}, {"storage": "mongo://here"}, "tune.storage: mongo://here is no database"),
    ],
)
def test_a_mistake_is_one_line(
    tunable: Checkout, fit: dict[str, Any], tuning: dict[str, Any], said: str
) -> None:
    tunable.set(fit=fit, tune=tuning)
    commit()
    with pytest.raises(UserError, match=said):
        tune.run(tunable.params())


def _set_space(checkout: Checkout, other: dict[str, Any]) -> None:
    """Another space in place of what stands there."""
    path = checkout.folder / "params.yaml"
    held = yaml.safe_load(path.read_text())
    held["tune"]["space"] = other
    path.write_text(yaml.safe_dump(held, sort_keys=False))
