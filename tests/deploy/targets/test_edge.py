"""The edge target: a device answers from a signed folder alone, and is never half updated."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from deploy.targets import bundles
from deploy.targets.bundles import ANY
from deploy.targets.compliance import Compliance, Place
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import bundle, signing, stage
from pipelines.deploy.serve.contract import Contract
from pipelines.deploy.serve.refusal import Refusal
from pipelines.deploy.targets import Release, answered, edge
from pipelines.deploy.targets.edge import Edge
from pipelines.errors import UserError

MISSING = {"origin": None, "delay": None, "temp": None}
ROWS = [
    MISSING | {"origin": "EWR", "delay": 3.5},
    MISSING | {"origin": "never seen", "temp": -1},
    MISSING,
]


def runner(file: Path) -> ModuleType:
    """run.py as a module."""
    spec = importlib.util.spec_from_file_location("run", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN = runner(edge.RUNNER)


@pytest.fixture(autouse=True)
def _key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signing.VARIABLE, str(tmp_path / "keys" / "signing.pem"))


@pytest.fixture
def releases(tmp_path: Path) -> list[Release]:
    return [bundles.release(tmp_path, version) for version in (1, 2)]


class TestEdge(Compliance):
    """A fleet whose devices are told by the channel and bring back what they answered."""

    @pytest.fixture
    def place(self, tmp_path: Path, releases: list[Release]) -> Place:
        target = Edge(tmp_path / "channel")
        made: list[int] = []

        def ask(times: int) -> Counter[str]:
            made.append(times)
            channel = json.loads((target.folder / "channel.json").read_text())
            names = [f"device-{sum(made)}-{number}" for number in range(times)]
            fleet: dict[str, list[str]] = {}
            for name in names:
                fleet.setdefault(RUN.slot_of(channel, name), []).append(name)
            for devices in fleet.values():  # one device of each slot answers for all of them
                root = tmp_path / "device"
                shutil.rmtree(root, ignore_errors=True)
                target.install(devices[0], root)
                RUN.score(root, [json.dumps(MISSING).encode()] * len(devices))
                brought = target.folder / "answered" / f"{devices[0]}.jsonl"
                brought.parent.mkdir(exist_ok=True)
                shutil.copy(root / "answered.jsonl", brought)
            by = {slot: channel["slots"][slot]["bundle"] for slot in fleet}
            return Counter({by[slot]: len(devices) for slot, devices in fleet.items()})

        return Place(target, releases[0], releases[1], ask)


@pytest.fixture
def channel(tmp_path: Path, releases: list[Release]) -> Edge:
    target = Edge(tmp_path / "channel")
    target.start("champion", releases[0])
    return target


@pytest.fixture
def device(tmp_path: Path, channel: Edge) -> Path:
    channel.install("device-1", tmp_path / "device")
    return tmp_path / "device"


def told(root: Path, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """run.py on the device, which sees no package but the two it may."""
    return subprocess.run(
        [sys.executable, root / "current" / "run.py", *words],
        input=given, capture_output=True, text=True, cwd="/", env={"PATH": os.defpath},
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"run.py: error: {said}")
    assert done.stderr.count("\n") == 1


def scored(root: Path, rows: list[dict[str, Any]] = ROWS) -> list[float]:
    done = told(root, "score", given="\n".join(json.dumps(row) for row in rows))
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.split()]


def expected(release: Release) -> list[float]:
    columns = {"origin": pa.string(), "delay": pa.float32(), "temp": pa.float32()}
    table = pa.table(
        {name: pa.array([row.get(name) for row in ROWS], kind) for name, kind in columns.items()}
    )
    return [float(value) for value in bundle.load(release.folder).predict(table)]


def test_a_folder_that_is_there_is_not_replaced(device: Path, channel: Edge) -> None:
    """It may hold what was answered, and it may be anybody's."""
    scored(device)
    held = (device / "answered.jsonl").read_text()
    with pytest.raises(UserError, match="exists; expected a new folder for the device device-1"):
        channel.install("device-1", device)
    assert (device / "answered.jsonl").read_text() == held


