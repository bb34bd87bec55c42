"""approval: a person says whether a version may be released. An effect: the newer decision holds.

in:   a version that the gate judged
out:  the tag `approved` or `rejected` of the version: who and why; reports/approval/record.json;
      exit 2 where it was rejected
run:  python -m pipelines.deploy.approval approve VERSION [--who NAME] [--why TEXT]

`release.approval` in params.yaml asks for it. On Airflow's page it is a question of the run.
"""

import argparse
import getpass
import sys
from pathlib import Path

from pipelines import stage
from pipelines.deploy import registry
from pipelines.deploy.registry import Registry
from pipelines.errors import UserError
from pipelines.params import Params

APPROVED, REJECTED = "approved", "rejected"
VERDICTS = {"approve": APPROVED, "reject": REJECTED}
RECORD = Path("reports/approval/record.json")


def decide(held: Registry, version: int, verdict: str, who: str, why: str) -> None:
    """Write the decision on the version in the place of the one before."""
    held.version(version)
    other = REJECTED if verdict == APPROVED else APPROVED
    held.tag(version, {verdict: f"by {who}: {why}"})
    held.untag(version, other)
    entry = {"model": held.model, "version": version, "verdict": verdict, "who": who, "why": why}
    stage.write_json(RECORD, entry)


def refuse_without(held: Registry, params: Params, version: int) -> None:
    """Raise UserError unless the gate passed the version, no person rejected it and, where one is
    asked, a person approved it.
    """
    tags = held.version(version).tags
    if tags.get("gate") != "passed":
        how = "run python -m pipelines.deploy.gate"
        verdict = tags.get("gate_reason", f"the gate has not judged it; {how}")
        raise UserError(f"{held.model} version {version} may not be released: {verdict}")
    if REJECTED in tags:  # asked for or not, a person said no
        raise UserError(f"{held.model} version {version} was rejected {tags[REJECTED]}")
    if params.release.approval and APPROVED not in tags:
        raise UserError(
            f"{held.model} version {version} waits for a person: "
            f"python -m pipelines.deploy.approval approve {version}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 where the user can mend it or said no, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.deploy.approval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verdict", choices=VERDICTS)
    parser.add_argument("version", type=int)
    parser.add_argument("--who", default=getpass.getuser())
    parser.add_argument("--why", default="by hand")
    return stage.guarded("approval", lambda params: _do(params, parser.parse_args(arguments)))


def _do(params: Params, given: argparse.Namespace) -> None:
    held = registry.of(params)
    verdict = VERDICTS[given.verdict]
    decide(held, given.version, verdict, given.who, given.why)
    said = f"{held.model} version {given.version} {verdict} by {given.who}: {given.why}"
    if verdict == REJECTED:
        raise UserError(said)
    stage.say("approval", said)


if __name__ == "__main__":
    sys.exit(main())
