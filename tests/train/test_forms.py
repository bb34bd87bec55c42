"""Of the forms of a network the smallest that loses little is packaged; it repeats, and is safe."""

import subprocess
import sys
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from world import Checkout, narrowed

from pipelines import bundle, metrics, stage
from pipelines.errors import UserError
from pipelines.train import fit, forms, package

ALL = ["int8", "pruned", "distilled"]
ANY = 9.0  # a rise of the loss that none exceeds
KEYS = {"bytes", "within", *metrics.NAMES}


@pytest.fixture
def evaluated(features: Checkout) -> Checkout:
    """A checkout with a model of two hidden layers, and what package reads of its evaluation."""
    path = features.folder / "params.yaml"
    path.write_text(yaml.safe_dump(narrowed(yaml.safe_load(path.read_text())), sort_keys=False))
    features.set(fit={"hidden": [64, 32]}, package={"distilled": {"hidden": [8], "epochs": 2}})
    fit.run(features.params())
    stage.write_json(package.EVALUATION, {"metrics": {"auc": {"value": 0.7}}, "passed": True})
    return features


def _packaged(checkout: Checkout, names: list[str], max_loss_rise: float = ANY) -> dict[str, Any]:
    """The verdict."""
    checkout.set(package={"forms": names, "max_loss_rise": max_loss_rise})
    package.run(checkout.params())
    return dict(stage.read_json(package.VERDICT))


def _contract() -> dict[str, Any]:
    return dict(stage.read_json(bundle.FOLDER / bundle.CONTRACT))


def test_every_form_is_measured_and_the_smallest_packaged_the_same_bytes_twice(
    evaluated: Checkout,
) -> None:
    verdict = _packaged(evaluated, ALL)
    found, bytes_ = stage.digest(bundle.FOLDER), package.VERDICT.read_bytes()
    assert sorted(verdict["forms"]) == sorted([forms.PLAIN, *ALL])
    assert all(set(one) == KEYS for one in verdict["forms"].values())  # nothing that is timed
    sizes = {name: one["bytes"] for name, one in verdict["forms"].items()}
    assert all(sizes[name] < sizes[forms.PLAIN] for name in ALL)
    assert verdict["form"] == _contract()["form"] == min(sizes, key=lambda name: sizes[name])
    assert verdict["model_bytes"] == sizes[verdict["form"]]
    assert stage.is_page_of(package.PAGE, package.VERDICT)
    assert all(f"| {name} |" in package.PAGE.read_text() for name in verdict["forms"])

    assert _packaged(evaluated, ALL) == verdict
    assert package.VERDICT.read_bytes() == bytes_
    assert stage.digest(bundle.FOLDER) == found


def test_a_bundle_of_each_form_is_verified_and_measured_as_it_is(evaluated: Checkout) -> None:
    _packaged(evaluated, [])
    plain = (bundle.FOLDER / bundle.MODEL).stat().st_size
    for name in ALL:
        verdict = _packaged(evaluated, [name])
        held = bundle.verified(bundle.FOLDER, stage.digest(bundle.FOLDER))
        assert held.contract["form"] == name
        assert len(held.model) < plain
        assert set(held.contract["params"]["package"]) == {"max_loss_rise", name} - {"int8"}
        assert set(held.contract["metrics"]) == set(metrics.NAMES)
        reference = pq.read_table(bundle.FOLDER / bundle.REFERENCE)
        answers = bundle.load(bundle.FOLDER).predict(reference)
        assert (answers == reference["prediction"].to_numpy()).all()
        figures = metrics.point(reference["label"].to_numpy(), answers)  # of all validation rows
        assert figures.items() <= verdict["forms"][name].items()
        assert figures["auc"] > 0.6


def test_members_that_share_their_units_have_forms_too(evaluated: Checkout) -> None:
    evaluated.set(fit={"model": "tabm", "members": 4})
    fit.run(evaluated.params())
    for name in ("int8", "pruned"):
        assert _packaged(evaluated, [name])["form"] == name
        bundle.verify(bundle.FOLDER, stage.digest(bundle.FOLDER))


def test_a_model_without_units_is_refused_in_one_line(evaluated: Checkout) -> None:
    _packaged(evaluated, [])
    found = stage.digest(bundle.FOLDER)
    evaluated.set(fit={"model": "logistic"})
    fit.run(evaluated.params())
    with pytest.raises(UserError, match=r"pruned, but logistic .+ has no unit to prune"):
        _packaged(evaluated, ["pruned"])
    assert stage.digest(bundle.FOLDER) == found
    assert _packaged(evaluated, ["int8"])["forms"]["int8"]["within"]


def test_where_all_lose_too_much_the_bundle_is_that_of_no_form(evaluated: Checkout) -> None:
    _packaged(evaluated, ["int8"])
    none = _packaged(evaluated, [])
    assert not package.PAGE.exists()
    assert set(none) == {"parity", "rows", "model_bytes"}
    assert "form" not in _contract()
    found = stage.digest(bundle.FOLDER)
    evaluated.set(package={"distilled": {"hidden": [1], "epochs": 1}})
    verdict = _packaged(evaluated, ["distilled"], 0.0)
    assert verdict["form"] == forms.PLAIN
    assert not verdict["forms"]["distilled"]["within"]
    assert stage.digest(bundle.FOLDER) == found


def _figures(**losses: tuple[int, float]) -> dict[str, dict[str, Any]]:
    return {name: {"bytes": size, "log_loss": loss} for name, (size, loss) in losses.items()}


@pytest.mark.parametrize(
    ("others", "best"),
    [
        ({}, "plain"),
        ({"a": (90, 0.402), "b": (80, 0.401)}, "b"),
        ({"a": (90, 0.402), "b": (80, 0.402001)}, "a"),  # the rise of a is the limit itself
        ({"a": (90, 0.403), "b": (80, 0.5)}, "plain"),
        ({"a": (100, 0.1)}, "plain"),  # better, and no smaller
        ({"a": (90, 0.4), "b": (90, 0.1)}, "a"),
    ],
)
def test_the_fewest_bytes_within_the_limit_are_chosen(
    others: dict[str, tuple[int, float]], best: str
) -> None:
    assert forms.smallest(_figures(plain=(100, 0.4), **others), "log_loss", 0.002) == best


def test_without_forms_nothing_of_training_is_imported() -> None:
    code = "import pipelines.train.package, sys; sys.exit('pytorch_lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
