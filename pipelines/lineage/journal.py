"""The journal: the run events of this machine, one JSON line each."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.errors import UserError

JOURNAL = Path(".state/lineage/events.jsonl")


def append(event: str) -> None:
    """Add one line, whole or not at all, whoever else writes. Raises OSError."""
    line = event.encode() + b"\n"
    JOURNAL.parent.mkdir(parents=True, exist_ok=True)
    with JOURNAL.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(JOURNAL))
        except OSError:
            with suppress(OSError):
                file.truncate(before)
            raise


def read() -> Iterator[dict[str, Any]]:
    """The events in the order in which they were written; none where there is no journal.

    Raises UserError for a line that somebody else wrote.
    """
    if not JOURNAL.is_file():
        return
    with JOURNAL.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if not isinstance(event, dict) or "eventType" not in event:
                raise UserError(f"{JOURNAL}: line {number} is no event; remove it")
            yield event
