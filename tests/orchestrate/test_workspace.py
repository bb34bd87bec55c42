"""A workspace is a checkout of its own at the run's commit, with the run's params in it."""

import fcntl
import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from orchestrate.place import commit, git, repository

from pipelines import params as parameters
from pipelines.errors import UserError
from pipelines.orchestrate import workspace
from pipelines.orchestrate.workspace import Run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, half_year: Path) -> Path:
    return repository(tmp_path_factory.mktemp("workspace") / "home", half_year)


def set_source(home: Path, source: str) -> None:
    path = home / "params.yaml"
    values = yaml.safe_load(path.read_text())
    values["fetch"]["source"] = source
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    commit(home, f"source: {source}")


def _run(home: Path, id_: str, **overrides: object) -> Run:
    return Run(id_, git(home, "rev-parse", "HEAD"), overrides)


def test_every_attempt_has_a_folder_of_its_own_and_the_same_commit(
    home: Path, tmp_path: Path
) -> None:
    run = _run(home, "r", as_of="2013-05-01", **{"fit.max_epochs": 3})
    with workspace.opened(home, run, "fit") as one, workspace.opened(home, run, "fit") as other:
        assert one != other
        assert git(one, "rev-parse", "HEAD") == git(other, "rev-parse", "HEAD") != run.commit
        assert git(one, "status", "--porcelain") == ""
        values = yaml.safe_load((one / "params.yaml").read_text())
        assert (values["as_of"], values["fit"]["max_epochs"]) == ("2013-05-01", 3)
        changed = git(one, "diff", "--stat", "HEAD~1")
        assert "1 file changed, 2 insertions(+), 2 deletions(-)" in changed
    # Another worker, with another clone, makes the same commit.
    git(tmp_path, "clone", "-q", str(home), "elsewhere")
    with workspace.opened(tmp_path / "elsewhere", run, "fit") as elsewhere:
        assert git(elsewhere, "rev-parse", "HEAD") == git(one, "rev-parse", "HEAD")


def test_a_worker_behind_fetches_the_commit(home: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", str(home), "behind")
    (home / "new.txt").write_text("new")
    git(home, "add", "new.txt")
    git(home, "commit", "-qm", "new")
    with workspace.opened(tmp_path / "behind", _run(home, "r2"), "fetch") as folder:
        assert (folder / "new.txt").is_file()


def test_a_folder_of_raw_files_is_there_whole_though_git_tracks_a_part(home: Path) -> None:
    source = home / "my" / "folder"
    source.mkdir(parents=True)
    (source / "old.csv").write_text("old")
    set_source(home, "my/folder")
    (source / "new.csv").write_text("new")
    with workspace.opened(home, _run(home, "r3"), "fetch") as folder:
        assert (folder / "my" / "folder" / "new.csv").is_file()
    # What is named in full is read where it is.
    set_source(home, str(source))
    with workspace.opened(home, _run(home, "r4"), "fetch"):
        assert sorted(one.name for one in source.iterdir()) == ["new.csv", "old.csv"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"fit.epochs": 3}, "params.yaml has no key fit.epochs"),
        ({"fit.max_epochs": 0}, "params.yaml: fit.max_epochs: input should be greater than 0"),
        ({"as_of": "yesterday"}, "params.yaml: as_of: "),
    ],
)
def test_a_wrong_override_is_one_line(home: Path, overrides: dict[str, object], said: str) -> None:
    run = Run("wrong", git(home, "rev-parse", "HEAD"), overrides)
    with pytest.raises(UserError, match=said), workspace.opened(home, run, "begin"):
        pass


KEYS = st.sampled_from(["a", "b.c", "b.d", "e"])


@settings(max_examples=50)
@given(
    changes=st.dictionaries(
        KEYS, st.integers(-5, 5) | st.booleans() | st.text(st.characters(codec="ascii"), max_size=9)
    )
)
def test_an_override_changes_its_value_and_nothing_else(changes: dict[str, object]) -> None:
    text = "# first\na: 1  # one\nb:\n  c: [1, 2]\n  # why\n  d: 'x: y'\ne: {f: 1}\n"
    wanted = yaml.safe_load(text)
    for key, value in changes.items():
        text = workspace._with(text, key, value)
        *way, last = key.split(".")
        held = wanted
        for part in way:
            held = held[part]
        held[last] = value
    assert yaml.safe_load(text) == wanted
    assert "# first" in text
    assert "# one" in text
    assert "# why" in text


def test_old_runs_are_collected_unless_at_work(tmp_path: Path) -> None:
    base = tmp_path / workspace.ROOT
    for age, name in enumerate(["newest", "newer", "working", "old"]):
        (base / name / "fit-1").mkdir(parents=True)
        os.utime(base / name, (time.time() - age * 60,) * 2)
    (base / ".gone.17" / "fit-1").mkdir(parents=True)  # of a collector that was killed
    lock = base / "working" / ".fit-1.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        os.utime(base / "working", (time.time() - 120,) * 2)
        assert workspace.collect(tmp_path, 2) == ["old"]
    assert sorted(one.name for one in base.iterdir()) == ["newer", "newest", "working"]


def test_a_worker_collects_what_it_leaves(home: Path) -> None:
    keep = parameters.load(home / "params.yaml").orchestrate.keep
    for number in range(keep + 2):
        with workspace.opened(home, _run(home, f"many-{number}"), "begin"):
            pass
    left = [one.name for one in (home / workspace.ROOT).iterdir()]
    assert len(left) == keep
    assert f"many-{keep + 1}" in left
