"""The exceptions that speak to people, and what is told by the name of its file: a full disk, and
a file that is missing or damaged.
"""

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


@contextmanager
def intact(file: Path, kind: str, *damage: type[Exception]) -> Iterator[None]:
    """What reads a file that an earlier stage wrote. Raises UserError where it is missing, may not
    be read, or is no whole file of its kind, which the reader tells by an error of `damage`.
    """
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{file} is missing; run the stage that writes it: dvc repro") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except damage as error:
        # What the system could not do says nothing of the file.
        if isinstance(error, MemoryError | ImportError) or (
            isinstance(error, OSError) and error.errno
        ):
            raise
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{file} is no whole {kind} ({said}); bring it back: dvc checkout, or make it again: "
            "dvc repro"
        ) from None


def _full(error: BaseException | None) -> bool:
    """Whether a full disk is the error or what led to it."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return True
    text = str(error).lower()
    return any(said in text for said in FULL) or _full(error.__cause__ or error.__context__)