def test_a_folder_that_cannot_be_made_is_one_line(
    channel: Edge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    for source, folder in ((tmp_path / "none", "new"), (channel.folder, "file/new")):
        monkeypatch.setattr(sys, "argv", ["edge", str(source), "d", str(tmp_path / folder)])
        assert edge.main() == 2
        error = capsys.readouterr().err
        assert error.startswith("edge: error: ")
        assert error.count("\n") == 1
        assert not (tmp_path / folder).exists()


def test_the_runner_is_short() -> None:
    assert len(edge.RUNNER.read_text().splitlines()) <= 200


def test_a_device_answers_as_the_bundle_does(device: Path, releases: list[Release]) -> None:
    assert scored(device) == pytest.approx(expected(releases[0]), abs=0.02)  # int8


def test_a_device_needs_nothing_but_onnxruntime_and_numpy_and_no_network(device: Path) -> None:
    """What a process of its own loads from site-packages, where no socket can be opened."""
    done = _watched(device, 'exec(compile(open(path).read(), path, "exec"), {**run})')
    assert float(done.stdout) > 0
    loaded, always = set(done.stderr.split()), set(_watched(device, "pass").stderr.split())
    assert {"onnxruntime", "numpy"} <= loaded
    assert loaded <= {"onnxruntime", "numpy"} | always  # .pth files load some into every process


def _watched(device: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Run the body; stderr has the packages of site-packages that were loaded."""
    code = f"""
import socket, sys
socket.socket.connect = None
path = {str(device / "current" / "run.py")!r}
run = {{"__name__": "__main__", "__file__": path}}
sys.argv = ["run.py", "score"]
{body}
files = {{name.partition(".")[0]: vars(held).get("__file__") for name, held in sys.modules.items()}}
print(*[name for name, file in files.items() if "site-packages" in str(file)], file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        input=json.dumps(ROWS[0]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "row 2 is no JSON: Expecting property name"),
        ("", "row 2 is no JSON"),
        ("[" * 100_000, "row 2 is no JSON: maximum recursion depth"),
        (json.dumps(MISSING | {"delay": np.nan}), "row 2, column delay: expected float32 or null"),
        ('{"origin": "\\ud800"}', "row 2 is no JSON"),
        ("3", "row 2, column delay: missing, or not of the contract"),
        ("{}", "row 2, column delay: missing, or not of the contract"),
        (json.dumps(MISSING | {"a\nb": 1}), "row 2, column a b: missing, or not of the contract"),
        (json.dumps(MISSING | {"delay": "late"}), "row 2, column delay: expected float32 or null"),
        (json.dumps(MISSING | {"delay": True}), "row 2, column delay: expected float32 or null"),
        (json.dumps(MISSING | {"delay": 10**400}), "row 2, column delay: expected float32 or null"),
        (json.dumps(MISSING).replace("null", "1e400"), "row 2, column origin: expected string"),
        (json.dumps(MISSING | {"delay": 3.5e38}), "row 2, column delay: expected float32 or null"),
        (json.dumps(MISSING | {"origin": 3}), "row 2, column origin: expected string or null"),
    ],
)
def test_what_breaks_the_contract_is_one_line(device: Path, row: str, said: str) -> None:
    refused(told(device, "score", given=f"{json.dumps(MISSING)}\n{row}\n"), said)


def test_no_rows_are_refused_as_the_service_does(device: Path) -> None:
    refused(told(device, "score"), "no rows; expected a JSON record on each line")


RECORDS = st.fixed_dictionaries({name: st.none() | ANY for name in MISSING})
LARGE = st.integers(-(2**129), 2**129) | st.floats(-4e38, 4e38)
NUMBERS = st.fixed_dictionaries({"origin": st.text(), "delay": LARGE, "temp": st.none() | LARGE})
LINES = (RECORDS | NUMBERS | ANY).map(json.dumps) | st.text()


def test_whatever_is_answered_is_what_the_service_takes_and_its_answer(device: Path) -> None:
    """Any value in any column and any text as a line: an answer, or one error that has the row."""
    run = runner(device / "current" / "run.py")
    kinds = stage.read_json(device / "current" / bundle.CONTRACT)["columns"]
    contract = Contract(kinds, max_rows=1)
    session = bundle.open_session(device / "current" / bundle.MODEL)

    @settings(max_examples=300, deadline=None)
    @given(LINES.map(lambda line: line.encode(errors="surrogatepass")) | st.binary())
    def holds(line: bytes) -> None:
        try:
            columns = contract.read(line)
        except Refusal:
            with pytest.raises(ValueError, match=r"^row 1"):
                run.score(device, [line])
            return
        feed = dict(zip(contract.texts, columns.texts, strict=True))
        feed |= dict(zip(contract.numbers, columns.numbers, strict=True))
        (right,) = session.run(None, feed)[0].tolist()
        if 0 <= right <= 1:
            assert run.score(device, [line]) == [right]
        else:
            with pytest.raises(ValueError, match="the model gave no probability"):
                run.score(device, [line])

    holds()


@pytest.mark.parametrize("file", ["model.onnx", "bundle.json", "run.py"])
def test_a_changed_file_is_not_opened(device: Path, file: str) -> None:
    path = device / "current" / file
    path.write_bytes(path.read_bytes() + b"\n")
    done = told(device, "score", given="{}")
    assert done.returncode == 2
    assert done.stderr == f"run.py: error: {file} is not as it was signed\n"


@pytest.mark.parametrize("change", ["percent", "counter", "signature"])
def test_a_changed_channel_is_not_believed(device: Path, channel: Edge, change: str) -> None:
    path = channel.folder / "channel.json"
    told_by = json.loads(path.read_text())
    told_by[change] = {"percent": 7, "counter": 99, "signature": "A" * 88}[change]
    path.write_text(json.dumps(told_by))
    before = scored(device)
    done = told(device, "update", str(channel.folder))
    assert done.returncode == 2
    assert "signature is not of signing.pub" in done.stderr
    assert scored(device) == before


def test_a_changed_channel_is_not_signed_anew(channel: Edge, releases: list[Release]) -> None:
    """Who can write into the folder must not have the next release sign it for every device."""
    path = channel.folder / "channel.json"
    content = json.loads(path.read_text())
    content["slots"]["champion"]["files"]["run.py"] = "0" * 64
    for changed in (json.dumps(content), "{}", "[]", "[1]", "{"):
        path.write_text(changed)
        for act in (lambda: channel.start("challenger", releases[1]), channel.serving):
            with pytest.raises(UserError, match="no channel that the key here signed"):
                act()
        assert path.read_text() == changed


def test_a_file_that_was_damaged_on_its_way_back_spoils_no_other(
    device: Path, channel: Edge
) -> None:
    scored(device)
    (channel.folder / "answered").mkdir()
    shutil.copy(device / "answered.jsonl", channel.folder / "answered")
    damaged = b'\xff\xfe\n{"a": \xff}\n{"a":' + b"[" * 100_000
    (channel.folder / "answered" / "other.jsonl").write_bytes(damaged)
    assert channel.observe()["champion"].requests == len(ROWS)


@pytest.mark.parametrize(
    "odd",
    [{"seconds": None}, {"seconds": "1"}, {"predictions": None}, {"memory_bytes": None}],
    ids=str,
)
def test_a_line_that_lacks_a_figure_spoils_no_other(
    device: Path, channel: Edge, odd: dict[str, Any]
) -> None:
    scored(device)
    (channel.folder / "answered").mkdir()
    lines = (device / "answered.jsonl").read_text()
    strange = json.dumps(json.loads(lines.split("\n", 2)[1]) | odd)
    (channel.folder / "answered" / "one.jsonl").write_text(f"{lines}\n{strange}\n")
    assert channel.observe()["champion"].requests == len(ROWS)


def test_many_changes_at_once_have_a_number_each(channel: Edge, releases: list[Release]) -> None:
    channel.start("challenger", releases[1])
    before = json.loads((channel.folder / "channel.json").read_bytes())["counter"]
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(channel.shift, range(1, 21)))
    assert json.loads((channel.folder / "channel.json").read_bytes())["counter"] == before + 20


