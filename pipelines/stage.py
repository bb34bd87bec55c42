"""What every stage shares: its command line, its errors, its outputs, whole or not at all.

A stage is a module with `run(params)`; `python -m pipelines.<phase>.<stage>` runs it in the current
folder.
Exit status: 0 done, 1 a fault of the system, 2 a mistake of the user (bad data, bad params).
"""

import argparse
import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from pipelines import params as parameters
from pipelines.errors import TransientError, UserError, intact, naming
from pipelines.params import Params
from pipelines.recorder import Recorder

# What belongs to this machine and not to the graph: tracking store, timings, scratch. Git-ignored.
STATE = Path(".state")
NUMBERS = "Takes no options: the numbers stand in params.yaml of the current folder."
# Of processes that do one stage together (torchrun and Lightning number them), the first alone
# speaks and leaves something behind.
RANK = int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def main(run: Callable[[Params], None]) -> None:
    """Run one stage as a process of its own and exit with its status."""
    stage = asked(NUMBERS)
    signal.signal(signal.SIGTERM, partial(_told_to_end, stage))
    if RANK:
        sys.exit(guarded(f"{stage}, rank {RANK}", run))
    status = guarded(stage, partial(_recorded, stage, run))
    _record_usage(stage, status)
    sys.exit(status)


def _told_to_end(stage: str, *_: Any) -> None:
    """SIGTERM ends a stage as a fault, which a scheduler tries again, and leaves nothing half."""
    raise SystemExit(f"{stage}: fault: told to end; run again")


def asked(epilog: str | None = None) -> str:
    """The name of the module that `python -m` started, which takes no options; its words are the
    answer to --help.
    """
    module = sys.modules["__main__"]
    assert module.__spec__ is not None, "it is started with python -m"
    name = module.__spec__.name
    argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=module.__doc__,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    return name.rpartition(".")[2]


def guarded(stage: str, run: Callable[[Params], None]) -> int:
    """Run, and turn every exception into one line and a status. The traceback goes to a file."""
    try:
        run(parameters.load())
    except UserError as error:
        print(f"{stage}: error: {error}", file=sys.stderr, flush=True)
        return 2
    except TransientError as error:
        print(f"{stage}: fault: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print(f"{stage}: interrupted", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        _keep_traceback(stage)
        # Last, since a scheduler shows the last line.
        print(f"{stage}: fault: {one_line(error)}", file=sys.stderr, flush=True)
        return 1
    return 0


def _recorded(stage: str, run: Callable[[Params], None], params: Params) -> None:
    """Run, and have its lineage told."""
    recorder = Recorder(stage, params.lineage.url)
    try:
        run(params)
    except KeyboardInterrupt:
        recorder.end("ABORT", "interrupted")
        raise
    except Exception as error:
        recorder.end("FAIL", str(error) if isinstance(error, UserError) else one_line(error))
        raise
    recorder.end("COMPLETE")


def one_line(error: Exception) -> str:
    """A fault as one line: its kind and what it says; of a full disk, which file met it."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk while writing {error.filename or 'an output'}"
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:500]}"


def _keep_traceback(stage: str) -> None:
    try:
        log = STATE / "faults" / f"{stage}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc())
        print(f"{stage}: the traceback is in {log}", file=sys.stderr, flush=True)
    except OSError as error:  # a full disk must not hide the fault itself
        print(f"{stage}: no traceback was kept: {error.strerror}", file=sys.stderr, flush=True)


def _record_usage(stage: str, status: int) -> None:
    """Keep seconds since process start, imports included, and peak memory, for the screen."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    use = {
        "status": status,
        "seconds": round(time.time() - _process_start(), 1),
        "peak_mb": round(peak * unit / 1e6),
    }
    # A disk too full for this note has been reported already.
    with suppress(OSError):
        write_json(STATE / "usage" / f"{stage}.json", use)


def _process_start() -> float:
    import psutil

    return float(psutil.Process().create_time())


