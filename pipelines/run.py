"""run: every stale stage, then register, then one screen.

in:   params.yaml, dvc.yaml
out:  what `dvc repro` and `python -m pipelines.deploy.register` give
run:  make run
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipelines import bundle, lineage, stage, tracking
from pipelines import params as parameters
from pipelines.deploy import register, registry
from pipelines.deploy.registry import CHALLENGER, CHAMPION
from pipelines.errors import TransientError, UserError
from pipelines.ingest import fetch
from pipelines.params import Params

STAGES = (
    "fetch",
    "load",
    "validate",
    "featurize",
    "fit",
    "evaluate",
    "package",
    "card",
    "score",
    "drift",
    "register",
)
REPORTS = Path("reports")
PATIENCE = 5  # seconds that an interrupted stage gets to end


def main() -> int:
    """Exit status: 0, 2 where the user can mend it, else 1."""
    argparse.ArgumentParser(
        prog="python -m pipelines.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    # Whoever tells this process alone to end means what runs for it too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.time()
    os.environ |= lineage.parent(str(uuid4()))
    try:
        params = parameters.load()
        busy = f"another run is at work in {Path.cwd()}; start again when it has ended"
        with stage.alone(stage.STATE / "run.lock", busy):
            run(params, started)
    except UserError as error:
        print(f"run: error: {error}", file=sys.stderr)
        return 2
    except TransientError as error:
        print(f"run: fault: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError:
        # A stage that was killed, or never started, left no status: that is a fault.
        return max((use["status"] for use in usage(started).values()), default=0) or 1
    except KeyboardInterrupt:
        print("run: interrupted", file=sys.stderr)
        return 130
    return 0


def run(params: Params, started: float) -> None:
    """Every stale stage, then register, then the screen."""
    # The sample changes with its package only.
    asked = params.fetch.source != "sample" and fetch.RAW.is_dir()
    if asked and fetch.changed(params):
        stage.say("run", f"{params.fetch.source} differs from what was fetched")
        _dvc("--force", "--single-item", "fetch")
    _dvc()
    digest = stage.digest(bundle.FOLDER)
    entry = register.record(params, digest)
    if not (tracking.exists(params) and entry.is_file()):
        _call([sys.executable, "-m", "pipelines.deploy.register"])
    print(screen(params, started, stage.read_json(entry)))


def _dvc(*options: str) -> None:
    _call([sys.executable, "-m", "dvc", "repro", *options])


def _call(command: list[str]) -> None:
    """Run with the programs of this environment first on the path."""
    env = os.environ | {"PATH": stage.search_path(), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=env) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            _end(process)
            raise
    if status:
        raise subprocess.CalledProcessError(status, command)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C reached it too: it ends by itself, and its stage cleans up. But DVC is deaf while a
    stage runs, and a stage between two others hears nothing: then all of them are told again.
    """
    import psutil

    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
            return
        with suppress(psutil.NoSuchProcess):
            for one in psutil.Process(process.pid).children(recursive=True):
                one.send_signal(signal.SIGINT)


def usage(since: float) -> dict[str, dict[str, Any]]:
    """What each stage last took, for those that ended after `since`."""
    files = {name: stage.STATE / "usage" / f"{name}.json" for name in STAGES}
    return {
        name: stage.read_json(file)
        for name, file in files.items()
        if file.is_file() and file.stat().st_mtime >= since
    }


def screen(params: Params, started: float, version: dict[str, Any]) -> str:
    """What was made, how good it is, what it took, and where to look."""
    ran = usage(started)
    aliases = _aliases(params, version)
    body = [*_data(), *_quality(), *_watch(version, aliases), *_cost(ran), *_where(params)]
    body += _next(aliases)
    spent = time.time() - started
    head = (
        f"{len(ran)} stages in {spent:.0f} s"
        if ran
        else f"Nothing changed, nothing ran ({spent:.1f} s)"
    )
    return "\n".join(["", head, *body])


