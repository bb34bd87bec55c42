"""edge: the slots as a channel, a folder that devices read when they have a network.

    channel.json     which bundle each slot is, the challenger's share, a counter; signed
    files/<sha256>   every file of the slots, under its hash: a device takes only what it lacks
    answered/        what devices brought back: answered.jsonl of each, under any name

Copy the folder to wherever devices reach it; see infra/targets/edge/run.py, which is all that a
device runs. Every change has a higher counter, and a device refuses a lower one: so a rollback is
a newer channel with the older bundle, and nobody can replay what was taken back.

A device takes the challenger by a hash of its name. Nobody can mirror what it answers: a share of
devices is the only trial.

run:  python -m pipelines.deploy.targets.edge CHANNEL DEVICE FOLDER
makes the folder of one device, whole: copied to the device it answers without a network.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines import bundle, metrics, quantize, signing, stage, tables
from pipelines.deploy.targets import Observation, Release, Shadow, Slot, answered
from pipelines.errors import UserError
from pipelines.params import Params

RUNNER = Path(__file__).parent.parent.parent.parent / "infra" / "targets" / "edge" / "run.py"
# The int8 network goes to devices only if it costs less than this on the bundle's reference rows.
MAX_AUC_FALL = 0.001
MAX_LOG_LOSS_RISE = 0.001
Channel = dict[str, Any]


class Edge:
    """The channel in `folder`, as a target."""

    shadow: Shadow = "none"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def up(self) -> bool:
        return True

    def start(self, slot: Slot, release: Release) -> None:
        def turn(now: Channel) -> None:
            held = now["slots"].get(slot, {})
            same = (held.get("bundle"), held.get("version")) == (release.digest, release.version)
            if same and self._whole(held):
                return
            now["model"] = release.model
            now["slots"][slot] = self._published(release)
            if slot == "challenger" and not same:
                now["percent"] = 0

        self._change(turn)

    def healthy(self, slot: Slot) -> bool:
        """Whether every file of the slot lies in the channel as it was signed; who took it is seen
        in `observe`.
        """
        held = self._channel()["slots"].get(slot)
        return held is not None and self._whole(held)

    def shift(self, percent: int, shadow: bool = False) -> None:
        if shadow and not percent:
            raise UserError("edge: nothing mirrors what a device answers; start with a share")

        def turn(now: Channel) -> None:
            if "challenger" not in now["slots"]:
                raise UserError("there is no challenger to shift traffic to; start one first")
            now["percent"] = percent

        self._change(turn)

    def switch(self) -> None:
        def turn(now: Channel) -> None:
            if "challenger" in now["slots"]:
                now["slots"] = {"champion": now["slots"]["challenger"]}
                now["percent"] = 0

        self._change(turn)

    def roll_back(self) -> None:
        def turn(now: Channel) -> None:
            if now["slots"].pop("challenger", None):
                now["percent"] = 0

        self._change(turn)

    def serving(self) -> dict[Slot, str]:
        return {slot: held["bundle"] for slot, held in self._channel()["slots"].items()}

    def observe(self) -> dict[Slot, Observation]:
        """What devices brought back; memory is that of the largest."""
        files = sorted((self.folder / "answered").glob("*.jsonl"))
        lines = [line for file in files for line in file.read_text(errors="replace").splitlines()]
        seen: dict[Slot, Observation] = {}
        for slot, digest in self.serving().items():
            found = answered.observation(answered.notes(lines, digest))
            if found is not None:
                seen[slot] = found
        return seen

    def install(self, device: str, folder: Path) -> None:
        """Make the whole folder of one device, with what the channel has now.

        Raises UserError where there is something: a device may hold answers nobody collected.
        """
        if folder.exists():
            raise UserError(f"{folder} exists; expected a new folder for the device {device}")
        with stage.fresh(folder) as root:
            (root / "device").write_text(device)
            (root / "signing.pub").write_bytes(signing.public())
            # The first update starts from a runner that stands where a release would.
            first = root / "first"
            first.mkdir()
            shutil.copy(RUNNER, first / RUNNER.name)
            done = subprocess.run(
                [sys.executable, first / RUNNER.name, "update", self.folder.resolve()],
                capture_output=True,
                text=True,
            )
            if done.returncode != 0:
                raise UserError(done.stderr.strip())
            shutil.rmtree(first)

    def _whole(self, held: dict[str, Any]) -> bool:
        """Whether the channel has every file of a slot."""
        files = held["files"].values()
        return all(_sha256(self.folder / "files" / sha256) == sha256 for sha256 in files)

    def _published(self, release: Release) -> dict[str, Any]:
        """Put the files of a release into the channel. Returns its slot."""
        if stage.digest(release.folder) != release.digest:
            raise UserError(f"{release.folder} is not the bundle {release.digest[:12]}")
        with tempfile.TemporaryDirectory() as made:
            model, variant = smaller(release.folder, Path(made))
            sources = {
                RUNNER.name: RUNNER,
                bundle.CONTRACT: release.folder / bundle.CONTRACT,
                bundle.MODEL: model,
            }
            files = {name: _sha256(source) for name, source in sources.items()}
            for name, sha256 in files.items():
                with stage.whole(self.folder / "files" / sha256) as partial:
                    shutil.copy(sources[name], partial)
        about = {"version": release.version, "bundle": release.digest, "variant": variant}
        return about | {"files": files}

    def _channel(self) -> Channel:
        path = self.folder / "channel.json"
        if not path.is_file():
            return {"model": "", "counter": 0, "percent": 0, "slots": {}}
        try:
            channel: Channel = json.loads(path.read_bytes())
            # What is read here is signed again when it changes, so it must be ours; Ed25519 signs
            # the same twice alike.
            ours = channel.pop("signature") == signing.sign(channel)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            ours = False
        if not ours:
            raise UserError(f"{path}: no channel that the key here signed")
        return channel

    def _change(self, turn: Callable[[Channel], None]) -> None:
        """Publish what `turn` makes of the channel, under the next number; nothing if nothing
        changed. One change at a time: two would have one number.
        """
        with stage.turn(self.folder / "channel.lock"):
            before, after = self._channel(), self._channel()
            turn(after)
            if after == before:
                return
            after["counter"] += 1
            signed = after | {"signature": signing.sign(after)}
            stage.write_json(self.folder / "channel.json", signed)
            kept = {sha for held in after["slots"].values() for sha in held["files"].values()}
            for file in (self.folder / "files").iterdir():
                if file.name not in kept:
                    file.unlink()


def target(params: Params) -> Edge:
    """The channel of targets.edge.folder."""
    return Edge(Path(params.targets.edge.folder))


def smaller(folder: Path, out: Path) -> tuple[Path, dict[str, Any]]:
    """The network for devices, int8 if that loses little, and what it loses; one that was packaged
    as int8 goes as it is.

    Raises UserError where the bundle is missing.
    """
    import onnx

    scorer = bundle.load(folder)
    reference = tables.read_file(folder / bundle.REFERENCE)
    label = reference[scorer.contract["label"]].to_numpy()
    packaged = onnx.load(folder / bundle.MODEL)
    made = quantize.quantized(packaged, scorer.contract, reference)
    if made is packaged:
        kind = "int8" if quantize.is_int8(packaged) else "float32"
        return folder / bundle.MODEL, {"type": kind}
    small = out / bundle.MODEL
    onnx.save(made, small)
    other = bundle.Scorer(scorer.contract, bundle.open_session(small))
    before = metrics.point(label, scorer.predict(reference))
    after = metrics.point(label, other.predict(reference))
    lost = {
        "auc_fall": round(before["auc"] - after["auc"], metrics.DIGITS),
        "log_loss_rise": round(after["log_loss"] - before["log_loss"], metrics.DIGITS),
    }
    if lost["auc_fall"] > MAX_AUC_FALL or lost["log_loss_rise"] > MAX_LOG_LOSS_RISE:
        return folder / bundle.MODEL, {"type": "float32", "int8": lost}
    return small, {"type": "int8", "int8": lost}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.deploy.targets.edge", description="Make the folder of a device."
    )
    parser.add_argument("channel", type=Path, help="the folder of the channel")
    parser.add_argument("device", help="the name of the device")
    parser.add_argument("folder", type=Path, help="what is made, to be copied to the device")
    given = parser.parse_args()
    try:
        Edge(given.channel).install(given.device, given.folder.resolve())
    except (UserError, OSError) as error:
        print(f"edge: error: {error}", file=sys.stderr)
        return 2
    stage.say("edge", f"{given.folder} is the device {given.device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