def test_a_lost_file_of_the_channel_comes_back_when_it_is_told_again(
    channel: Edge, releases: list[Release]
) -> None:
    before = (channel.folder / "channel.json").read_bytes()
    for file in (channel.folder / "files").iterdir():
        file.unlink()
        assert not channel.healthy("champion")
        channel.start("champion", releases[0])
        assert channel.healthy("champion")
    assert (channel.folder / "channel.json").read_bytes() == before


def test_an_older_channel_is_refused(
    device: Path, channel: Edge, releases: list[Release], tmp_path: Path
) -> None:
    shutil.copytree(channel.folder, tmp_path / "old")
    channel.start("champion", releases[1])
    assert told(device, "update", str(channel.folder)).returncode == 0
    done = told(device, "update", str(tmp_path / "old"))
    assert done.returncode == 2
    assert "the channel is older than the 2 held" in done.stderr
    assert scored(device) == pytest.approx(expected(releases[1]), abs=0.02)


def test_a_rollback_is_a_newer_channel(
    device: Path, channel: Edge, releases: list[Release]
) -> None:
    channel.start("challenger", releases[1])
    channel.shift(100)
    assert told(device, "update", str(channel.folder)).returncode == 0
    assert scored(device) == pytest.approx(expected(releases[1]), abs=0.02)
    channel.roll_back()
    assert told(device, "update", str(channel.folder)).returncode == 0
    assert scored(device) == pytest.approx(expected(releases[0]), abs=0.02)


