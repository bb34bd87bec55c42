"""The winner's values go into params.yaml, and params.yaml alone into a commit.

A value is replaced where it stands; not a comment, a blank or another key is touched.
"""

import difflib
import math
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from pipelines import params as parameters
from pipelines import stage
from pipelines.errors import UserError


def edited(text: str, changes: Mapping[str, Any]) -> str:
    """The text of a params.yaml with other values in its block `fit`. Raises UserError for a value
    that is not written on one line, in its own place.
    """
    block = _value(yaml.compose(text, yaml.SafeLoader), "fit")
    places = []
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        node = _value(_value(block, group) if group else block, name)
        block_style = isinstance(node, yaml.CollectionNode) and not node.flow_style
        if block_style or node.start_mark.line != node.end_mark.line:
            raise UserError(f"{parameters.FILE}: fit.{key} fills several lines; expected one")
        places.append((node.start_mark.index, node.end_mark.index, written(value)))
    for start, end, value in sorted(places, reverse=True):
        text = text[:start] + value + text[end:]
    return text


def _value(block: Any, key: str) -> Any:
    return next(value for name, value in block.value if name.value == key)


def written(value: Any) -> str:
    """The value as YAML that is read as the same: to YAML 1.1 the number 1e-05 is a text."""
    return yaml.safe_dump([value], default_flow_style=True, width=math.inf).strip()[1:-1]


def checked(text: str, changes: Mapping[str, Any]) -> str:
    """The edited text. Raises UserError where params.yaml would then say something else."""
    new, before = edited(text, changes), _loaded(text)
    expected = before.model_copy(update={"fit": before.fit.changed(changes)})
    with suppress(UserError):  # what shares its value by an anchor may be no YAML any more
        if _loaded(new) == expected:
            return new
    keys = ", ".join(changes)
    raise UserError(f"{parameters.FILE}: fit has keys that cannot be set alone among {keys}")


def _loaded(text: str) -> parameters.Params:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / parameters.FILE
        path.write_bytes(text.encode())
        return parameters.load(path)


def committed() -> str:
    """The text of params.yaml. Raises UserError where git does not hold it as it is, or could not
    take a commit.
    """
    file = str(parameters.FILE)
    try:
        _git("ls-files", "--error-unmatch", "--", file)
        changed = _git("status", "--porcelain", "--", file)
        _git("var", "GIT_AUTHOR_IDENT")
        _git("var", "GIT_COMMITTER_IDENT")
    except FileNotFoundError:
        raise UserError("git is missing; expected it, as the winner is a commit") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{file}: git takes no commit of it, which the winner is: {said}") from None
    if changed:
        raise UserError(f"{file} has changes that are in no commit; commit them first")
    return _text()


def commit(before: str, after: str, message: str) -> str:
    """Write params.yaml and commit it alone; the diff. Raises UserError where it is no longer as it
    was, or git refuses.
    """
    if committed() != before:
        raise UserError(f"{parameters.FILE} was changed meanwhile: run again")
    _write(after)
    try:
        _git("commit", "--quiet", "--only", "-m", message, "--", str(parameters.FILE))
    except subprocess.CalledProcessError as error:
        _write(before)
        said = " ".join((error.stderr or error.stdout).split())
        raise UserError(f"{parameters.FILE}: git refused the commit: {said}") from None
    return difference(before, after)


def difference(before: str, after: str) -> str:
    """The unified diff of two texts of params.yaml."""
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    file = parameters.FILE
    return "".join(difflib.unified_diff(old, new, f"a/{file}", f"b/{file}"))


def _text() -> str:
    return parameters.FILE.read_bytes().decode()


def _write(text: str) -> None:
    with stage.whole(parameters.FILE) as partial:
        partial.write_bytes(text.encode())


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
