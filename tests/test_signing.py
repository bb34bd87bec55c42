"""A signature says which bundle is which version; an older one counts only where it is accepted."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from world import ROOT

from pipelines import signing
from pipelines.errors import UserError

STATEMENT = {"model": "flights", "version": 3, "bundle": "ab" * 32}


@pytest.fixture(autouse=True)
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "keys" / "signing.pem"
    monkeypatch.setenv(signing.VARIABLE, str(file))
    return file


def test_what_was_signed_is_taken_whatever_the_order_of_its_keys(key: Path) -> None:
    signature = signing.sign(STATEMENT)
    signing.check(dict(reversed(STATEMENT.items())), signature, at_least=3)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.mark.parametrize("change", [{"model": "other"}, {"version": 4}, {"bundle": "cd" * 32}])
def test_another_statement_is_refused(change: dict[str, object]) -> None:
    signature = signing.sign(STATEMENT)
    with pytest.raises(UserError, match="its signature is not of"):
        signing.check(STATEMENT | change, signature)


@pytest.mark.parametrize("signature", ["", "AAAA", "no base64!", "é", "A" * 88])
def test_another_signature_is_refused(signature: str) -> None:
    signing.sign(STATEMENT)
    with pytest.raises(UserError, match="its signature is not of"):
        signing.check(STATEMENT, signature)


def test_an_older_version_that_was_signed_once_is_refused() -> None:
    signature = signing.sign(STATEMENT)
    with pytest.raises(UserError, match="flights version 3 is older than the smallest accepted, 4"):
        signing.check(STATEMENT, signature, at_least=4)


def test_whoever_checks_needs_only_the_public_key(key: Path) -> None:
    signature = signing.sign(STATEMENT)
    key.unlink()
    signing.check(STATEMENT, signature)
    key.with_suffix(".pub").unlink()
    with pytest.raises(UserError, match="no public key"):
        signing.check(STATEMENT, signature)


def test_the_environment_may_hold_the_key_itself(
    key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature, public = signing.sign(STATEMENT), signing.public().decode()
    for pem in (key.read_text(), public):
        monkeypatch.setenv(signing.VARIABLE, pem)
        signing.check(STATEMENT, signature)
    with pytest.raises(UserError, match="HEADRACE_SIGNING_KEY: no private key"):
        signing.sign(STATEMENT)
    monkeypatch.setenv(signing.VARIABLE, "-----BEGIN nothing")
    with pytest.raises(UserError, match="HEADRACE_SIGNING_KEY: no public key"):
        signing.check(STATEMENT, signature)


def test_many_that_sign_for_the_first_time_agree_on_one_key() -> None:
    code = f"from pipelines import signing; print(signing.sign({STATEMENT!r}))"
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    signatures = {process.communicate()[0].strip() for process in both}
    assert len(signatures) == 1, json.dumps(sorted(signatures))
    signing.check(STATEMENT, signatures.pop())


def test_a_file_that_is_no_key_is_named(key: Path) -> None:
    key.parent.mkdir()
    key.write_text("x")
    with pytest.raises(UserError, match=r"signing\.pem: no private key"):
        signing.sign(STATEMENT)