def test_only_what_changed_travels(device: Path, channel: Edge, releases: list[Release]) -> None:
    channel.start("champion", releases[1])
    done = told(device, "update", str(channel.folder))
    changed = (device / "current" / "model.onnx").stat().st_size
    assert done.stdout == f"{changed:,} bytes travelled\n"
    assert told(device, "update", str(channel.folder)).stdout == "0 bytes travelled\n"


@pytest.mark.parametrize("file", ["model.onnx", "bundle.json", "run.py", "channel.json"])
def test_what_was_damaged_comes_again_and_nothing_else(
    device: Path, channel: Edge, file: str
) -> None:
    path, before = device / "current" / file, scored(device)
    whole = path.read_bytes()
    for damaged in (whole + b"\n ", whole[: len(whole) // 2], None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        travelled = RUN.update(device, str(channel.folder))
        assert travelled == (0 if file == "channel.json" else len(whole))  # that one always comes
        assert path.read_bytes() == whole
    assert scored(device) == before


def test_a_damaged_device_still_refuses_an_older_channel(
    device: Path, channel: Edge, releases: list[Release], tmp_path: Path
) -> None:
    shutil.copytree(channel.folder, tmp_path / "old")
    channel.start("champion", releases[1])
    RUN.update(device, str(channel.folder))
    (device / "current" / "channel.json").write_text("{")
    refused(told(device, "update", str(tmp_path / "old")), "the channel is older than the 2 held")
    shutil.rmtree((device / "current").resolve())
    with pytest.raises(ValueError, match="the channel is older than the 2 held"):
        RUN.update(device, str(tmp_path / "old"))


def test_another_models_channel_is_refused(
    device: Path, releases: list[Release], tmp_path: Path
) -> None:
    other = Edge(tmp_path / "other")
    for release in releases:
        other.start("champion", replace(release, model="trains"))
    refused(told(device, "update", str(other.folder)), "the channel is older than the 1 held, or")


def test_a_signed_bundle_is_no_channel(device: Path, tmp_path: Path) -> None:
    """Its statement has the same key, and whoever reads the registry has it."""
    statement = {"model": "flights", "version": 9, "bundle": "0" * 64}
    stage.write_json(tmp_path / "channel.json", statement | {"signature": signing.sign(statement)})
    refused(told(device, "update", str(tmp_path)), "the channel is no signed JSON")


def test_a_path_in_a_channel_writes_nothing_outside(
    device: Path, channel: Edge, tmp_path: Path
) -> None:
    before, content = scored(device), json.loads((channel.folder / "channel.json").read_text())
    signature, places = content.pop("signature"), {*tmp_path.rglob("*")}
    assert signature == signing.sign(content)
    files = content["slots"]["champion"]["files"]
    for name in ("../../stolen", "/stolen", "a/b", "..", ".", ""):
        content["counter"] += 1
        content["slots"]["champion"]["files"] = files | {name: files["run.py"]}
        signature = signing.sign(content)
        stage.write_json(channel.folder / "channel.json", content | {"signature": signature})
        with pytest.raises((ValueError, OSError)):
            RUN.update(device, str(channel.folder))
        assert {*tmp_path.rglob("*")} == places
    assert scored(device) == before


def test_what_is_no_channel_is_one_line(device: Path, tmp_path: Path) -> None:
    for content in ("", "{", "[]", "[" * 100_000, '{"signature": 3}', "{}"):
        (tmp_path / "channel.json").write_text(content)
        with pytest.raises(ValueError, match="the channel is no signed JSON"):
            RUN.update(device, str(tmp_path))
    refused(told(device, "update", str(tmp_path)), "the channel is no signed JSON")
    refused(told(device, "update", str(tmp_path / "none")), "<urlopen error [Errno 2] No such file")


@pytest.mark.parametrize("file", ["signing.pub", "device", "current/channel.json"])
def test_a_device_that_lacks_a_file_says_it_in_one_line(device: Path, file: str) -> None:
    kept = (device / file).read_bytes()
    (device / file).unlink()
    refused(told(device, "score", given=json.dumps(MISSING)), "[Errno 2] No such file")
    (device / file).write_bytes(kept[:-30])
    done = told(device, "score", given=json.dumps(MISSING))
    if file == "device":
        assert done.returncode == 0  # another name, of the same slot
    else:
        refused(done, "the channel")


def limited(
    root: Path, size: int, *words: str, given: str = ""
) -> subprocess.CompletedProcess[str]:
    """As `told`, where no file can grow above the size: a disk that is full there."""
    code = (
        "import resource, runpy, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        "sys.argv[:] = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code, root / "current" / "run.py", *words],
        input=given, capture_output=True, text=True,
    )  # fmt: skip


def test_on_a_full_disk_nothing_is_taken_by_half(
    device: Path, channel: Edge, releases: list[Release]
) -> None:
    before, held = scored(device), (device / "current").resolve()
    channel.start("champion", releases[1])
    refused(limited(device, 1000, "update", str(channel.folder)), "[Errno 27] File too large")
    assert list((device / "releases").iterdir()) == [held]
    assert scored(device) == before


def test_a_note_cut_by_a_full_disk_spoils_no_other(
    device: Path, channel: Edge, releases: list[Release]
) -> None:
    notes = device / "answered.jsonl"
    scored(device)
    size = notes.stat().st_size + 50
    refused(limited(device, size, "score", given=json.dumps(MISSING)), "[Errno 27] File too large")
    assert notes.stat().st_size == size
    scored(device)
    found = answered.notes(notes.read_text().splitlines(), releases[0].digest)
    assert [len(note["predictions"]) for note in found] == [len(ROWS)] * 2


def test_what_is_no_probability_is_not_answered_but_noted(
    device: Path, channel: Edge, releases: list[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "MAX_AUC_FALL", -1.0)  # what goes into an int8 layer has its bounds
    channel.start("champion", releases[1])
    RUN.update(device, str(channel.folder))
    over = json.dumps(MISSING | {"delay": 3e38, "temp": -3e38})
    refused(told(device, "score", given=over), "the model gave no probability")
    (channel.folder / "answered").mkdir()
    shutil.copy(device / "answered.jsonl", channel.folder / "answered")
    assert channel.observe()["champion"].errors == 1


def test_two_updates_at_once_are_one_after_the_other(
    device: Path, channel: Edge, releases: list[Release]
) -> None:
    channel.start("champion", releases[1])
    command = [sys.executable, device / "current" / "run.py", "update", channel.folder]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate()[0] for process in both)
    changed = (device / "current" / "model.onnx").stat().st_size
    assert said == ["0 bytes travelled\n", f"{changed:,} bytes travelled\n"]
    assert scored(device) == pytest.approx(expected(releases[1]), abs=0.02)


class Bad(BaseHTTPRequestHandler):
    """A channel on a network that cuts in the middle of a file, or hangs there."""

    folder: Path
    hang = Event()

    def do_GET(self) -> None:
        content = (self.folder / self.path[1:]).read_bytes()
        self.send_response(200)
        if self.path.startswith("/files/"):
            self.hang.wait()
            self.send_header("transfer-encoding", "chunked")
            content = b"%x\r\n" % len(content) + content[: len(content) // 2]
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_device_answers_while_an_update_hangs_and_after_it_was_cut(
    device: Path, channel: Edge, releases: list[Release]
) -> None:
    before, held = scored(device), (device / "current").resolve()
    channel.start("champion", releases[1])
    Bad.folder = channel.folder
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bad)
    Thread(target=server.serve_forever, daemon=True).start()
    command = [sys.executable, device / "current" / "run.py", "update"]
    updating = subprocess.Popen(
        [*command, f"http://127.0.0.1:{server.server_port}"], stderr=subprocess.PIPE, text=True
    )
    while len(list((device / "releases").iterdir())) == 1:
        time.sleep(0.01)
    assert scored(device) == before
    Bad.hang.set()
    assert "IncompleteRead" in updating.communicate()[1]
    server.shutdown()
    server.server_close()
    assert updating.returncode == 2
    assert list((device / "releases").iterdir()) == [held]
    assert scored(device) == before


def test_over_http(device: Path, channel: Edge, releases: list[Release]) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=channel.folder))
    Thread(target=server.serve_forever, daemon=True).start()
    channel.start("champion", releases[1])
    url = f"http://127.0.0.1:{server.server_port}"
    assert told(device, "update", url).returncode == 0
    server.shutdown()
    server.server_close()
    assert told(device, "update", url).returncode == 2  # the network is gone: one line
    assert scored(device) == pytest.approx(expected(releases[1]), abs=0.02)


