"""Checkpoints of a fit: one that is killed goes on where it last stood, bit for bit.

    .state/fit/<key>/<steps>.safetensors

The key names all that a fit is made of. A checkpoint holds all that its next step depends on:
weights, optimiser, schedule, the place in the epoch, the random state of every process, and what
callbacks remember. Tensors are safetensors, the rest is JSON in their header, with a checksum over
both: nothing is unpickled. A file is whole or absent; the last two are kept, and one that is
damaged falls back to the one before.
"""

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pipelines import stage
from pipelines.errors import TransientError, UserError
from pipelines.params import Checkpoint

FOLDER = stage.STATE / "fit"
KEPT = 2
# What nobody went on with for so long is removed.
RETENTION = 7 * 86400  # seconds
# Of Lightning's dictionary, what every process has of its own.
PROCESSES = "processes"
Tree = Any  # nested dicts, lists and tuples of tensors, numbers, texts and None


def pack(tree: Tree) -> bytes:
    """The tree as safetensors. Raises TypeError for what has no form there."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_outlined(tree, tensors))
    return save(tensors, {"tree": text, "sha256": _checksum(text, tensors)})


def unpack(path: Path) -> Tree:
    """The tree of a file. Raises ValueError where the file is not as it was written."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            held = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None
    if held.get("sha256") != _checksum(held.get("tree", ""), tensors):
        raise ValueError(f"{path}: the checksum is another")
    return _filled(json.loads(held["tree"]), tensors)


def _outlined(value: Tree, tensors: dict[str, torch.Tensor]) -> Any:
    """The value for JSON, its tensors put aside by number."""
    match value:
        case torch.Tensor():
            name = str(len(tensors))
            # Of its own: safetensors writes no memory twice.
            tensors[name] = value.detach().cpu().clone().contiguous()
            return {"tensor": name}
        case Mapping():
            return {"dict": [[key, _outlined(one, tensors)] for key, one in value.items()]}
        case list() | tuple():
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [_outlined(one, tensors) for one in value]}
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"{type(value).__name__} has no form in a checkpoint")


def _filled(value: Any, tensors: dict[str, torch.Tensor]) -> Tree:
    match value:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": pairs}:
            return {key: _filled(one, tensors) for key, one in pairs}
        case {"list": values}:
            return [_filled(one, tensors) for one in values]
        case {"tuple": values}:
            return tuple(_filled(one, tensors) for one in values)
    return value


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    hashed = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


class Plain(CheckpointIO):
    """Lightning's checkpoints in this form."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        content = pack(checkpoint)
        with stage.whole(Path(path)) as partial, partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return dict(unpack(Path(path)))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(pl.Callback):
    """Saves into a folder every so many seconds or steps, and once the process is told to end."""

    def __init__(self, folder: Path, every: Checkpoint) -> None:
        self.folder, self.every = folder, every
        self.saved, self.told = time.monotonic(), False
        self.random: list[torch.Tensor] | None = None

    def newest(self) -> Path | None:
        """The last checkpoint that is whole."""
        for path in sorted(self.folder.glob("*.safetensors"), reverse=True):
            try:
                unpack(path)
            except ValueError as error:
                stage.say("fit", f"a damaged checkpoint is left out: {error}")
            else:
                return path
        return None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # In place of Lightning's, which is set by now: it ends without saving, and puts back what
        # was before.
        signal.signal(signal.SIGTERM, self._tell)
        first = trainer.strategy.broadcast(trainer.global_step)
        if first != trainer.global_step:
            raise UserError(
                f"{self.folder}: its newest is step {trainer.global_step} here and {first} for the "
                "first process; expected a folder that all nodes share"
            )

    def _tell(self, *_: Any) -> None:
        """SIGTERM: the step that runs ends, and is saved."""
        self.told = True

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.random is not None:
            _set_random(self.random)
            self.random = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, at: int
    ) -> None:
        if at + 1 >= trainer.num_training_batches:
            return  # between two epochs Lightning is not where it says
        # All processes or none: to save takes all of them.
        if _any(trainer, self.told or self._due(trainer)):
            self._save(trainer)
            if _any(trainer, self.told):
                step = trainer.global_step
                raise TransientError(f"told to end after step {step}; run again")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.num_training_batches == 1:
            self._end(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer)

    def _end(self, trainer: pl.Trainer) -> None:
        """Where no batch follows after which it could be saved."""
        if _any(trainer, self.told):
            raise TransientError("told to end after the last step; run again")

    def _due(self, trainer: pl.Trainer) -> bool:
        if self.every.steps is not None and trainer.global_step % self.every.steps == 0:
            return True
        return time.monotonic() - self.saved > self.every.seconds

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step:012}.safetensors")
        self.saved = time.monotonic()
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("*.safetensors"))[:-KEPT]:
                old.unlink()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        mine = {"random": _random(), "lost": module.lost, "rows": module.rows}
        all_ = [mine]
        if trainer.world_size > 1:
            all_ = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(all_, mine)
        checkpoint[PROCESSES] = all_

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        mine = checkpoint[PROCESSES][trainer.global_rank]
        self.random, module.lost, module.rows = mine["random"], mine["lost"], mine["rows"]
        if trainer.is_global_zero:
            stage.say("fit", f"going on after step {checkpoint['global_step']}")


def _any(trainer: pl.Trainer, mine: bool) -> bool:
    """Whether it is so in any process."""
    return trainer.strategy.reduce_boolean_decision(mine, all=False)


def _random() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def _set_random(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def sweep(key: str) -> Path:
    """The folder of a key, without what others left long ago."""
    for folder in FOLDER.glob("*"):
        if folder.name != key and time.time() - folder.stat().st_mtime > RETENTION:
            shutil.rmtree(folder, ignore_errors=True)
    return FOLDER / key
