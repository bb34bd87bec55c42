"""Never a green end with wrong bytes in the remote, and a second push heals."""

import hashlib
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc.repo import Repo

from pipelines.errors import UserError
from pipelines.orchestrate import store

TRIALS = 200
FILES = 6
STAGE = """\
stages:
  make:
    cmd: "true"
    outs: [out]
"""


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[Repo]:
    """A repository whose one stage made a folder of files, with a folder as its remote."""
    made = Repo.init(str(tmp_path / "repo"), no_scm=True)
    with made.config.edit() as config:
        config["core"] = {"remote": "store", "analytics": False, "no_scm": True}
        config["core"]["site_cache_dir"] = str(tmp_path / "site")
        config["remote"] = {"store": {"url": str(tmp_path / "remote"), "verify": True}}
    root = Path(made.root_dir)
    (root / "dvc.yaml").write_text(STAGE)
    folder = root / "out"
    folder.mkdir()
    content = random.Random(0)
    for number in range(FILES):
        (folder / f"{number}.bin").write_bytes(content.randbytes(150_000 + number))
    with Repo(str(root)) as opened:
        opened.commit(force=True)
    with Repo(str(root)) as opened:
        yield opened


def _outs(repo: Repo) -> list:  # type: ignore[type-arg]
    return [out for stage in repo.index.stages for out in stage.outs]


def _objects(folder: Path) -> dict[str, Path]:
    """The objects under a DVC folder of objects, by id."""
    return {
        file.parent.name + file.name: file
        for file in (folder / "files" / "md5").rglob("*")
        if re.fullmatch(r"[0-9a-f]{32}(\.dir)?", file.parent.name + file.name)
    }


def _right(file: Path, oid: str) -> bool:
    return hashlib.md5(file.read_bytes()).hexdigest() == oid.removesuffix(".dir")


def _complete(remote: Path, wanted: set[str]) -> bool:
    held = _objects(remote)
    return wanted <= set(held) and all(_right(held[oid], oid) for oid in wanted)


def _killed_give(repo: Repo, after: float) -> int:
    """`give` in a process of its own, killed after so many seconds; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            store.give(repo, _outs(repo))
        except BaseException:
            os._exit(1)
        os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _harm(remote: Path, chance: random.Random) -> None:
    """Truncate, alter or remove some objects, as a disk or a person might."""
    for file in sorted(_objects(remote).values()):
        if chance.random() > 0.4:
            continue
        file.chmod(0o644)
        content = bytearray(file.read_bytes())
        what = chance.choice(["cut", "flip", "empty", "gone"])
        if what == "gone":
            file.unlink()
            continue
        if what == "flip":
            content[chance.randrange(len(content))] ^= 0xFF
        size = {"cut": chance.randrange(len(content)), "flip": len(content), "empty": 0}[what]
        file.write_bytes(bytes(content[:size]))


def test_no_kill_and_no_damage_ends_green_with_wrong_bytes(repo: Repo, tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    begun = time.monotonic()
    store.give(repo, _outs(repo))
    usual = time.monotonic() - begun
    wanted = set(store.objects(_outs(repo)))
    assert len(wanted) == FILES + 1
    killed = 0
    for trial in range(TRIALS):
        chance = random.Random(trial)
        if chance.random() < 0.5:
            shutil.rmtree(remote)
        else:
            _harm(remote, chance)
        status = _killed_give(repo, chance.random() * usual * 1.5)
        killed += os.WIFSIGNALED(status)
        if status == 0:
            assert _complete(remote, wanted), trial
        store.give(repo, _outs(repo))
        assert _complete(remote, wanted), trial
    assert TRIALS / 10 < killed < TRIALS, "kills must meet the push at all its moments"


def test_a_damaged_cache_is_no_green_end_and_is_dropped(repo: Repo, tmp_path: Path) -> None:
    cache = _objects(Path(repo.root_dir) / ".dvc" / "cache")
    oid, file = next((oid, file) for oid, file in cache.items() if not oid.endswith(".dir"))
    file.chmod(0o644)
    file.write_bytes(b"other")
    with pytest.raises(RuntimeError, match=f"{oid} .*arrived damaged"):
        store.give(repo, _outs(repo))
    assert not file.exists()
    assert oid not in _objects(tmp_path / "remote")


@pytest.mark.parametrize("trial", range(12))
def test_taken_bytes_are_right_or_there_is_an_error(repo: Repo, tmp_path: Path, trial: int) -> None:
    store.give(repo, _outs(repo))
    out = Path(repo.root_dir) / "out"
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    shutil.rmtree(out)
    shutil.rmtree(Path(repo.root_dir) / ".dvc" / "cache")
    if trial:
        _harm(tmp_path / "remote", random.Random(trial))
    with Repo(repo.root_dir) as fresh:
        whole = store.intact(fresh, _outs(fresh))
        if whole:
            store.take(fresh, _outs(fresh))
            assert {file.name: file.read_bytes() for file in out.iterdir()} == before
        else:
            with pytest.raises(UserError, match=r"out cannot be had: .* task make"):
                store.take(fresh, _outs(fresh))
    assert whole == (trial == 0)


def test_a_cache_object_torn_in_place_is_fetched_anew(repo: Repo, tmp_path: Path) -> None:
    """DVC takes a read-only file of its cache for right; the next task must not."""
    store.give(repo, _outs(repo))
    out = Path(repo.root_dir) / "out"
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    shutil.rmtree(out)
    for oid, file in _objects(Path(repo.root_dir) / ".dvc" / "cache").items():
        if not oid.endswith(".dir"):
            content = bytearray(file.read_bytes())
            content[7] ^= 0xFF
            file.chmod(0o644)
            file.write_bytes(bytes(content))
            file.chmod(0o444)
            break
    with Repo(repo.root_dir) as fresh:
        store.take(fresh, _outs(fresh))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_remote_that_does_not_answer_is_a_fault_and_no_mistake(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.give(repo, _outs(repo))
    shutil.rmtree(Path(repo.root_dir) / ".dvc" / "cache")
    with Repo(repo.root_dir) as fresh:
        monkeypatch.setattr(type(fresh.cloud), "pull", lambda *_, **__: None)  # 503, swallowed
        with pytest.raises(RuntimeError, match="did not give it"):
            store.take(fresh, _outs(fresh))