def test_a_bundle_that_cannot_answer_is_not_taken(
    device: Path, channel: Edge, releases: list[Release], tmp_path: Path
) -> None:
    """Signed and whole, yet broken: the device tries it before it lets go of the old one."""
    broken = shutil.copytree(releases[1].folder, tmp_path / "broken")
    contract = stage.read_json(broken / bundle.CONTRACT)
    contract["columns"][0]["name"] = "elsewhere"
    stage.write_json(broken / bundle.CONTRACT, contract)
    before = scored(device)
    edge_smaller = edge.smaller
    edge.smaller = lambda folder, out: (folder / bundle.MODEL, {"type": "float32"})
    try:
        channel.start("champion", Release("flights", 3, stage.digest(broken), broken))
    finally:
        edge.smaller = edge_smaller
    assert told(device, "update", str(channel.folder)).returncode == 2
    assert scored(device) == before


def test_killed_at_any_moment_a_device_has_the_old_or_the_new(
    channel: Edge, device: Path, tmp_path: Path
) -> None:
    made = [bundles.release(tmp_path, version) for version in (3, 4)]
    right = [pytest.approx(expected(one), abs=0.02) for one in made]
    channel.start("champion", made[1])
    told(device, "update", str(channel.folder))
    random, cut = np.random.default_rng(0), 0
    for round_ in range(8):
        channel.start("champion", made[round_ % 2])
        process = subprocess.Popen(
            [sys.executable, device / "current" / "run.py", "update", channel.folder],
            stdout=subprocess.DEVNULL,
        )
        time.sleep(float(random.uniform(0.03, 0.4)))
        process.send_signal(signal.SIGKILL)
        cut += process.wait() == -signal.SIGKILL
        held = json.loads((device / "current" / "channel.json").read_text())
        assert scored(device) == right[held["slots"]["champion"]["version"] - 3]
    assert cut > 0
    assert told(device, "update", str(channel.folder)).returncode == 0
    assert len(list((device / "releases").iterdir())) == 1


