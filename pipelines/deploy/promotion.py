"""promotion: which version is champion. An effect: of many at once one wins; told twice, it acts
once.

    status                               the log, and whether the alias and what is served follow
    promote VERSION --replaces N         VERSION becomes champion in the place of N
    roll-back --replaces N               the champion before N comes back
    challenge VERSION                    VERSION is challenger, though it was rolled back
    reconcile                            the alias, and what is served, follow the log

run:  python -m pipelines.deploy.promotion --help
"""

import argparse
import getpass
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipelines import lease, stage
from pipelines.deploy import approval, registry, targets
from pipelines.deploy.registry import (
    CHALLENGER,
    CHAMPION,
    ROLLED_BACK,
    ConflictError,
    Entry,
    Registry,
)  # fmt: skip
from pipelines.deploy.targets import Target
from pipelines.errors import UserError
from pipelines.params import Params

ATTEMPTS = 20
# The tag of a version that a person made challenger: at which entry of the log.
CHALLENGED = "challenged"


def promote(
    held: Registry,
    version: int,
    replaces: int | None,
    who: str,
    why: str,
    evidence: Mapping[str, Any] | None = None,
) -> Entry:
    """Make a version champion in the place of `replaces` (None: there was none).

    Raises ConflictError, and nothing changed, where the champion is another by now.
    """
    bundle = str(held.version(version).tags["bundle"])
    entry = Entry(0, version, bundle, replaces, who, why, evidence=evidence or {})
    return _append(held, entry)


def roll_back(held: Registry, replaces: int, who: str, why: str) -> Entry:
    """The champion before `replaces` comes back. Raises ConflictError where that is not the
    champion, UserError where there was none before it.
    """
    log = held.log()
    newest = log[-1] if log else None
    if newest is not None and newest.rolled_back and newest.replaces == replaces:
        return _settled(held, newest)  # told before
    _refuse_another(held, newest, replaces)
    before = standing(log)[:-1]
    if not before:
        raise UserError(f"{held.model}: there was no champion before version {replaces}")
    back = before[-1]
    entry = Entry(0, back.version, back.bundle, replaces, who, why, rolled_back=True)
    return _append(held, entry)


def standing(log: list[Entry]) -> list[Entry]:
    """The champions that nobody rolled back, the oldest first; the newest is the champion."""
    stack: list[Entry] = []
    for entry in log:
        if entry.rolled_back:
            stack.pop()
        else:
            stack.append(entry)
    return stack


def _append(held: Registry, entry: Entry) -> Entry:
    """Write the entry after the newest, if that is the one it says it replaces."""
    newest = held.champion()
    if newest is not None and newest.version != entry.version:
        _refuse_another(held, newest, entry.replaces)  # no need to wait for that
    with lease.held(held.exchange, f"promotion-{held.model}", _waits):
        newest = held.champion()
        if newest is not None and newest.version == entry.version:
            return _settled(held, newest)  # told before
        _refuse_another(held, newest, entry.replaces)
        entry = replace(entry, number=newest.number + 1 if newest else 1)
        # The lease keeps others from trying in vain; this is what keeps them out.
        if not held.append(entry):
            raise ConflictError(f"{held.model}: another promotion came first; look again")
        return _settled(held, entry)


def _waits(who: str) -> None:
    stage.say("promotion", f"another promotion is at work: {who}")


def _refuse_another(held: Registry, newest: Entry | None, stated: int | None) -> None:
    found = newest.version if newest else None
    if found != stated:
        says = f"version {found}" if found else "none"
        raise ConflictError(
            f"{held.model}: the champion is {says} by now, "
            f"not {f'version {stated}' if stated else 'none'}; look again and decide anew"
        )


def _settled(held: Registry, entry: Entry) -> Entry:
    reconcile(held)
    return entry


def reconcile(held: Registry) -> Entry | None:
    """Make the alias and the tags say what the log says, and return its newest entry.

    A model that has a champion by alias alone, from before there was a log, begins its log with it.
    """
    entry = held.champion() or _adopt(held)
    for _ in range(ATTEMPTS):
        if entry is None:
            return None
        _project(held, entry)
        newest = held.champion()
        # Another may have promoted meanwhile, and set the alias before us.
        if newest == entry:
            return entry
        entry = newest
    raise RuntimeError(f"{held.model}: the log of champions grew {ATTEMPTS} times meanwhile")


