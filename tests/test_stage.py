"""Outputs appear whole or not at all; every error is one line and the right status."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from world import ROOT

from pipelines import stage


def test_a_folder_takes_its_place_when_it_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with stage.fresh(out) as partial:
        (partial / "new").write_text("new")
        assert (out / "old").exists()
    assert [path.name for path in out.iterdir()] == ["new"]


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def fail() -> None:
        with stage.fresh(out) as partial:
            (partial / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == [out]
    assert list(out.iterdir()) == []


def test_a_killed_writer_leaves_nothing_at_the_place(tmp_path: Path) -> None:
    code = f"""
        import os, signal
        from pathlib import Path
        from pipelines import stage
        with stage.fresh(Path({str(tmp_path / "out")!r})) as partial:
            (partial / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with stage.fresh(tmp_path / "out") as partial:
        assert list(partial.iterdir()) == []


@given(
    value=st.recursive(
        st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_json_round_trips_and_repeats(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    path = tmp_path_factory.mktemp("json") / "value.json"
    stage.write_json(path, value)
    first = path.read_bytes()
    stage.write_json(path, stage.read_json(path))
    assert stage.read_json(path) == value
    assert path.read_bytes() == first


def test_the_digest_names_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    before = stage.digest(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert stage.digest(tmp_path / "a") != before
    (tmp_path / "a" / "y").rename(tmp_path / "a" / "x")
    assert stage.digest(tmp_path / "a") == before


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        ("UserError('data/x.csv: line 3')", 2, "demo: error: data/x.csv: line 3"),
        ("ValueError('a\\nb')", 1, "demo: fault: ValueError: a b"),
        ("KeyboardInterrupt()", 130, "demo: interrupted"),
        (
            f"OSError({errno.ENOSPC}, 'full', 'data/x')",
            1,
            "demo: fault: no space left on the disk while writing data/x",
        ),
    ],
)
def test_an_error_is_one_line_and_a_status(
    tmp_path: Path, raised: str, status: int, said: str
) -> None:
    (tmp_path / "demo.py").write_text(
        "'''demo: raises.'''\nfrom pipelines import stage\nfrom pipelines.errors import UserError\n"
        f"def run(params):\n    raise {raised}\nstage.main(run)\n"
    )
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    env = os.environ | {"PYTHONPATH": f"{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "demo"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status
    assert done.stderr.splitlines()[-1] == said
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "ingest.fetch", "ingest.load", "ingest.validate", "ingest.featurize",
        "train.fit", "train.evaluate", "train.package", "train.card",
        "deploy.score", "deploy.drift",
        "deploy.register", "deploy.gate", "deploy.champion",
    ],
)  # fmt: skip
def test_help_says_what_comes_in_and_goes_out(module: str) -> None:
    source = (ROOT / "pipelines" / f"{module.replace('.', '/')}.py").read_text()
    doc = source.split('"""')[1]
    assert doc.startswith(module.rpartition(".")[2] + ": ")
    for part in ("in:", "out:", "run:"):
        assert f"\n{part}" in doc
    assert "stage.main(run)" in source


def test_a_full_disk_in_an_engine_names_the_place(tmp_path: Path) -> None:
    """An engine tells of it in text, inside errors of its own."""
    with pytest.raises(OSError, match="space") as raised, stage.fresh(tmp_path / "out"):
        raise RuntimeError("execution failed: IO error: No space left on device (os error 28)")
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_json_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        stage.write_json(tmp_path / "value.json", "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_a_page_belongs_to_the_verdict_it_was_made_with(tmp_path: Path) -> None:
    page, verdict = tmp_path / "page.html", tmp_path / "verdict.json"

    def make(value: int, broken: bool = False) -> None:
        with stage.page(page, verdict):
            page.write_text(str(value))
            if broken:
                raise RuntimeError
            stage.write_json(verdict, value)

    make(1)
    assert stage.is_page_of(page, verdict)
    stage.write_json(verdict, 2)
    assert not stage.is_page_of(page, verdict)
    make(2)
    assert stage.is_page_of(page, verdict)
    with pytest.raises(RuntimeError):
        make(3, broken=True)
    assert not stage.is_page_of(page, verdict)
