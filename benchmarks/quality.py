"""quality: the model beside LightGBM, XGBoost and CatBoost, each tuned with as many trials.

Needs the extra `contenders` (pip install -e '.[contenders]'). Three parts, on the features of the
whole year:
tune     each contender by TRIALS trials of Optuna's TPE: trained on January to May, chosen by the
         log loss of June, so that no month that is measured later is seen; into tuned.json
public   train to August, September to stop and calibrate, October to December to measure, on SEEDS
rolling  each month from July to December, trained on all before it, the last 30 days to stop and
         calibrate
All get the same rows and columns, stop when the validation loss has not fallen, and are calibrated
by Platt's scaling on the validation rows. Prints the tables of docs/benchmarks.md.
Run: python benchmarks/quality.py [PART …] [CONTENDER …]
"""

import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from bench import PUBLIC, ROOT

from pipelines import metrics, tables
from pipelines import params as parameters
from pipelines.ingest import featurize, fetch, load, validate
from pipelines.params import Fit, Params
from pipelines.train import data, fit
from pipelines.train.data import Encoding, Rows
from pipelines.train.evaluate import matrix

TRIALS = 15
TUNED = Path(__file__).with_name("tuned.json")
SEEDS = (1, 2, 3, 4, 5)
THREADS = 2
STOP = 50  # rounds of boosting without a better validation loss
Floats = npt.NDArray[np.float64]
Predict = Callable[[Rows], npt.NDArray[Any]]
Space = Callable[[Any], dict[str, Any]]
Trainer = Callable[[Mapping[str, Any], "Split", int], Predict]


@dataclass(frozen=True)
class Split:
    encoding: Encoding
    train: Rows
    val: Rows
    test: Rows
    options: Fit


def main() -> None:
    names = [word for word in sys.argv[1:] if word in CONTENDERS] or list(CONTENDERS)
    parts = [word for word in sys.argv[1:] if word in PARTS] or list(PARTS)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        params = features()
        for part in parts:
            PARTS[part](params, names)


def tune(params: Params, names: list[str]) -> None:
    held = split(params, "tuning", _day(2013, 6), _day(2013, 7), _day(2013, 7))
    for name in names:
        space, train = CONTENDERS[name]
        values = tuned(name, space, train, held) if space else {}
        found = json.loads(TUNED.read_text()) if TUNED.exists() else {}
        text = json.dumps(found | {name: values}, indent=2, sort_keys=True)
        TUNED.write_text(text + "\n")


def public(params: Params, names: list[str]) -> None:
    held = split(params, "public", _day(2013, 9), _day(2013, 10), _day(2014, 1))
    table("public split", held, names, json.loads(TUNED.read_text()))