def _adopt(held: Registry) -> Entry | None:
    from mlflow.exceptions import MlflowException

    try:
        number = held.aliases().get(CHAMPION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    if number is None:
        return None
    bundle = str(held.version(number).tags["bundle"])
    held.append(Entry(1, number, bundle, None, "reconcile", "it was champion by its alias"))
    return held.champion()


def _project(held: Registry, entry: Entry) -> None:
    held.version(entry.version)
    aliases = held.aliases()
    if aliases.get(CHAMPION) != entry.version:
        held.store.set_registered_model_alias(held.model, CHAMPION, str(entry.version))
    if aliases.get(CHALLENGER) == entry.version:
        held.store.delete_registered_model_alias(held.model, CHALLENGER)
    said = f"{entry.at} by {entry.who}: {entry.why}"
    if entry.rolled_back:
        version = int(entry.replaces or 0)
        tags = held.version(version).tags
        # Once, and not where a person wants it back in spite of this entry.
        if tags.get(CHALLENGED) != str(entry.number) and tags.get(ROLLED_BACK) != said:
            _withdraw(held, version, said)
    else:
        held.tag(entry.version, {"promoted": said})
        held.untag(entry.version, ROLLED_BACK)


def bar(held: Registry, version: int, why: str) -> None:
    """The version was rolled back: it is challenger no more, until a person says so."""
    _withdraw(held, version, why)
    if held.aliases().get(CHALLENGER) == version:
        held.store.delete_registered_model_alias(held.model, CHALLENGER)


def _withdraw(held: Registry, version: int, why: str) -> None:
    """Who approved it did not know what is known now."""
    held.tag(version, {ROLLED_BACK: why})
    held.untag(version, approval.APPROVED)


def challenge(held: Registry, version: int) -> None:
    """Make the version challenger, whatever became of it before. Raises UserError where it is
    champion.
    """
    held.version(version)
    newest = reconcile(held)
    if newest is not None and newest.version == version:
        raise UserError(f"{held.model} version {version} is champion; expected another")
    held.tag(version, {CHALLENGED: str(newest.number if newest else 0)})
    held.untag(version, ROLLED_BACK)
    held.store.set_registered_model_alias(held.model, CHALLENGER, str(version))


def follow(held: Registry, target: Target) -> None:
    """Serve the log's champion, where anything is served.

    Also where it is served: another may be on its way. And again where the log went on meanwhile:
    of two that follow at once, the last to end serves the newest.
    """
    entry, followed = held.champion(), None
    while entry is not None and entry != followed and target.up():
        before = target.serving().get("champion")
        targets.serve(target, held, "champion", entry.version)
        if before != entry.bundle:
            stage.say("promotion", f"version {entry.version} is served as champion")
        entry, followed = held.champion(), entry


def status(held: Registry, target: Target) -> list[str]:
    """The log as lines, and where the alias or what is served disagrees."""
    log = held.log()
    lines = [
        f"{entry.at}  version {entry.version} "
        f"{'back from' if entry.rolled_back else 'in the place of'} {entry.replaces or 'none'}, "
        f"by {entry.who}: {entry.why}"
        for entry in log
    ]
    if not log:
        return [f"{held.model} has no champion"]
    aliases = held.aliases()
    rival, alias = aliases.get(CHALLENGER), aliases.get(CHAMPION)
    lines.append(f"version {rival} is challenger" if rival else "there is no challenger")
    if alias != log[-1].version:
        lines.append(f"the alias names version {alias}; run reconcile")
    served = target.serving().get("champion")
    if served not in (None, log[-1].bundle):
        lines.append(f"bundle {str(served)[:12]} is served as champion; run reconcile")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 where the user can mend it, else 1."""
    given = _parser().parse_args(arguments)
    return stage.guarded("promotion", lambda params: _do(registry.of(params), params, given))


def _do(held: Registry, params: Params, given: argparse.Namespace) -> None:
    target = targets.of(params)
    match given.verb:
        case "promote":
            approval.refuse_without(held, params, given.version)
            promote(held, given.version, given.replaces, given.who, given.why)
            follow(held, target)
        case "roll-back":
            roll_back(held, given.replaces, given.who, given.why)
            follow(held, target)
        case "reconcile":
            reconcile(held)
            follow(held, target)
        case "challenge":
            challenge(held, given.version)
    print("\n".join(status(held, target)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.deploy.promotion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("status")
    verbs.add_parser("reconcile")
    verbs.add_parser("challenge").add_argument("version", type=int)
    for name in ("promote", "roll-back"):
        verb = verbs.add_parser(name)
        if name == "promote":
            verb.add_argument("version", type=int)
        verb.add_argument("--replaces", type=int, required=name == "roll-back", metavar="N")
        verb.add_argument("--who", default=getpass.getuser())
        verb.add_argument("--why", default="by hand")
    return parser


if __name__ == "__main__":
    sys.exit(main())
