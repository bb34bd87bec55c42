"""The local target: it keeps every target's promises, and callers notice no death behind Envoy."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from deploy.served import STANDIN, Served, free, release, served, until
from deploy.targets.compliance import Compliance, Place
from deploy.tiny import make_bundle
from world import ROOT, Checkout

from pipelines import bundle, stage
from pipelines.deploy import serving
from pipelines.deploy.replicas import LOST, last_word
from pipelines.deploy.supervise import REPLICA, Supervisor
from pipelines.deploy.targets import Release
from pipelines.deploy.targets.local import Local
from pipelines.errors import UserError
from pipelines.params import Params


class TestLocal(Compliance):
    """Stand-ins behind a real Envoy."""

    @pytest.fixture
    def place(self, tmp_path: Path, params: Params) -> Iterator[Place]:
        with served(tmp_path / "serving", params, replicas=1) as here:
            until(lambda: here.status().envoy)
            yield Place(here.target, release(tmp_path, 1), release(tmp_path, 2), here.ask)


@pytest.fixture
def here(tmp_path: Path, params: Params) -> Iterator[Served]:
    """A healthy champion on two replicas."""
    with served(tmp_path / "serving", params) as made:
        made.target.start("champion", release(tmp_path, 1))
        until(lambda: made.target.healthy("champion"))
        yield made


class Callers:
    """Three callers that ask without a pause and count what they get."""

    def __init__(self, here: Served) -> None:
        self.seen: Counter[str] = Counter()
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(here,)) for _ in range(3)]

    def _ask(self, here: Served) -> None:
        while not self.over.is_set():
            self.seen.update(here.ask(1))
            time.sleep(0.005)

    def __enter__(self) -> "Callers":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()


def _champion(here: Served) -> serving.Serving:
    return here.status().slots["champion"]


def test_a_killed_replica_is_started_again_and_no_request_fails(here: Served) -> None:
    with Callers(here) as callers:
        for _ in range(2):
            victim = _champion(here).pids[0]
            os.kill(victim, signal.SIGKILL)
            until(lambda victim=victim: victim not in _champion(here).pids)
            until(lambda: here.target.healthy("champion"))
    digest = _champion(here).digests[0]
    assert set(callers.seen) == {digest}
    assert callers.seen[digest] > 100
    assert here.target.observe()["champion"].restarts == 2


def test_a_rolling_restart_replaces_every_replica_and_no_request_fails(here: Served) -> None:
    before = set(_champion(here).pids)
    with Callers(here) as callers:
        here.target.restart()
    assert set(callers.seen) == {_champion(here).digests[0]}
    after = _champion(here)
    assert not before & set(after.pids)
    assert len(after.pids) == 2
    assert here.target.observe()["champion"].restarts == 0


def test_the_service_itself_loses_no_request(checkout: Checkout) -> None:
    """Real replicas with a model: one is killed, all are replaced, and callers notice nothing."""
    digest = make_bundle()
    with served(Path("serving"), checkout.params(), REPLICA) as here:
        here.target.start("champion", Release("flights", 1, digest, bundle.FOLDER))
        until(lambda: here.target.healthy("champion"), 60)
        with Callers(here) as callers:
            os.kill(_champion(here).pids[0], signal.SIGKILL)
            until(lambda: here.target.observe()["champion"].restarts == 1)
            until(lambda: here.target.healthy("champion"), 60)
            here.target.restart()
        assert set(callers.seen) == {digest}
        seen = here.target.observe()["champion"]
        assert (seen.errors, sum(seen.predictions) > 0, seen.memory_bytes > 0) == (0, True, True)


def test_a_killed_envoy_is_started_again_and_counts_go_on(here: Served) -> None:
    digest = _champion(here).digests[0]
    here.ask(20)
    until(lambda: here.target.observe()["champion"].requests >= 20)
    os.kill(here.status().envoy, signal.SIGKILL)
    until(lambda: here.ask(1)[digest] == 1)
    until(lambda: here.target.observe()["champion"].requests >= 21)


def test_an_envoy_that_hangs_is_replaced_and_no_replica_pays_for_it(here: Served) -> None:
    digest, before, pids = _champion(here).digests[0], here.status().envoy, _champion(here).pids
    os.kill(before, signal.SIGSTOP)
    until(lambda: here.status().envoy not in (0, before), 30)
    until(lambda: here.ask(1)[digest] == 1)
    assert _champion(here).pids == pids


def test_while_a_new_champion_is_not_ready_the_old_one_answers_a_new_envoy_too(
    tmp_path: Path, params: Params
) -> None:
    old, never = release(tmp_path, 1), release(tmp_path, 2)
    with served(tmp_path / "serving", params, faults={never.digest: "never"}) as here:
        here.target.start("champion", old)
        until(lambda: here.target.healthy("champion"))
        here.target.start("champion", never)
        until(lambda: len(serving.desired(here.folder).slots()) == 1)
        time.sleep(2)  # the new one runs, and is not ready
        os.kill(here.status().envoy, signal.SIGKILL)
        until(lambda: here.ask(1)[old.digest] == 1)
        time.sleep(LOST + 2)
        assert here.ask(20) == {old.digest: 20}


def test_who_comes_back_is_not_backed_by_who_is_taken_back(tmp_path: Path) -> None:
    target = Local(tmp_path / "serving")
    first, second = release(tmp_path, 1), release(tmp_path, 2)
    backed = []
    for one in (first, second, first, second):
        target.start("champion", one)
        backed.append(serving.desired(target.folder).slots()["champion"].fallback)
    assert backed == [None, first.digest, None, first.digest]


def test_a_killed_supervisor_leaves_nothing_and_the_next_goes_on(here: Served) -> None:
    processes = [psutil.Process(pid) for pid in [*_champion(here).pids, here.status().envoy]]
    assert here.process is not None
    here.process.kill()
    here.process.wait()
    until(lambda: not any(process.is_running() for process in processes), 10)
    until(lambda: not here.target.healthy("champion"), 10)
    with Callers(here) as callers:
        here.start()
        until(lambda: here.target.healthy("champion"))
    assert not any("404" in said for said in callers.seen), callers.seen
    assert set(here.ask(5)) == {_champion(here).digests[0]}


def test_a_supervisor_that_hangs_is_up_and_one_that_is_dead_is_not(here: Served) -> None:
    """Who thinks that nothing is served promotes without a judgement."""
    assert here.process is not None
    here.process.send_signal(signal.SIGSTOP)
    until(lambda: not here.target.serving(), 10)  # what it reports is old by now
    assert here.target.up()
    here.process.kill()
    here.process.wait()
    assert not here.target.up()
    here.start()
    until(here.target.up)


def test_a_share_that_nobody_renews_goes_back_to_the_champion(here: Served, tmp_path: Path) -> None:
    """A controller that was killed leaves no bad challenger before callers."""
    here.target.start("challenger", release(tmp_path, 2))
    until(lambda: here.target.healthy("challenger"))
    here.target.shift(50, shadow=True)
    until(lambda: (here.status().percent, here.status().shadow) == (50, True))
    long_ago = time.time() - serving.HOLD
    serving.change(here.folder, lambda now: serving.replace(now, shifted=long_ago))
    until(lambda: (here.status().percent, here.status().shadow) == (0, False))


def test_a_shadow_gets_copies_and_answers_nobody(here: Served, tmp_path: Path) -> None:
    here.target.start("challenger", release(tmp_path, 2))
    until(lambda: here.target.healthy("challenger"))
    here.target.shift(0, shadow=True)
    until(lambda: here.status().shadow)
    assert set(here.ask(50)) == {_champion(here).digests[0]}
    until(lambda: here.target.observe()["challenger"].requests >= 50)


def test_health_checks_are_no_answers_and_refusals_no_good_ones(here: Served) -> None:
    """They say nothing of a model: of them alone no release goes on."""
    url = f"http://127.0.0.1:{here.traffic.port}"
    for _ in range(30):
        urllib.request.urlopen(f"{url}/v2/health/ready").close()
        with pytest.raises(urllib.error.HTTPError, match="422"):
            urllib.request.urlopen(f"{url}/predict", data=b"")
    here.ask(5)
    until(lambda: here.target.observe()["champion"].requests >= 5)
    seen = here.target.observe()["champion"]
    assert (seen.requests, seen.errors, seen.refusals) == (5, 0, 30)


def test_one_folder_has_one_supervisor(here: Served, params: Params) -> None:
    with pytest.raises(UserError, match="another supervisor"):
        Supervisor(here.folder, here.traffic, params.serve).run()


def test_a_bundle_that_is_not_its_name_is_not_started(here: Served, tmp_path: Path) -> None:
    wrong = serving.replace(release(tmp_path, 2), digest="0" * 64)
    with pytest.raises(UserError, match="is not the bundle"):
        here.target.start("challenger", wrong)


def test_a_kept_bundle_that_was_damaged_is_brought_again(tmp_path: Path) -> None:
    target, wanted = Local(tmp_path / "serving"), release(tmp_path, 1)
    target.start("champion", wanted)
    kept = serving.bundle_of(target.folder, wanted.digest)
    (kept / "word").write_text("another")
    target.start("champion", wanted)
    assert stage.digest(kept) == wanted.digest


@contextmanager
def _supervised(
    folder: Path, params: Params, program: Sequence[str] = STANDIN
) -> Iterator[Supervisor]:
    """A supervisor in this process, told of a champion."""
    made = Supervisor(folder / "serving", free(params.traffic), params.serve, program)
    Local(made.folder).start("champion", release(folder, 1))
    running = threading.Thread(target=made.run)
    running.start()
    try:
        yield made
    finally:
        made.over.set()
        running.join()


def test_a_turn_that_fails_is_said_once_and_the_next_goes_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, params: Params
) -> None:
    """Neither the thread that acts nor the one that reports ends by it."""
    with _supervised(tmp_path, params) as supervisor:
        target = Local(supervisor.folder)
        until(lambda: target.healthy("champion"))
        wanted, told = supervisor.folder / "desired.json", supervisor.folder / "status.json"
        kept = wanted.rename(tmp_path / "kept.json")
        wanted.write_text("{")
        told.unlink()
        told.mkdir()  # nothing takes its place
        time.sleep(2)
        assert capsys.readouterr().out.count("a turn failed") == 2
        kept.replace(wanted)
        told.rmdir()
        target.start("challenger", release(tmp_path, 2))
        until(lambda: target.healthy("champion") and target.healthy("challenger"))


@pytest.mark.parametrize("name", ["port", "admin_port"])
def test_a_port_that_is_taken_is_one_line(tmp_path: Path, params: Params, name: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        traffic = free(params.traffic, **{name: other.getsockname()[1]})
        with pytest.raises(UserError, match=f"traffic.{name} is .*expected one that is free"):
            Supervisor(tmp_path / "serving", traffic, params.serve).run()


def test_what_ends_again_and_again_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, params: Params
) -> None:
    program = (sys.executable, "-c", "raise SystemExit('no such model')")
    with _supervised(tmp_path, params, program) as supervisor:
        until(lambda: serving.status(supervisor.folder).trouble)
        told = serving.status(supervisor.folder).trouble["release-1"]
        assert told.startswith("release-1 ends again and again: no such model (")
        # Who waits for it waits no longer.
        with pytest.raises(UserError, match=r"the champion does not start: .*no such model"):
            Local(supervisor.folder).healthy("champion")
        time.sleep(2)
        assert capsys.readouterr().out.count(told) == 1


def test_an_envoy_that_falls_again_and_again_is_told_and_forgiven(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, params: Params
) -> None:
    monkeypatch.setattr("pipelines.deploy.supervise.FORGIVEN", 1.5)
    with _supervised(tmp_path, params) as supervisor:
        for _ in range(2):
            until(lambda: supervisor.proxy and supervisor.proxy.poll() is None)
            assert supervisor.proxy is not None
            supervisor.proxy.kill()
            supervisor.proxy.wait()
        until(lambda: "envoy" in supervisor.trouble())
        until(lambda: not supervisor.trouble())


def test_the_last_word_is_read_from_the_end_of_a_log(tmp_path: Path) -> None:
    """However long it is, and whatever those that live wrote since."""
    log = tmp_path / "log"
    with log.open("wb") as out:
        out.truncate(2**40)
        out.seek(0, os.SEEK_END)
        out.write(b"\nwhy it ended\n" + b'{"event": "answered"}\n' * 100)
    ended = subprocess.Popen(["sleep", "60"])
    ended.kill()
    ended.wait()
    assert last_word(log, ended) == "why it ended"
    assert last_word(tmp_path / "none", ended) == "ended by signal 9"


@pytest.mark.parametrize("content", ["{", "[]", '{"at": "x"}', '{"at": 1e18, "slots": {"a": 1}}'])
def test_a_damaged_status_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    assert serving.status(tmp_path) == serving.Status()


@pytest.mark.parametrize("content", ["{", "[]", '{"restarts": null}', '{"champion": {"name": 1}}'])
def test_a_damaged_wish_is_one_line_that_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "desired.json").write_text(content)
    with pytest.raises(
        UserError, match=r"desired\.json does not say what should be served"
    ) as said:
        serving.desired(tmp_path)
    assert "\n" not in str(said.value)


def test_nothing_served_is_nothing_to_restart(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.deploy.targets.local", "restart"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "start it: make serve" in done.stderr
