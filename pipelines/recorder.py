"""The recorder: a process beside a stage that tells of its run; see pipelines/lineage/record.py."""

import json
import select
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime

# Seconds, at most, that a stage waits until what it gave is read.
PATIENCE = 10


class Recorder:
    """Tells when a run of the stage begins and how it ends. No fault of it is one of the stage."""

    def __init__(self, stage: str, url: str | None) -> None:
        self._stage = stage
        self._process: subprocess.Popen[bytes] | None = None
        with suppress(OSError):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.lineage.record", stage, *filter(None, [url])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the stage, which tells of it
            )
        self._tell("START")

    def end(self, event: str, error: str = "") -> None:
        """Tell COMPLETE, FAIL or ABORT. Says in a line what could not be told; of what was aborted
        nothing is asked: it ends at once.
        """
        self._tell(event, error)
        if event != "ABORT" and (said := self._heard()):
            print(f"{self._stage}: lineage: {said}", file=sys.stderr, flush=True)

    def _tell(self, event: str, error: str = "") -> None:
        line = {"event": event, "at": datetime.now(UTC).isoformat(), "error": error}
        if self._process and self._process.stdin:
            with suppress(OSError):  # it has ended, and that is heard
                self._process.stdin.write(json.dumps(line).encode() + b"\n")
                self._process.stdin.flush()

    def _heard(self) -> str:
        answer = self._process.stdout if self._process else None
        if answer is None:
            return "its recorder could not be started"
        if not select.select([answer], [], [], PATIENCE)[0]:
            return f"not told within {PATIENCE} s"
        line = answer.readline()
        return line.decode().strip() if line else "its recorder has ended"
