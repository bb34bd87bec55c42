"""Logs: one JSON object a line on standard error, written by a thread of its own.

Where nobody reads them fast enough, lines are dropped: a request never waits for its log.
"""

import logging
import queue
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import QueueHandler, QueueListener
from typing import Any

import msgspec

from pipelines import stage

LINES = 10_000


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "at": f"{at}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage().strip(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info and isinstance(record.exc_info[1], Exception):
            line["fault"] = stage.one_line(record.exc_info[1])
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class _Dropping(QueueHandler):
    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(queue.Full):
            self.queue.put_nowait(record)

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return logging.makeLogRecord({"msg": self.format(record), "levelno": record.levelno})


@contextmanager
def written() -> Iterator[None]:
    """Send what is logged to standard error until the block ends, and all of it then."""
    lines: queue.Queue[logging.LogRecord] = queue.Queue(LINES)
    handler = _Dropping(lines)
    handler.setFormatter(_Json())
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("headrace").setLevel(logging.INFO)
    listener = QueueListener(lines, logging.StreamHandler(sys.stderr))
    listener.start()
    try:
        yield
    finally:
        root.removeHandler(handler)
        listener.stop()