def test_int8_goes_to_devices_only_if_it_loses_little(
    releases: list[Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, about = edge.smaller(releases[0].folder, tmp_path)
    assert about["type"] == "int8"
    assert abs(about["int8"]["auc_fall"]) <= edge.MAX_AUC_FALL
    assert model.parent == tmp_path
    monkeypatch.setattr(edge, "MAX_AUC_FALL", -1.0)
    model, about = edge.smaller(releases[0].folder, tmp_path)
    assert about["type"] == "float32"
    assert model == releases[0].folder / bundle.MODEL


def test_what_was_packaged_as_int8_goes_to_devices_as_it_is(
    releases: list[Release], tmp_path: Path
) -> None:
    model, _ = edge.smaller(releases[0].folder, tmp_path)
    shutil.copy(model, releases[0].folder / bundle.MODEL)
    model, about = edge.smaller(releases[0].folder, tmp_path)
    assert model == releases[0].folder / bundle.MODEL
    assert about == {"type": "int8"}


def test_nothing_mirrors_what_a_device_answers(channel: Edge) -> None:
    with pytest.raises(UserError, match="start with a share"):
        channel.shift(0, shadow=True)


@settings(max_examples=25, deadline=None)
@given(message=st.binary(max_size=200), spoil=st.integers(0, 511))
def test_the_pure_python_verification_agrees_with_cryptography(message: bytes, spoil: int) -> None:
    private = Ed25519PrivateKey.generate()
    key, signature = private.public_key().public_bytes_raw(), private.sign(message)
    assert RUN.verifies(key, message, signature)
    wrong = bytearray(signature)
    wrong[spoil // 8] ^= 1 << spoil % 8
    assert not RUN.verifies(key, message, bytes(wrong))
    assert not RUN.verifies(key, message + b"x", signature)
    assert not RUN.verifies(key, message, signature[:63])
    # RFC 8032, 5.1.7: S must be below the group's order, else a signature has a second form.
    more = int.from_bytes(signature[32:], "little") + RUN.ORDER
    assert not RUN.verifies(key, message, signature[:32] + more.to_bytes(32, "little"))