def me() -> str:
    """This process by its number and its start in seconds, since numbers come again."""
    import psutil

    return f"{os.getpid()} {psutil.Process().create_time():.0f}"


def lives(process: str) -> bool:
    """Whether what `me` named is still at work on this machine."""
    import psutil

    number, started = map(int, process.split())
    try:
        found = psutil.Process(number)
        # The start is counted from a clock that may be set anew by a second or two.
        same = abs(found.create_time() - started) < 5
        return bool(same and found.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def alone(lock: Path, otherwise: str) -> Iterator[None]:
    """Hold the lock file until the block ends. Raises UserError that says `otherwise` where another
    process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(otherwise) from None
        yield


@contextmanager
def turn(lock: Path, waiting: str = "") -> Iterator[None]:
    """Wait for the lock file, and hold it until the block ends. Where that takes time, `waiting` is
    said.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                print(waiting, flush=True)
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def taken(lock: Path) -> bool:
    """Whether a process holds the lock file in `alone`."""
    try:
        with lock.open() as held:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def search_path() -> str:
    """PATH with the programs of this environment first: the commands of dvc.yaml say `python`."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def say(stage: str, text: str) -> None:
    """One line of progress."""
    if not RANK:
        print(f"{stage}: {text}", flush=True)


@contextmanager
def fresh(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` that takes its place when the block ends without an error.

    A killed stage leaves at most the folder beside it, which the next run removes.
    """
    partial = path.with_name(f".{path.name}.partial")
    with _turn(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            with naming(path):
                yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)


@contextmanager
def scratch(stage: str) -> Iterator[Path]:
    """Yield an empty folder for intermediate files; it is gone afterwards."""
    folder = STATE / "scratch" / stage
    with _turn(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            with naming(folder):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _turn(path: Path) -> AbstractContextManager[None]:
    """Wait until no other process of this checkout writes there: a dvc that is killed leaves its
    stage at work, and who runs it again must not remove what that one writes.
    """
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    lock = STATE / "locks" / f"{path.name}.{name}"
    return turn(lock, f"waiting for another process that writes {path}")


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON (sorted keys, no NaN), whole or not at all."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield the name of a file beside `path` that takes its place when the block ends without an
    error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with naming(path):
            yield partial
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def link(path: Path, file: Path) -> None:
    """Make `path` the same file as `file`, or, where the disk has no links or is another, a copy.

    Raises FileExistsError.
    """
    try:
        path.hardlink_to(file)
    except FileExistsError:
        raise
    except OSError:
        with whole(path) as partial:
            shutil.copyfile(file, partial)


@contextmanager
def page(path: Path, verdict: Path) -> Iterator[None]:
    """Note beside a page, which the block writes, to which verdict it belongs.

    DVC brings a verdict back from its cache, and no page.
    """
    note = _note(path)
    note.unlink(missing_ok=True)
    yield
    with whole(note) as partial:
        partial.write_text(sha256(verdict) + "\n")


def is_page_of(path: Path, verdict: Path) -> bool:
    """Whether the page was made with the verdict as it is."""
    note = _note(path)
    return path.exists() and note.is_file() and note.read_text().strip() == sha256(verdict)


def _note(page: Path) -> Path:
    return page.with_name(f"{page.name}.verdict")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file that an earlier stage wrote. Raises UserError where it is missing or
    damaged.
    """
    with intact(path, "JSON file", ValueError):
        return json.loads(path.read_text(encoding="utf-8"))


def digest(folder: Path) -> str:
    """The name of a folder's content: SHA-256 over the sorted names and digests of its files."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return digest_of({file.relative_to(folder).as_posix(): sha256(file) for file in files})


def digest_of(files: Mapping[str, str]) -> str:
    """The name of a folder whose files, in the order of their paths, have these digests."""
    lines = [f"{name} {sha256}\n" for name, sha256 in files.items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