def _data() -> list[str]:
    checked = stage.read_json(REPORTS / "validate" / "verdict.json")
    rows = stage.read_json(REPORTS / "evaluate" / "verdict.json")["rows"]
    split = ", ".join(f"{name} {rows[name]:,}" for name in ("train", "val", "test"))
    return [
        "",
        f"  rows        {checked['rows']:,} in, {checked['quarantined']:,} in quarantine, "
        f"{sum(rows.values()):,} with label ({split})",
    ]


def _quality() -> list[str]:
    outcome = stage.read_json(REPORTS / "evaluate" / "verdict.json")
    lines = ["", f"  {'test rows':<18}{'model':<29}gradient boosting"]
    for name, figure in outcome["metrics"].items():
        lines.append(
            f"  {name.replace('_', ' '):<18}{_figure(figure):<29}"
            f"{_figure(outcome['baseline'][name])}"
        )
    checks = outcome["behaviour"]
    passed = sum(check["passed"] for check in checks)
    verdict = "passed" if outcome["passed"] else "not passed: " + "; ".join(outcome["reasons"])
    return [*lines, f"  behaviour {passed} of {len(checks)}, verdict {verdict}"]


def _figure(figure: dict[str, float]) -> str:
    return f"{figure['value']:.4f} ({figure['low']:.4f} to {figure['high']:.4f})"


def _watch(version: dict[str, Any], aliases: list[str] | None) -> list[str]:
    drift = stage.read_json(REPORTS / "drift" / "verdict.json")
    said = "; ".join(drift["reasons"]) if drift["drift"] else "none"
    features = len(drift["drifted_features"]) + len(drift["empty_features"])
    unknown = "aliases unknown: the registry does not answer"
    names = unknown if aliases is None else " and ".join(aliases) or "no alias"
    return [
        "",
        f"  drift       {said} ({features} features moved)",
        f"  bundle      {version['bundle'][:12]}, {version['model']} version {version['version']}, "
        f"{names}",
    ]


def _aliases(params: Params, version: dict[str, Any]) -> list[str] | None:
    """As the registry has them now, since people move them, and release does; None where it does
    not answer.
    """
    from mlflow.exceptions import MlflowException

    try:
        return registry.of(params).aliases_of(int(version["version"]))
    except MlflowException:
        return None


def _cost(ran: dict[str, dict[str, Any]]) -> list[str]:
    if not ran:
        return []
    lines = ["", f"  {'stage':<12}{'seconds':>8}{'peak MB':>9}"]
    lines += [
        f"  {name:<12}{use['seconds']:>8.1f}{use['peak_mb']:>9,}" for name, use in ran.items()
    ]
    return lines


def _where(params: Params) -> list[str]:
    # The site's index wants the network; the page of the validation is read without.
    docs = next((REPORTS / "validate" / "data_docs").glob("validations/**/*.html"), None)
    pages = [
        _page("evaluate", REPORTS / "evaluate" / "evaluate.png"),
        _page("validate", REPORTS / "validate" / "data_docs", docs),
        _page("drift", REPORTS / "drift" / "report.html"),
        _page("card", REPORTS / "model_card.html", verdict=REPORTS / "model_card.md"),
    ]
    if params.package.forms:
        pages.append(_page("package", REPORTS / "package" / "forms.md"))
    return [
        "",
        f"  look at     {pages[0]}",
        *(f"              {page}" for page in pages[1:]),
        "              runs and versions, on http://127.0.0.1:5000:",
        f"              .venv/bin/mlflow server --backend-store-uri {params.tracking.uri}",
    ]


def _next(aliases: list[str] | None) -> list[str]:
    if CHALLENGER in (aliases or ()):
        return ["", "  next        make gate, then make release beside make serve"]
    return ["", "  next        make serve"] if CHAMPION in (aliases or ()) else []


def _page(name: str, noted: Path, shown: Path | None = None, verdict: Path | None = None) -> str:
    """Where to look, or how to make the page again where it is of another run or gone."""
    if stage.is_page_of(noted, verdict or REPORTS / name / "verdict.json"):
        return str(shown or noted)
    return f"{noted} is not of this run; make it: dvc repro --force --single-item {name}"


if __name__ == "__main__":
    sys.exit(main())
