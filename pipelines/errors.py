"""The exceptions that speak to people, and the one fault that names its file: a full disk."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# How the system, the engines and SQLite say that a disk is full.
FULL = ("no space left on device", "database or disk is full")


class UserError(Exception):
    """What the user can mend: one line that names the file, row or key and what was expected.

    Exit 2.
    """


class TransientError(Exception):
    """What nobody here can mend and another attempt may not meet, as one line.

    Exit 1, so that a scheduler tries again.
    """


def printable(text: str) -> str:
    """Without what a terminal obeys: data may hold anything, a line on a screen may not."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextmanager
def naming(place: Path | str) -> Iterator[None]:
    """A full disk, whoever tells of it, becomes an OSError that names `place`: a failed write names
    no file, and an engine wraps it in errors of its own.
    """
    try:
        yield
    except Exception as error:
        named = isinstance(error, OSError) and error.filename is not None
        if named or isinstance(error, UserError) or not _full(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place)) from error


def _full(error: BaseException | None) -> bool:
    """Whether a full disk is the error or what led to it."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return True
    text = str(error).lower()
    return any(said in text for said in FULL) or _full(error.__cause__ or error.__context__)