def rolling(params: Params, names: list[str]) -> None:
    found = json.loads(TUNED.read_text())
    total: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for month in range(7, 13):
        first, after = _day(2013, month), _day(2013 + month // 12, month % 12 + 1)
        held = split(params, f"{month:02}", first - timedelta(days=30), first, after)
        for name in names:
            figures = metrics.point(held.test.labels, answers(name, found[name], held, SEEDS[0]))
            total[name].append(figures)
            told = ", ".join(f"{k} {figures[k]:.4f}" for k in ("log_loss", "ap", "auc"))
            print(f"month {month:02}  {name:<10}{told}", flush=True)
    print("\n| from July, month by month | log loss | AP | AUC | best in (log loss) |")
    print("|---|---|---|---|---|")
    losses = np.array([[one["log_loss"] for one in total[name]] for name in names])
    wins = np.bincount(losses.argmin(axis=0), minlength=len(names))
    for name, won in zip(names, wins, strict=True):
        mean = {k: np.mean([one[k] for one in total[name]]) for k in ("log_loss", "ap", "auc")}
        print(
            f"| {name} | {mean['log_loss']:.4f} | {mean['ap']:.4f} | {mean['auc']:.4f} "
            f"| {won} of 6 |"
        )


def _day(year: int, month: int) -> datetime:
    return datetime(year, month, 1, 4, tzinfo=UTC)  # midnight in New York


def features() -> Params:
    """The features of the whole year, in this folder."""
    for name in ("expectations", "pipelines"):
        Path(name).symlink_to(ROOT / name)
    values = yaml.safe_load((ROOT / "params.yaml").read_text()) | PUBLIC
    Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    params = parameters.load()
    for stage in (fetch, load, validate, featurize):
        stage.run(params)
    return params


def split(params: Params, name: str, val: datetime, test: datetime, end: datetime) -> Split:
    """The rows before `val` to learn from, those before `test` to choose by, those before `end` to
    measure (none where it is the same).
    """
    folder = Path(name) / "features"
    key, names = params.dataset.time, params.dataset.features
    for file, rows in zip(
        tables.months(featurize.FEATURES), tables.read_months(featurize.FEATURES), strict=True
    ):
        at = rows[key]
        part = pc.if_else(pc.less(at, pa.scalar(test, at.type)), "val", "test")
        part = pc.if_else(pc.less(at, pa.scalar(val, at.type)), "train", part)
        part = pc.if_else(pc.less(at, pa.scalar(end, at.type)), part, "later")
        place = rows.column_names.index("split")
        tables.write(rows.set_column(place, "split", part), folder / file.name)
    encoding = data.learn(names.categories, names.numbers, params.dataset.target, folder)
    parts = ("train", "val", "val" if test == end else "test")
    held = [data.materialise(encoding, part, Path(name), folder) for part in parts]
    return Split(encoding, *held, params.fit)


def tuned(name: str, space: Space, train: Trainer, held: Split) -> dict[str, Any]:
    """The values of the trial with the smallest validation loss."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    begun = time.perf_counter()

    def loss(trial: Any) -> float:
        predicted = train(space(trial), held, SEEDS[0])(held.val)
        value = metrics.point(held.val.labels, predicted)["log_loss"]
        print(f"{name} trial {trial.number:>2}: {value:.4f}", flush=True)
        return value

    study.optimize(loss, n_trials=TRIALS)
    spent = time.perf_counter() - begun
    print(f"{name}: {study.best_value:.4f} after {spent:.0f} s: {study.best_params}", flush=True)
    return dict(space(optuna.trial.FixedTrial(study.best_params)))


def answers(name: str, values: Mapping[str, Any], held: Split, seed: int) -> Floats:
    """Test probabilities, calibrated on the validation rows."""
    from sklearn.linear_model import LogisticRegression

    predict = CONTENDERS[name][1](values, held, seed)
    seen, asked = (_odds(predict(rows)) for rows in (held.val, held.test))
    platt = LogisticRegression(C=1e6).fit(seen, held.val.labels)
    return np.asarray(platt.predict_proba(asked)[:, 1])


def _odds(probability: npt.NDArray[Any]) -> Floats:
    p = np.clip(probability.astype(np.float64), 1e-6, 1 - 1e-6)
    return np.asarray((np.log(p) - np.log1p(-p))[:, None])


def table(what: str, held: Split, names: list[str], found: Mapping[str, Any]) -> None:
    """A line for each contender: the mean over seeds, with the interval of the first."""
    rows = {}
    for name in names:
        rows[name] = [answers(name, found[name], held, seed) for seed in SEEDS]
        points = [metrics.point(held.test.labels, one) for one in rows[name]]
        told = ", ".join(f"{one['log_loss']:.4f}/{one['ap']:.4f}" for one in points)
        print(f"{what}  {name:<10} log loss/AP by seed: {told}", flush=True)
    print(f"\n| {what}, {len(SEEDS)} seeds | log loss | AP | AUC | calibration error |")
    print("|---|---|---|---|---|")
    for name in names:
        points = [metrics.point(held.test.labels, one) for one in rows[name]]
        spread = metrics.with_intervals(held.test.labels, rows[name][0], 200, 1)
        cells = []
        for figure in ("log_loss", "ap", "auc", "calibration_error"):
            values = [one[figure] for one in points]
            wide = (spread[figure]["high"] - spread[figure]["low"]) / 2
            cells.append(f"{np.mean(values):.4f} ± {wide:.4f} (seeds ± {np.std(values):.4f})")
        print(f"| {name} | {' | '.join(cells)} |")
    for name in names[1:]:
        gaps = paired(held.test.labels, np.mean(rows[names[0]], 0), np.mean(rows[name], 0))
        print(f"{names[0]} less {name}, means of the seeds, paired: {gaps}", flush=True)
    print()


def paired(label: npt.NDArray[np.int64], one: Floats, other: Floats) -> str:
    """Differences with the interval of a bootstrap that draws the same rows for both."""
    first, second = metrics.measurer(label, one), metrics.measurer(label, other)
    random, rows = np.random.default_rng(1), len(label)
    drawn = []
    for _ in range(200):
        weights = np.bincount(random.integers(0, rows, rows), minlength=rows).astype(np.float64)
        drawn.append(first(weights) - second(weights))
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    told = first(np.ones(rows)) - second(np.ones(rows))
    return ", ".join(
        f"{metrics.NAMES[at]} {told[at]:+.4f} ({low[at]:+.4f} to {high[at]:+.4f})" for at in (2, 1)
    )


def _network_space(trial: Any) -> dict[str, Any]:
    return {
        "model": trial.suggest_categorical("model", ["mlp", "tabm"]),
        "learning_rate": trial.suggest_float("learning_rate", 2e-3, 2e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-3, 1.0, log=True),
        "dropout": trial.suggest_float("dropout", 0.1, 0.5),
        "hidden": [trial.suggest_categorical("hidden", [128, 256, 384]), 128],
        "members": trial.suggest_categorical("members", [2, 4, 8]),
        "max_epochs": trial.suggest_int("max_epochs", 3, 8),
    }


def _blend_space(trial: Any) -> dict[str, Any]:
    return {
        "model": "blend",
        "learning_rate": trial.suggest_float("learning_rate", 2e-3, 2e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-3, 1.0, log=True),
        "dropout": trial.suggest_float("dropout", 0.1, 0.5),
        "hidden": [trial.suggest_categorical("hidden", [128, 256, 384]), 128],
        "max_epochs": trial.suggest_int("max_epochs", 3, 8),
        "boosting.rounds": 1500,
        "boosting.patience": STOP,
        "boosting.learning_rate": trial.suggest_float("shrinkage", 0.03, 0.2, log=True),
        "boosting.leaves": trial.suggest_int("leaves", 12, 48, log=True),
        "boosting.leaf_rows": trial.suggest_int("leaf_rows", 20, 500, log=True),
        "boosting.features": trial.suggest_float("features", 0.2, 1.0),
        "boosting.l2": trial.suggest_float("l2", 1e-2, 30.0, log=True),
    }


def _ours(values: Mapping[str, Any], held: Split, seed: int) -> Predict:
    options = held.options.changed({**values, "seed": seed})
    with tempfile.TemporaryDirectory() as saved, redirect_stdout(io.StringIO()):
        trained = fit.train_model(held.encoding, held.train, held.val, options, Path(saved))
    return trained.model.predict


def _lightgbm_space(trial: Any) -> dict[str, Any]:
    return {
        "num_leaves": trial.suggest_int("num_leaves", 15, 255, log=True),
        "min_data_in_leaf": trial.suggest_int("min_data_in_leaf", 20, 500, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 0.02, 0.2, log=True),
        "feature_fraction": trial.suggest_float("feature_fraction", 0.3, 1.0),
        "bagging_fraction": trial.suggest_float("bagging_fraction", 0.5, 1.0),
        "lambda_l2": trial.suggest_float("lambda_l2", 1e-2, 30.0, log=True),
        "cat_smooth": trial.suggest_float("cat_smooth", 1.0, 100.0, log=True),
    }


def _lightgbm(values: Mapping[str, Any], held: Split, seed: int) -> Predict:
    import lightgbm

    categories = list(range(len(held.encoding.vocabulary)))
    fixed = {"objective": "binary", "verbosity": -1, "num_threads": THREADS, "seed": seed}
    train = lightgbm.Dataset(matrix(held.train), held.train.labels, categorical_feature=categories)
    model = lightgbm.train(
        {**fixed, "bagging_freq": 1, **values},
        train,
        num_boost_round=3000,
        valid_sets=[lightgbm.Dataset(matrix(held.val), held.val.labels, reference=train)],
        callbacks=[lightgbm.early_stopping(STOP, verbose=False)],
    )
    return lambda rows: model.predict(matrix(rows))


def _xgboost_space(trial: Any) -> dict[str, Any]:
    return {
        "max_depth": trial.suggest_int("max_depth", 3, 10),
        "min_child_weight": trial.suggest_float("min_child_weight", 1.0, 200.0, log=True),
        "eta": trial.suggest_float("eta", 0.02, 0.2, log=True),
        "subsample": trial.suggest_float("subsample", 0.5, 1.0),
        "colsample_bytree": trial.suggest_float("colsample_bytree", 0.3, 1.0),
        "lambda": trial.suggest_float("lambda", 1e-2, 30.0, log=True),
        "gamma": trial.suggest_float("gamma", 1e-3, 5.0, log=True),
    }


def _xgboost(values: Mapping[str, Any], held: Split, seed: int) -> Predict:
    import xgboost

    kinds = ["c"] * len(held.encoding.vocabulary) + ["q"] * len(held.encoding.numbers)

    def labelled(rows: Rows) -> Any:
        return xgboost.DMatrix(
            matrix(rows), rows.labels, feature_types=kinds, enable_categorical=True
        )

    fixed = {"objective": "binary:logistic", "tree_method": "hist", "nthread": THREADS}
    model = xgboost.train(
        {**fixed, "eval_metric": "logloss", "seed": seed, **values},
        labelled(held.train),
        num_boost_round=3000,
        evals=[(labelled(held.val), "val")],
        early_stopping_rounds=STOP,
        verbose_eval=False,
    )
    return lambda rows: model.predict(labelled(rows), iteration_range=(0, model.best_iteration + 1))


def _catboost_space(trial: Any) -> dict[str, Any]:
    return {
        "depth": trial.suggest_int("depth", 4, 8),
        "learning_rate": trial.suggest_float("learning_rate", 0.03, 0.3, log=True),
        "l2_leaf_reg": trial.suggest_float("l2_leaf_reg", 1.0, 30.0, log=True),
        "random_strength": trial.suggest_float("random_strength", 0.1, 10.0, log=True),
        "bagging_temperature": trial.suggest_float("bagging_temperature", 0.0, 2.0),
    }


def _catboost(values: Mapping[str, Any], held: Split, seed: int) -> Predict:
    import catboost

    def pool(rows: Rows) -> Any:
        features = catboost.FeaturesData(
            num_feature_data=np.ascontiguousarray(rows.arrays[1]),
            cat_feature_data=np.asarray(rows.arrays[0]).astype(str).astype("S").astype(object),
        )
        return catboost.Pool(features, rows.labels)

    model = catboost.CatBoostClassifier(
        iterations=1500, od_type="Iter", od_wait=STOP, thread_count=THREADS, random_seed=seed,
        allow_writing_files=False, verbose=False, **values,
    )  # fmt: skip
    model.fit(pool(held.train), eval_set=pool(held.val), use_best_model=True)
    return lambda rows: model.predict_proba(pool(rows))[:, 1]


# The space of each, None where nothing is sought: `shipped` has the values of params.yaml.
CONTENDERS: dict[str, tuple[Space | None, Trainer]] = {
    "blend": (_blend_space, _ours),
    "shipped": (None, _ours),
    "network": (_network_space, _ours),
    "lightgbm": (_lightgbm_space, _lightgbm),
    "xgboost": (_xgboost_space, _xgboost),
    "catboost": (_catboost_space, _catboost),
}

PARTS = {"tune": tune, "public": public, "rolling": rolling}

if __name__ == "__main__":
    main()
