"""One holder at a time; the dead and the silent are followed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import lease
from pipelines.exchange import Folder

# Adds one to a number in a file, slowly, under the lease: lost updates show.
COUNT = """
import sys, time
from pathlib import Path
from pipelines import lease
from pipelines.exchange import Folder
folder = Path(sys.argv[1])
for _ in range(5):
    with lease.held(Folder(folder), "count", lambda holder: None):
        number = int((folder / "number").read_text())
        time.sleep(0.01)
        (folder / "number").write_text(str(number + 1))
"""
HOLD = """
import sys, time
from pathlib import Path
from pipelines import lease
from pipelines.exchange import Folder
with lease.held(Folder(Path(sys.argv[1])), "hold", print):
    print("held", flush=True)
    time.sleep(600)
"""


def _python(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], text=True, stdout=subprocess.PIPE
    )


def test_no_update_is_lost_among_processes(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    processes = [_python(COUNT, tmp_path) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert (tmp_path / "number").read_text() == "20"


def test_a_killed_holder_is_followed_at_once_by_a_higher_generation(tmp_path: Path) -> None:
    holder = _python(HOLD, tmp_path)
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    begun = time.monotonic()
    with lease.held(Folder(tmp_path), "hold", print) as held:
        assert held.generation == 2
    assert time.monotonic() - begun < lease.LIFETIME / 2


def test_a_holder_that_renews_is_waited_for_and_a_silent_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LIFETIME", 1.0)
    monkeypatch.setattr(lease, "RENEWAL", 0.2)
    exchange = Folder(tmp_path)
    elsewhere = {"place": "elsewhere", "process": "1 0", "token": "x", "renewed": 0}
    exchange.put("leases/silent/000001.json", elsewhere)
    told: list[str] = []
    with lease.held(exchange, "silent", told.append) as held:
        assert held.generation == 2
        assert told == ["process 1 on elsewhere"]
        time.sleep(1.5)  # longer than a silent one is waited for
        record = exchange.get("leases/silent/000002.json")
        assert record is not None
        assert record["renewed"] > 3
        held.check()
        exchange.put_new("leases/silent/000003.json", elsewhere)
        with pytest.raises(lease.LostError, match="another process took over"):
            held.check()
    released = exchange.get("leases/silent/000002.json")
    assert released is not None
    assert released["released"]
