"""What callers notice of deaths, restarts and releases, and how soon a bad model is gone.

A real bundle, real replicas behind a real Envoy, an open loop of callers whose every answer is
compared with the bundle's own. Run: python benchmarks/release.py [load | faults | alike]
"""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import yaml
from bench import ROOT
from load import Load
from onnx import ModelProto, helper, numpy_helper

sys.path.insert(0, str(ROOT / "tests"))
from deploy.served import FAULTY, Served, free, until

from pipelines import bundle, stage
from pipelines import params as parameters
from pipelines.deploy import judge, promotion, register, registry, serving, up
from pipelines.deploy.targets import Observation, Slot

MINUTES = 5
RATE = 100.0  # requests a second
KILL_EVERY = 20.0
RESTARTS = 20
ROWS = 5000
# So many real looks at two slots that are alike, from which releases are drawn.
LOOKS, DRAWN, LIVE = 120, 20, 20
Change = Callable[[ModelProto], None]


def main() -> None:
    asked = sys.argv[1:] or ["load", "faults", "alike"]
    rows = {"load": load, "faults": faults, "alike": alike}
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder))
        for name in asked:
            rows[name](home)


class Home:
    """A checkout of its own with a registry, whose champion is the real bundle."""

    def __init__(self, folder: Path) -> None:
        self.original = ROOT / bundle.FOLDER
        for name in (".dvc/config", "params.yaml"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        os.chdir(folder)
        values = yaml.safe_load(Path("params.yaml").read_text())
        traffic = free(parameters.load().traffic).model_dump()
        store = {"uri": f"sqlite:///{folder}/mlflow.db", "artifacts": f"{folder}/artifacts"}
        values |= {"traffic": traffic, "tracking": store}
        values["fetch"]["source"] = "sample"
        Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        config = Path(".dvc/config")
        config.write_text(re.sub(r"url = .*", f"url = {folder}/store", config.read_text()))
        Path("models/fit").mkdir(parents=True)
        Path("models/fit/weights").write_text("bench")
        self.params = parameters.load()
        self.faults: dict[str, str] = {}
        self.expected: dict[str, list[float]] = {}
        table = pq.read_table(self.original / bundle.REFERENCE).slice(0, ROWS)
        contract = bundle.contract(self.original)
        self.rows = table.select([column["name"] for column in contract["columns"]])
        self.bodies = [
            json.dumps({k: None if v != v else v for k, v in row.items()}).encode()
            for row in self.rows.to_pylist()
        ]
        self.release(lambda model: None)
        promotion.reconcile(registry.of(self.params))

    def release(self, change: Change, fault: str = "") -> str:
        """Register a changed bundle as the next version, past the gate. Returns its digest."""
        shutil.rmtree(bundle.FOLDER, ignore_errors=True)
        shutil.copytree(self.original, bundle.FOLDER)
        model = onnx.load(bundle.FOLDER / bundle.MODEL)
        change(model)
        if fault:
            model.doc_string = f"{fault} {len(self.expected)}"
        onnx.save(model, bundle.FOLDER / bundle.MODEL)
        digest = stage.digest(bundle.FOLDER)
        register.run(self.params)
        self.challenge(digest)
        self.faults[digest] = fault
        self.expected[digest] = bundle.load(bundle.FOLDER).predict(self.rows).tolist()
        return digest

    def challenge(self, digest: str) -> int:
        """Make this the challenger. Returns its version."""
        held = registry.of(self.params)
        version = held.find(digest)
        assert version is not None
        held.tag(int(version.version), {"gate": "passed"})
        held.store.set_registered_model_alias(held.model, "challenger", version.version)
        return int(version.version)

    @contextmanager
    def serving(self) -> Iterator[Served]:
        """The champion, whole, until the block ends."""
        env = {"HEADRACE_FAULTS": json.dumps(self.faults)}
        folder = Path(".state/serving").resolve()
        here = Served(folder, self.params.traffic, self.params.serve, FAULTY, env)
        here.start()
        try:
            if serving.desired(here.folder).champion is None:
                up.begin(self.params, here.target)
            until(lambda: here.target.healthy("champion"), 60)
            yield here
        finally:
            here.stop()

    def controller(self, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipelines.deploy.release", *options]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def load(self, rate: float = RATE) -> Load:
        return Load(self.params.traffic.port, rate, self.bodies, self.expected)


def alike_model(model: ModelProto) -> None:
    """The same answers under another hash."""
    model.doc_string = f"alike {time.time_ns()}"


def answers(made: Callable[[str], list[onnx.NodeProto]], **constants: float) -> Change:
    """The model's probability under the name `p`, made into another."""

    def change(model: ModelProto) -> None:
        for node in model.graph.node:
            node.output[:] = ["p" if name == "probability" else name for name in node.output]
        for name, value in constants.items():
            model.graph.initializer.append(
                numpy_helper.from_array(np.array([value], np.float32), name)
            )
        model.graph.node.extend(made("p"))

    return change


def shuffled(model: ModelProto) -> None:
    """Each number is taken for the next one."""
    names = [one.name for one in model.graph.input if one.type.tensor_type.elem_type == 1]
    following = dict(zip(names, names[1:] + names[:1], strict=True))
    for node in model.graph.node:
        node.input[:] = [following.get(name, name) for name in node.input]


def node(kind: str, *names: str) -> onnx.NodeProto:
    return helper.make_node(kind, list(names[:-1]), [names[-1]])


BAD: dict[str, tuple[Change, str]] = {
    "5 % errors": (alike_model, "errors"),
    "50 ms more": (alike_model, "slow"),
    "NaN": (
        answers(lambda p: [node("Mul", p, "n", "m"), node("Div", "m", "n", "probability")], n=0.0),
        "",
    ),
    "constant": (
        answers(
            lambda p: [node("Mul", p, "n", "m"), node("Add", "m", "c", "probability")], n=0.0, c=0.2
        ),
        "",
    ),
    "inverted": (answers(lambda p: [node("Sub", "one", p, "probability")], one=1.0), ""),
    "wrong order": (shuffled, ""),
    "memory": (alike_model, "memory"),
    "crash loop": (alike_model, "crash"),
}


def faults(home: Home) -> None:
    """Each bad model, released to callers who never pause; then a good one without callers."""
    made = {name: home.release(*how) for name, how in BAD.items()}
    print(f"\n  {'fault':<12}{'gone after':>11}   reason", flush=True)
    with home.serving():
        for name in [*made, "no traffic"]:
            digest = made.get(name) or home.release(alike_model)
            home.challenge(digest)
            if name == "no traffic":
                seconds, reason = released(home)
            else:
                with home.load():
                    seconds, reason = released(home)
            print(f"  {name:<12}{seconds:>9.1f} s   {reason}", flush=True)


def released(home: Home) -> tuple[float, str]:
    """How a release ended, and after how many seconds: from the challenger's first answer on, or
    from the first look where there was no answer.
    """
    controller = home.controller()
    assert controller.stdout is not None
    first, looked, lines = 0.0, 0.0, list[str]()
    for line in controller.stdout:
        lines.append(line.strip())
        looked = looked or ("undecided" in line and time.monotonic()) or 0.0
        first = first or (re.search(r"\b[1-9]\d* answers", line) and time.monotonic()) or 0.0
    controller.wait()
    seconds = time.monotonic() - (first or looked)
    if controller.returncode == 1:
        raise RuntimeError("\n".join(lines))
    ends = [line for line in lines if "rolled back in" in line]
    return seconds, ends[0] if ends else "released"


def load(home: Home) -> None:
    """Callers through deaths, restarts, a release and a rollback."""
    good = home.release(alike_model)
    bad = home.release(BAD["inverted"][0])
    home.challenge(good)
    over = threading.Event()
    told: list[str] = []
    with home.serving() as here, home.load() as callers:
        begun = time.monotonic()
        killing = threading.Thread(target=_kill, args=(here, over, told))
        restarting = threading.Thread(target=_restart, args=(here, over, told))
        for one in (killing, restarting):
            one.start()
        seconds, said = released(home)
        told.append(f"release: {said} ({seconds:.0f} s)")
        home.challenge(bad)
        seconds, said = released(home)
        told.append(f"bad release: {said} ({seconds:.0f} s)")
        while time.monotonic() - begun < MINUTES * 60 or restarting.is_alive():
            time.sleep(0.5)
        over.set()
        killing.join()
        minutes = (time.monotonic() - begun) / 60
    print(f"\n{minutes:.1f} minutes at {RATE:.0f} requests/s: {callers.says()}")
    for line in told:
        print(f"  {line}")
    by = {digest[:12]: count for digest, count in callers.answered.items()}
    print(f"  answers by bundle: {by}", flush=True)


def _kill(here: Served, over: threading.Event, told: list[str]) -> None:
    kills = 0
    while not over.wait(KILL_EVERY):
        pids = [pid for one in here.status().slots.values() for pid in one.pids]
        if pids:
            os.kill(random.choice(pids), signal.SIGKILL)
            kills += 1
    told.append(f"{kills} replicas killed")


def _restart(here: Served, over: threading.Event, told: list[str]) -> None:
    done = 0
    while done < RESTARTS:
        next_one = time.monotonic() + MINUTES * 60 / (RESTARTS + 1)
        here.target.restart()
        done += 1
        over.wait(max(next_one - time.monotonic(), 0))
    told.append(f"{done} rolling restarts")


def alike(home: Home) -> None:
    """Releases of a challenger that is the champion under another hash: none should be bad."""
    looks: list[dict[Slot, Observation]] = []
    bad = 0
    with home.serving() as here, home.load():
        for _ in range(LIVE):
            home.release(alike_model)
            seconds, said = released(home)
            bad += "rolled back" in said
            print(f"  alike, live: {said} ({seconds:.0f} s)", flush=True)
        digest = home.release(alike_model)
        target, version = here.target, registry.of(home.params).find(digest)
        assert version is not None
        from pipelines.deploy.targets import Release

        target.start("challenger", Release("flights", int(version.version), digest, bundle.FOLDER))
        until(lambda: target.healthy("challenger"), 60)
        for _ in range(LOOKS):
            target.shift(50, shadow=True)
            time.sleep(1)
            looks.append(target.observe())
        target.roll_back()
    print(f"alike, live: {bad} of {LIVE} rolled back")
    drawn = sum(_drawn(home, looks, seed) for seed in range(DRAWN))
    print(f"alike, drawn from {LOOKS} real looks: {drawn} of {DRAWN} rolled back", flush=True)


def _drawn(home: Home, looks: list[dict[Slot, Observation]], seed: int) -> bool:
    """Whether a release of seconds drawn by chance, each slot its own or the other's, is bad."""
    chance = random.Random(seed)
    both: tuple[Slot, Slot] = ("champion", "challenger")
    deltas = [
        {slot: judge.since(a[slot], b[slot]) for slot in both}
        for a, b in itertools.pairwise(looks)
        if set(a) == set(b) == set(both)
    ]
    limits = home.params.release
    seconds = limits.shadow_seconds + len(limits.steps) * limits.step_seconds
    total = {slot: looks[0][slot] for slot in both}
    case = judge.begin(dict(total))
    for _ in range(seconds):
        drawn = chance.choice(deltas)
        names = both if chance.random() < 0.5 else both[::-1]
        for slot, name in zip(both, names, strict=True):
            total[slot] = _added(total[slot], drawn[name])
        case = judge.hear(case, dict(total), limits)
        if found := judge.faults(case, limits):
            print(f"  alike, drawn: {found}")
            return True
    return False


def _added(one: Observation, more: Observation) -> Observation:
    return Observation(
        one.requests + more.requests,
        one.errors + more.errors,
        one.refusals + more.refusals,
        {bound: n + more.latency.get(bound, 0) for bound, n in one.latency.items()},
        tuple(a + b for a, b in zip(one.predictions, more.predictions, strict=True)),
        one.memory_bytes,
        one.restarts,
    )


if __name__ == "__main__":
    main()
