"""up: serve on this machine until Ctrl-C.

in:   the registry's champion; where the registry cannot be reached, what was served here before
out:  the service behind Envoy; how to ask it, on the screen
run:  make serve
"""

import json
import math
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

from pipelines import bundle, stage, tables
from pipelines.deploy import promotion, registry, serving, targets
from pipelines.deploy.serve.keys import Keys
from pipelines.deploy.supervise import TICK, Supervisor
from pipelines.deploy.targets.local import Local
from pipelines.errors import UserError
from pipelines.params import Params


def main() -> int:
    """Serve until Ctrl-C. Exit status 0, 2 where the user can mend what is wrong, else 1."""
    return stage.guarded(stage.asked(), _serve)


def _serve(params: Params) -> None:
    target = Local()
    if target.up():
        raise UserError(f"{serving.FOLDER} is served by another supervisor")
    if params.serve.keys is not None:
        Keys(Path(params.serve.keys), params.serve.rate_limit)  # that it can be read
    begin(params, target)
    supervisor = Supervisor(serving.FOLDER, params.traffic, params.serve)
    for stopping in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stopping, lambda *_: supervisor.over.set())
    telling = threading.Thread(target=_tell, args=(params, target, supervisor), daemon=True)
    telling.start()
    supervisor.run()
    stage.say("up", "stopped")


def begin(params: Params, target: Local) -> None:
    """Say that the registry's champion be served."""
    before = serving.desired(serving.FOLDER).champion
    try:
        held = registry.of(params)
        entry = promotion.reconcile(held)
    except Exception as error:  # of MLflow, its database, or the way to either
        if before is None or isinstance(error, UserError):
            raise
        what = f"version {before.version}, which was served here before"
        stage.say("up", f"no registry at {params.tracking.uri}, so {what}: {stage.one_line(error)}")
        return
    if entry is None:
        raise UserError(f"{held.model} has no champion at {params.tracking.uri}; make it: make run")
    targets.start(target, held, "champion", entry.version)


def _tell(params: Params, target: Local, supervisor: Supervisor) -> None:
    """How to ask, once there is somebody to ask."""
    stage.say("up", "starting, a few seconds")
    while not _answers(target):
        if supervisor.over.wait(TICK):
            return
    champion = serving.desired(serving.FOLDER).champion
    assert champion is not None
    bundle_of = serving.bundle_of(serving.FOLDER, champion.digest)
    traffic, ports = params.traffic, serving.status(serving.FOLDER).slots["champion"].ports
    key, how = "", ""
    if params.serve.keys is not None:
        key = " \\\n             -H 'authorization: Bearer KEY'"
        how = "  a key    python -m pipelines.deploy.serve.keys NAME\n"
        how += "           python -m pipelines.deploy.targets.local restart, and it is known\n"
    print(
        f"\n  {champion.model} version {champion.version}, bundle {champion.digest[:12]}\n\n"
        f"  ask      curl http://{traffic.address}:{traffic.port}/predict "
        f"-H 'content-type: application/json'{key} \\\n"
        f"             -d '{_example(bundle_of)}'\n{how}"
        f"  metrics  {' '.join(f'http://127.0.0.1:{port}/metrics' for port in ports)}\n"
        f"  envoy    http://127.0.0.1:{traffic.admin_port}\n"
        f"  logs     {serving.FOLDER}/logs\n\n  Ctrl-C stops all of it.",
        flush=True,
    )


def _answers(target: Local) -> bool:
    with suppress(Exception):  # what cannot be read, the supervisor says
        # What the supervisor before this one reported says nothing.
        return serving.status(serving.FOLDER).pid == os.getpid() and target.healthy("champion")
    return False


def _example(folder: Path) -> str:
    """A row of the bundle's reference as /predict takes it."""
    columns = [one["name"] for one in bundle.contract(folder)["columns"]]
    row = tables.read_file(folder / bundle.REFERENCE, columns).slice(0, 1).to_pylist()[0]
    return json.dumps({name: _plain(value) for name, value in row.items()})


def _plain(value: str | float | None) -> str | float | None:
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 3)
    return value


if __name__ == "__main__":
    sys.exit(main())
