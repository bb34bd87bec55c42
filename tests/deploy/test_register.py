"""register acts by content: told twice, or by many at once, it acts once."""

import json
import signal
import time
from pathlib import Path

import pytest
from deploy.tiny import make_bundle
from world import Checkout

from pipelines import bundle, stage, tracking
from pipelines.deploy import register
from pipelines.errors import UserError

REGISTER = "pipelines.deploy.register"


def _versions(checkout: Checkout) -> dict[str, str]:
    """Bundle hash by version number, every version of the model."""
    store, _ = tracking.client(checkout.params())
    found = store.search_model_versions("name = 'flights'")
    return {str(version.version): version.tags["bundle"] for version in found}


def _aliases(checkout: Checkout) -> dict[str, str]:
    store, _ = tracking.client(checkout.params())
    return {k: str(v) for k, v in store.get_registered_model("flights").aliases.items()}


def test_the_same_bundle_is_one_version_and_the_next_a_challenger(checkout: Checkout) -> None:
    params = checkout.params()
    first = make_bundle()
    register.run(params)
    register.run(params)
    assert _versions(checkout) == {"1": first}
    assert _aliases(checkout) == {"champion": "1"}
    entry = json.loads(register.record(params, first).read_text())
    assert entry == {"bundle": first, "model": "flights", "version": 1}
    assert json.loads(register.RECORD.read_text()) == entry | {"aliases": ["champion"]}

    second = make_bundle(shift=0.1)
    register.run(params)
    assert _versions(checkout) == {"1": first, "2": second}
    assert _aliases(checkout) == {"champion": "1", "challenger": "2"}

    make_bundle()
    register.run(params)
    assert _versions(checkout) == {"1": first, "2": second}
    assert _aliases(checkout) == {"champion": "1", "challenger": "2"}


def test_a_bundle_that_did_not_pass_is_neither_champion_nor_challenger(checkout: Checkout) -> None:
    make_bundle(passed=False)
    register.run(checkout.params())
    assert _aliases(checkout) == {}
    assert json.loads(register.RECORD.read_text())["aliases"] == []


def test_a_bundle_that_nobody_could_open_is_no_version(checkout: Checkout) -> None:
    make_bundle()
    for file in (bundle.FOLDER / bundle.MODEL, bundle.FOLDER / bundle.REFERENCE):
        content = file.read_bytes()
        for damaged in (b"", content[: len(content) // 2], b"\xff" * 1000):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=f"^{file}: "):
                register.run(checkout.params())
        file.write_bytes(content)
    assert not register.RECORD.exists()
    register.run(checkout.params())
    assert list(_versions(checkout)) == ["1"]


def test_an_older_bundle_registered_again_takes_no_alias(checkout: Checkout) -> None:
    for shift in (0.0, 0.1, 0.2, 0.1):
        make_bundle(shift)
        register.run(checkout.params())
    assert _aliases(checkout) == {"champion": "1", "challenger": "3"}


def test_the_version_holds_the_bundle_byte_for_byte(checkout: Checkout) -> None:
    import mlflow

    digest = make_bundle()
    register.run(checkout.params())
    tracking.client(checkout.params())
    copy = Path(mlflow.artifacts.download_artifacts("models:/flights@champion", dst_path="copy"))
    assert stage.digest(copy / "extra_files") == digest


def test_two_at_once_leave_one_version(checkout: Checkout) -> None:
    digest = make_bundle()
    tracking.client(checkout.params())
    both = [checkout.start(REGISTER) for _ in range(2)]
    ends = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert list(_versions(checkout).values()) == [digest]
    assert list(_aliases(checkout)) == ["champion"]


@pytest.mark.parametrize("seconds", [4.0, 5.5, 7.0])
def test_a_killed_registration_is_finished_by_the_next(checkout: Checkout, seconds: float) -> None:
    digest = make_bundle()
    process = checkout.start(REGISTER)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    ended = checkout.run(REGISTER)
    assert ended.status == 0, ended
    assert list(_versions(checkout).values()) == [digest]
    assert _aliases(checkout) == {"champion": next(iter(_versions(checkout)))}
