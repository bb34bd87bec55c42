"""The model card says what the stages found, and nobody wrote it."""

import json
import re

import numpy as np
import pytest
from deploy import bundles
from hypothesis import given
from hypothesis import strategies as st
from world import Checkout

from pipelines import bundle, metrics, stage
from pipelines.errors import UserError
from pipelines.explain import Explained
from pipelines.train import card, evaluate


def _interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


@pytest.fixture
def judged(checkout: Checkout) -> Checkout:
    """With a tiny bundle, and verdicts as the stages before write them."""
    folder = checkout.folder / bundle.FOLDER
    bundles.make(folder)
    contract = json.loads((folder / bundle.CONTRACT).read_text())
    params = checkout.params()
    contract["params"] = {
        "fit": params.fit.model_dump(),
        "featurize": params.featurize.model_dump(),
    }
    stage.write_json(folder / bundle.CONTRACT, contract)
    random = np.random.default_rng(3)
    label = random.integers(0, 2, 4000)
    probability = np.clip(0.3 * label + random.random(4000) * 0.7, 0, 1)
    months = np.repeat(["2013-04", "2013-05"], 2000)
    by_origin = evaluate.cut(label, probability, random.choice(["EWR", "J|K"], 4000), "binary", 0.5)
    verdicts = {
        "validate": {"rows": 4321, "quarantined": 7},
        "package": {"model_bytes": 12345, "parity": 3e-7},
        "evaluate": {
            "rows": {"train": 2000, "val": 1000, "test": 987},
            "task": "binary", "passed": True, "reasons": [],
            "metrics": {name: _interval(0.2 + at / 10) for at, name in enumerate(metrics.NAMES)},
            "baseline": {name: _interval(0.5) for name in metrics.NAMES},
            "months": evaluate.cut(label, probability, months, "binary", 0.5),
            "slices": {"origin": by_origin},
            "fairness": {"origin": evaluate.apart(by_origin)},
            "few": evaluate.FEW,
            "behaviour": [{"name": "more", "before": 0.1, "after": 0.2, "passed": True}],
        },
    }  # fmt: skip
    for name, verdict in verdicts.items():
        stage.write_json(checkout.folder / "reports" / name / "verdict.json", verdict)
    return checkout


def test_every_part_is_filled_and_it_repeats(judged: Checkout) -> None:
    card.run(judged.params())
    text = card.CARD.read_text()
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings == [
        "Use", "Limits", "Data", "Figures", "Calibration by month", "How far slices lie apart",
        "By origin", "Behaviour", "What moves it most", "How it was made",
    ]  # fmt: skip
    for said in (
        "4,321 events, of which 7 broke", "2,000 rows to learn from", "passed every check",
        "| AUC | 0.2000 (0.1900 to 0.2100) | 0.5000 (0.4900 to 0.5100) |", "| 2013-05 | 2,000 |",
        "| more | 0.1000 | 0.2000 | yes |", stage.digest(bundle.FOLDER)[:12], "12,345 bytes",
    ):  # fmt: skip
        assert said in text, said
    card.run(judged.params())
    assert card.CARD.read_text() == text
    assert stage.is_page_of(card.PAGE, card.CARD)


def test_a_form_is_named_with_figures_of_its_own(judged: Checkout) -> None:
    card.run(judged.params())
    assert "as it was fitted" not in card.CARD.read_text()
    path = judged.folder / bundle.FOLDER / bundle.CONTRACT
    contract = json.loads(path.read_text())
    figures = {"auc": 0.6123, "log_loss": 0.4321}
    stage.write_json(path, contract | {"form": "int8", "metrics": figures})
    card.run(judged.params())
    said = "the bundle holds its form int8, which has AUC 0.6123 and log loss 0.4321 there."
    assert said in card.CARD.read_text()


def test_the_page_shows_tables_and_takes_nothing_for_html() -> None:
    shown = card.page("# A <b>\n\n| a | b |\n| --- | --- |\n| J\\|K | <script>x</script> |\n", "t<")
    assert "<td>J|K</td>" in shown
    assert "<script" not in shown
    assert "<title>t&lt;</title>" in shown


def test_what_moves_it_most_stands_first(judged: Checkout) -> None:
    card.run(judged.params())
    text = card.CARD.read_text().partition("## What moves it most")[2].partition("##")[0]
    line = re.compile(r"^\| (?:origin|x|y) \| ([\d.]+) ± [\d.]+ \|$", re.M)
    sizes = [float(size) for size in line.findall(text)]
    assert len(sizes) == 3
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 0


