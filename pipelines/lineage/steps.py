"""What each stage reads and gives. dvc.yaml says what it is to be, dvc.lock what it was."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import UserError
from pipelines.lineage import columns

PARAMS, GRAPH, LOCK = Path("params.yaml"), Path("dvc.yaml"), Path("dvc.lock")
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Step:
    """A stage: the paths it reads that other stages give, those it gives, and its other files, each
    with its hash ("" where nothing was made yet).
    """

    name: str
    inputs: Mapping[str, str]
    outs: Mapping[str, str]
    files: Mapping[str, str]

    @property
    def sql(self) -> str | None:
        """The path of its query, if it has one."""
        return next((path for path in self.files if path.endswith(".sql")), None)


def planned(stage: str) -> Step:
    """A stage as dvc.yaml has it; nothing goes in or out of one that does not stand there plainly:
    an effect, or a member of a foreach, whose name its process does not know.
    """
    if not GRAPH.is_file():
        return Step(stage, {}, {}, {})
    stages, params = _read(GRAPH)["stages"], _read(PARAMS)
    every = [path for block in stages.values() for path in _outs(block, params)]
    block = stages.get(stage, {})
    deps = [_filled(dep, params) for dep in block.get("deps", ())]
    return _step(stage, dict.fromkeys(deps, ""), dict.fromkeys(_outs(block, params), ""), every)


def made() -> dict[str, Step]:
    """Every stage as it last ran. Raises UserError where none has."""
    if not LOCK.is_file():
        raise UserError(f"{LOCK} is missing; nothing was made here yet: make run")
    entries = _read(LOCK).get("stages", {})
    outs = {name: _hashes(entry.get("outs", ())) for name, entry in entries.items()}
    every = [path for paths in outs.values() for path in paths]
    return {
        name: _step(name, _hashes(entry.get("deps", ())), outs[name], every)
        for name, entry in entries.items()
    }


def labelled(sources: columns.Sources) -> columns.Sources:
    """What a query gives: the features hold the column that is foretold as `label`."""
    target = str(_read(PARAMS)["dataset"]["target"]["column"])
    return sources | ({"label": sources[target]} if target in sources else {})


def back(steps: Mapping[str, Step], path: str) -> list[Step]:
    """The steps that led to the path, the last one first, each before those it built on.

    Raises UserError where one was made of something else than what its maker gave last.
    """
    makers = {out: step for step in steps.values() for out in step.outs}
    found: dict[str, Step] = {}

    def visit(step: Step) -> None:
        found.pop(step.name, None)  # it stands after all that build on it
        found[step.name] = step
        for dep, md5 in step.inputs.items():
            maker = makers[_holder(dep, makers)]
            if maker.outs.get(dep, md5) != md5:
                raise UserError(
                    f"{LOCK}: {step.name} was made of another {dep} than {maker.name} gave last; "
                    "bring them together: dvc repro"
                )
            visit(maker)

    visit(makers[path])
    return list(found.values())


def _step(name: str, deps: Mapping[str, str], outs: Mapping[str, str], every: list[str]) -> Step:
    inputs = {path: md5 for path, md5 in deps.items() if _given(path, every)}
    files = {path: md5 for path, md5 in deps.items() if path not in inputs}
    return Step(name, inputs, outs, files)


def _given(path: str, outs: Iterable[str]) -> bool:
    return any(Path(path).is_relative_to(out) for out in outs)


def _holder(path: str, outs: Iterable[str]) -> str:
    return next(out for out in outs if Path(path).is_relative_to(out))


def _outs(block: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """A path may stand alone or with what DVC is to do with it."""
    listed = [one for part in ("outs", "metrics", "plots") for one in block.get(part, ())]
    paths = [one if isinstance(one, str) else next(iter(one)) for one in listed]
    return [_filled(path, params) for path in paths]


def _filled(path: str, params: Mapping[str, Any]) -> str:
    """The path with `${dotted.key}` of params.yaml replaced."""

    def value(match: re.Match[str]) -> str:
        found: Any = params
        for key in match[1].strip().split("."):
            found = found[key]
        return str(found)

    return re.sub(r"\$\{([^}]*)\}", value, path)


def _hashes(listed: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    return {str(one["path"]): str(one["md5"]) for one in listed}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no mapping; bring it back from git")
    return found
