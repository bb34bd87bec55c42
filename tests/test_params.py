"""params.yaml is checked at the door: one line names the key."""

from pathlib import Path

import pytest
import yaml
from world import ROOT

from pipelines import params
from pipelines.errors import UserError


def test_the_repository_holds_valid_params() -> None:
    assert params.load(ROOT / "params.yaml").dataset.name == "flights"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"speed": 1}, "speed: unknown key; allowed here: as_of, engine, fetch, load, validate"),
        ({"fit": {"lr": 1}}, "fit.lr: unknown key; allowed here: model, seed"),
        ({"package": {"forms": ["int4"]}}, "package.forms.0: input should be 'int8', 'pruned' or"),
        ({"package": {"forms": ["int8", "int8"]}}, "package.forms: int8 stands 2 times; expected"),
        ({"package": {"max_loss_rise": -1}}, "package.max_loss_rise: input should be greater than"),
        (
            {"package": {"pruned": {"share": 1.0}}},
            "package.pruned.share: input should be less than",
        ),
        ({"package": {"distilled": {"hidden": []}}}, "package.distilled.hidden: list should have"),
        ({"as_of": None}, "as_of: expected a quoted ISO 8601 time"),
        ({"as_of": "soon"}, "as_of: invalid isoformat string"),
        ({"engine": "sparkle"}, "engine: string should match pattern"),
        ({"fit": {"batch_size": "many"}}, "fit.batch_size: input should be a valid integer"),
        ({"fit": {"batch_size": 0}}, "fit.batch_size: input should be greater than 0"),
        ({"dataset": {"timezone": "Mars"}}, "dataset.timezone: expected an IANA time zone"),
        ({"dataset": {"canary": ["moon"]}}, "dataset: canary names moon, which is no group"),
        (
            {"dataset": {"target": {"classes": ["early"]}}},
            "dataset.target: classes has 1 names; expected [] for binary",
        ),
        (
            {"dataset": {"target": {"task": "multiclass", "classes": ["late", "late"]}}},
            "dataset.target: classes is ['late', 'late']; expected two or more distinct names",
        ),
        (
            {"dataset": {"target": {"column": "seats"}}},
            "dataset: features name seats, which target foretells",
        ),
        ({"dataset": {"canary": []}}, "dataset.canary: list should have at least 1 item"),
        (
            {"dataset": {"features": {"schedule": {"colours": []}}}},
            "dataset.features.schedule.colours: unknown key; allowed here: categories, numbers",
        ),
        (
            {"dataset": {"tables": {"planes": {"colour": 1}}}},
            "dataset.tables.planes.colour: unknown key; allowed here: batch, key, columns",
        ),
        (
            {"orchestrate": {"tasks": {"fit": {"colour": 1}}}},
            "orchestrate.tasks.fit.colour: unknown key; allowed here: owner, retries",
        ),
        (
            {"dataset": {"features": {"aircraft": {"categories": ["origin"]}}}},
            "dataset: features name origin twice; expected once",
        ),
        (
            {"dataset": {"features": {"aircraft": {"categories": ["version"]}}}},
            "dataset: features name version, which stands beside them; rename it",
        ),
        (
            {"dataset": {"tables": {"planes": {"key": ["wings"]}}}},
            "dataset.tables.planes: key names wings, which is none of columns",
        ),
        (
            {"dataset": {"tables": {"weather": {"batch": "moon"}}}},
            "dataset.tables.weather: batch names moon, which is no timestamp of columns",
        ),
        (
            {"dataset": {"tables": {"weather": {"batch": "year"}}}},
            "dataset.tables.weather: batch names year, which is no timestamp of columns",
        ),
        ({"dataset": {"tables": {"planes": {"key": []}}}}, "planes.key: list should have at least"),
        ({"dataset": {"horizon_minutes": 10**12}}, "dataset.horizon_minutes: input should be less"),
        ({"featurize": {"test_days": 10**9}}, "featurize.test_days and val_days reach from as_of"),
        ({"score": {"window_days": 10**6}}, "score.window_days or featurize.test_days"),
        ({"as_of": "0001-01-01T00:00+05:00"}, "as_of: in UTC this is no year of the calendar"),
        ({"fit": {"seed": -1}}, "fit.seed: input should be greater than or equal to 0; got -1"),
        ({"fit": {"learning_rate": float("inf")}}, "fit.learning_rate: input should be a finite"),
        ({"fit": {"trainer": {"accelerator": "warp"}}}, "'cpu', 'gpu' or 'auto'; got 'warp'"),
        (
            {"fit": {"trainer": {"precision": "16-mixed"}}},
            "16-mixed needs a GPU; on a CPU expected",
        ),
        ({"fit": {"trainer": {"threads": 100000}}}, "should be less than or equal to 1024"),
        ({"engine": "local[0]"}, "engine: string should match pattern"),
        (
            {"fit": {"trainer": {"devices": 0}}},
            "fit.trainer.devices: input should be greater than 0",
        ),
        (
            {"tune": {"space": {"ranges": {"seed": {"low": 1, "high": 9, "log": False}}}}},
            "tune.space: seed is no key that can be tuned; expected one of batch_size, max_epochs",
        ),
        (
            {"tune": {"space": {"ranges": {"dropout": {"low": 0.5}}}}},
            "tune.space.ranges.dropout: low is 0.5, high is 0.5; expected low below high",
        ),
        (
            {"tune": {"space": {"ranges": {"dropout": {"log": True}}}}},
            "tune.space.ranges.dropout: low is 0.0; expected above 0 where log is true",
        ),
        (
            {"tune": {"space": {"ranges": {"dropout": {"high": 1.0}}}}},
            "tune.space: dropout 1.0 is none for fit: Input should be less than 1",
        ),
        (
            {"tune": {"space": {"ranges": {"members": {"high": 4.5}}}}},
            "tune.space: members 4.5 is none for fit: Input should be a valid integer",
        ),
        (
            {"tune": {"space": {"ranges": {"dropout": {"step": 1}}}}},
            "tune.space.ranges.dropout.step: unknown key; allowed here: low, high, log",
        ),
        (
            {"tune": {"space": {"choices": {"dropout": [0.1, 0.2]}}}},
            "tune.space: dropout stands in ranges and in choices; expected once",
        ),
        (
            {"tune": {"space": {"choices": {"hidden": [[8], [0]]}}}},
            "tune.space: hidden [0] is none for fit: Input should be greater than 0",
        ),
        ({"tune": {"storage": "tune.db"}}, "tune.storage: string should match pattern"),
        ({"evaluate": {"min_auc": 2}}, "evaluate.min_auc: input should be less than or equal to 1"),
        (
            {"dataset": {"tables": {"planes": {"columns": {"seats": "number"}}}}},
            "'int', 'long', 'float'",
        ),
    ],
)
def test_a_wrong_key_is_one_line(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = _written(tmp_path, change)
    with pytest.raises(UserError) as raised:
        params.load(path)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["as_of", "fetch", "fit", "tracking"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    del values[key]
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=f"{key}: missing key"):
        params.load(path)


def test_no_table_is_one_line(tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["dataset"]["tables"] = {}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"dataset\.tables: dictionary should have at least 1 item"):
        params.load(path)


def test_a_key_that_stands_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text() + "\nengine: embedded\n")
    with pytest.raises(UserError, match=r"params\.yaml .*key engine stands twice .*line \d+"):
        params.load(path)


def test_what_is_no_mapping_names_the_keys_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("- 1\n")
    with pytest.raises(
        UserError, match="expected the keys as_of, engine, fetch, load, validate, feat"
    ):
        params.load(path)


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [\n", "\x00"])
def test_what_is_no_mapping_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"params\.yaml"):
        params.load(path)


def test_the_splits_follow_from_the_clock(params: params.Params) -> None:
    assert (params.as_of - params.test_from).days == params.featurize.test_days
    assert (params.test_from - params.val_from).days == params.featurize.val_days


def _written(folder: Path, change: dict[str, object]) -> Path:
    from world import merged

    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(merged(values, change)))
    return path
