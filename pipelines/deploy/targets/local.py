"""local: the slots on this machine, behind Envoy, kept by the supervisor of `make serve`.

The target only says what should be, in a file; see pipelines/deploy/serving.py. So it works, and a
release goes on, whether the supervisor is up, has died or is started again.

run:  python -m pipelines.deploy.targets.local restart
replaces every replica by a new one, one after another, each drained: no request fails.
"""

import argparse
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from pipelines import stage
from pipelines.deploy import serving
from pipelines.deploy.serving import Desired, Started
from pipelines.deploy.targets import Observation, Release, Shadow, Slot
from pipelines.errors import UserError
from pipelines.params import Params

PATIENCE = 300.0  # seconds for a restart of all replicas


class Local:
    """The files of `folder`, as a target."""

    shadow: Shadow = "paired"

    def __init__(self, folder: Path = serving.FOLDER) -> None:
        self.folder = folder

    def up(self) -> bool:
        return stage.taken(self.folder / serving.LOCK)

    def start(self, slot: Slot, release: Release) -> None:
        kept = serving.bundle_of(self.folder, release.digest)
        if not kept.is_dir() or stage.digest(kept) != release.digest:
            with stage.fresh(kept) as partial:
                shutil.copytree(release.folder, partial, dirs_exist_ok=True)
                if stage.digest(partial) != release.digest:
                    raise UserError(f"{release.folder} is not the bundle {release.digest[:12]}")

        def turn(now: Desired) -> Desired:
            held = now.slots().get(slot)
            if held is not None and (held.digest, held.version) == (
                release.digest,
                release.version,
            ):
                return now
            before = now.champion
            # One that comes back is not backed by the one that is taken back.
            back = before is not None and before.fallback == release.digest
            made = Started(
                name=f"release-{now.started + 1}",
                model=release.model,
                version=release.version,
                digest=release.digest,
                fallback=before.digest if before and not back else None,
            )
            next_one = replace(now, started=now.started + 1)
            if slot == "champion":
                return replace(next_one, champion=made)
            return replace(next_one, challenger=made, percent=0, shadow=False)

        serving.change(self.folder, turn)

    def healthy(self, slot: Slot) -> bool:
        told = serving.desired(self.folder).slots().get(slot)
        now = serving.status(self.folder)
        if told is not None and told.name in now.trouble:
            raise UserError(f"the {slot} does not start: {now.trouble[told.name]}")
        found = now.slots.get(slot)
        if told is None or found is None or found.name != told.name:
            return False
        return found.whole and found.digests == [told.digest]

    def shift(self, percent: int, shadow: bool = False) -> None:
        def turn(now: Desired) -> Desired:
            if now.challenger is None:
                raise UserError("there is no challenger to shift traffic to; start one first")
            return replace(now, percent=percent, shadow=shadow, shifted=time.time())

        serving.change(self.folder, turn)

    def switch(self) -> None:
        serving.change(
            self.folder,
            lambda now: _alone(replace(now, champion=now.challenger)) if now.challenger else now,
        )

    def roll_back(self) -> None:
        serving.change(self.folder, lambda now: _alone(now) if now.challenger else now)

    def serving(self) -> dict[Slot, str]:
        slots = serving.status(self.folder).slots
        return {slot: one.digests[0] for slot, one in slots.items() if len(one.digests) == 1}

    def observe(self) -> dict[Slot, Observation]:
        slots = serving.status(self.folder).slots
        return {slot: one.seen for slot, one in slots.items() if one.seen is not None}

    def restart(self) -> None:
        """Replace every replica; returns when all are new. Raises UserError with the reason where
        new ones end again and again: the old ones serve on.
        """
        if not serving.status(self.folder).slots:
            raise UserError(f"nothing is served from {self.folder}; start it: make serve")
        serving.change(self.folder, lambda now: replace(now, restarts=now.restarts + 1))
        asked = serving.desired(self.folder).restarts
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            now = serving.status(self.folder)
            fresh = [one.whole and not one.old for one in now.slots.values()]
            if fresh and now.restarts >= asked and all(fresh):
                return
            if now.restarts >= asked and now.trouble:
                raise UserError("; ".join(now.trouble.values()))
            time.sleep(0.2)
        raise UserError(
            f"the replicas were not replaced in {PATIENCE:.0f} s; see {self.folder}/logs"
        )


def target(params: Params) -> Local:
    """The target of this checkout."""
    return Local()


def _alone(now: Desired) -> Desired:
    return replace(now, challenger=None, percent=0, shadow=False)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.deploy.targets.local", description="Act on what is served here."
    )
    parser.add_argument("verb", choices=["restart"], help="replace every replica, one by one")
    parser.parse_args()
    try:
        Local().restart()
    except UserError as error:
        print(f"local: error: {error}", file=sys.stderr)
        return 2
    stage.say("local", "every replica is new")
    return 0


if __name__ == "__main__":
    sys.exit(main())