@given(st.integers(0, 10_000))
def test_the_size_of_what_a_column_adds_is_told_without_the_noise_of_its_estimate(
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    sizes, noise = np.array([0.0, 0.01, 0.03, 0.1]), 0.03
    true = random.normal(size=(400, 4)) * sizes
    found = [Explained(0.0, row + random.normal(size=4) * noise, np.full(4, noise)) for row in true]
    told, errors = card.size(found)
    # Of squares of normal numbers: near zero the root's own error is no normal number's.
    spread = (sizes**2 + noise**2) * np.sqrt(2 / len(found))
    assert np.all(np.abs(told**2 - sizes**2) <= 5 * spread)
    assert spread[-1] / 4 < told[-1] * errors[-1] < spread[-1]
    assert np.all(errors < 0.02)


def test_a_model_that_did_not_pass_says_why(judged: Checkout) -> None:
    path = judged.folder / "reports" / "evaluate" / "verdict.json"
    verdict = json.loads(path.read_text())
    stage.write_json(path, verdict | {"passed": False, "reasons": ["AUC 0.2 is below", "more"]})
    card.run(judged.params())
    assert "it **did not pass**: AUC 0.2 is below; more." in card.CARD.read_text()


def test_it_asks_the_question_of_its_target(judged: Checkout) -> None:
    card.run(judged.params())
    assert "more than 15 minutes late" in card.CARD.read_text()
    minutes = {"column": "minutes", "task": "regression", "classes": []}
    judged.set(dataset={"target": minutes})
    card.run(judged.params())
    assert "How many minutes late" in card.CARD.read_text()
    judged.set(dataset={"target": minutes | {"column": "hours"}})
    with pytest.raises(UserError, match=r"contract\.yaml: purpose: hours, which dataset\.target"):
        card.run(judged.params())


def test_it_says_where_the_baseline_is_surely_better(judged: Checkout) -> None:
    path = judged.folder / "reports" / "evaluate" / "verdict.json"
    verdict = json.loads(path.read_text())
    better = {"auc": 0.4, "ap": 0.6, "log_loss": 0.6, "brier": 0.4, "calibration_error": 0.505}
    figures = {name: _interval(value) for name, value in better.items()}
    stage.write_json(path, verdict | {"metrics": figures})
    card.run(judged.params())
    assert "Gradient boosting is surely better in AUC, log loss." in card.CARD.read_text()


def test_of_few_rows_nothing_is_said(judged: Checkout) -> None:
    path = judged.folder / "reports" / "evaluate" / "verdict.json"
    verdict = json.loads(path.read_text())
    verdict["slices"]["origin"]["JFK"] = verdict["slices"]["origin"]["EWR"] | {"rows": 499}
    stage.write_json(path, verdict)
    card.run(judged.params())
    assert "| JFK | 499 |  |  |  |  |" in card.CARD.read_text()


def test_a_contract_without_limits_is_one_line(
    judged: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = judged.folder / "pipelines/ingest/datasets/flights/contract.yaml"
    text = path.read_text()
    path.write_text(re.sub(r"^limits:\n(  .*\n)+", "limits: []\n", text, flags=re.M))
    with pytest.raises(UserError, match=r"contract\.yaml: limits: list should have at least 1"):
        card.run(judged.params())


def test_slices_that_are_alike_do_not_lie_apart() -> None:
    label = np.tile([0, 1, 0, 0], 500)
    probability = np.tile([0.1, 0.9, 0.6, 0.2], 500)
    values = np.repeat(["a", "b"], 1000)
    found = evaluate.apart(evaluate.cut(label, probability, values, "binary", 0.5))
    assert found == {
        "values": 2, "left_out": 0,
        "flagged": 0.0, "caught": 0.0, "false_alarms": 0.0, "calibration": 0.0,
    }  # fmt: skip
    # All of b is flagged: those of the label already were, and a third of the others.
    worse = np.where(values == "b", 0.9, probability)
    apart = evaluate.apart(evaluate.cut(label, worse, values, "binary", 0.5))
    assert (apart["flagged"], apart["caught"]) == (0.5, 0.0)
    assert apart["false_alarms"] == pytest.approx(2 / 3, abs=1e-6)
    few = np.append(np.repeat("a", 1999), "b")
    alone = evaluate.apart(evaluate.cut(label, probability, few, "binary", 0.5))
    assert (alone["left_out"], alone["flagged"], alone["calibration"]) == (1, None, None)
