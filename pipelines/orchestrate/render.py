"""render: the manifest as Airflow tasks, one for each stage, with the edges of dvc.yaml.

Imports Airflow and the standard library alone: a DAG file is parsed every few seconds.
"""

import functools
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import Asset, BaseOperator, Param, TriggerRule, task
from airflow.sdk.exceptions import AirflowFailException

from pipelines.orchestrate.execute import HOME, Context, ProcessTask, pod_task, run_id

MANIFEST = HOME / "dags" / "manifest.json"
# What the form's fields set in params.yaml.
FORM = {"as_of": "as_of", "max_epochs": "fit.max_epochs"}


@functools.cache
def manifest() -> dict[str, Any]:
    """The graph and the tasks' settings, as `make manifest` wrote them."""
    return dict(json.loads(MANIFEST.read_text(encoding="utf-8")))


def form() -> dict[str, Param]:
    """The trigger form of retrain."""
    return {
        "as_of": Param(
            None,
            type=["null", "string"],
            format="date",
            title="As of",
            description="The clock: nothing at or after it is read. Empty: as params.yaml says.",
        ),
        "max_epochs": Param(
            None,
            type=["null", "integer"],
            minimum=1,
            maximum=1000,
            title="Epochs, at most",
            description="Empty: as params.yaml says.",
        ),
        "reason": Param(
            None, type=["null", "string"], title="Reason", description="Kept with the run."
        ),
        "force": Param(
            False,
            type="boolean",
            title="Force",
            description="Compute every stage, though its inputs were seen before.",
        ),
    }


def asset(path: str) -> Asset:
    """An output of the graph as Airflow's page shows it."""
    return Asset(name=path, uri=f"headrace://{path}", group="headrace")


def begin() -> BaseOperator:
    """The first task: commit, clock, overrides."""
    return _task(
        "begin",
        lambda context: ["begin", "--run", run_id(context), "--spec", json.dumps(_spec(context))],
    )


def stages(
    after: BaseOperator,
    only: tuple[str, ...] | None = None,
    instead: Mapping[str, BaseOperator] | None = None,
) -> dict[str, BaseOperator]:
    """A task for each stage (or those of `only`), each after its parents.

    `instead` names the tasks that give what a stage left out would have given.
    """
    graph = manifest()["stages"]
    tasks: dict[str, BaseOperator] = dict(instead or {})
    for given in tasks.values():
        after >> given
    for name, node in graph.items():
        if only is not None and name not in only:
            continue
        tasks[name] = _task(
            name,
            functools.partial(_arguments, "stage", name),
            inlets=[asset(path) for path in node["inputs"]],
            outlets=[asset(path) for path in node["outs"] if path not in node["metrics"]],
        )
        parents = [tasks[parent] for parent in node["parents"]] or [after]
        parents >> tasks[name]
    return {name: one for name, one in tasks.items() if name not in (instead or {})}


def unite(tasks: dict[str, BaseOperator]) -> BaseOperator:
    """The lock of all stages in one. It runs whatever became of them, and is red unless each of
    them published what it made.
    """
    names = list(tasks)

    def arguments(context: Context) -> list[str]:
        _refuse_unless_green(context, [one.task_id for one in tasks.values()])
        return ["unite", "--run", run_id(context), *names]

    united = _task("unite", arguments, trigger_rule=TriggerRule.ALL_DONE)
    [one for one in tasks.values() if not one.downstream_task_ids] >> united
    return united


def _refuse_unless_green(context: Context, tasks: list[str]) -> None:
    """What a stage published before does not outweigh that it failed or was skipped now."""
    run = context["dag_run"]
    found = context["ti"].get_task_states(dag_id=run.dag_id, task_ids=tasks, run_ids=[run.run_id])
    for name, state in found.get(run.run_id, {}).items():
        if state != "success":
            raise AirflowFailException(f"unite: error: {name} is {state}, not success")


def effect(name: str) -> BaseOperator:
    """A task that acts on the world."""
    return _task(name, functools.partial(_arguments, "effect", name))


def release(after: BaseOperator) -> BaseOperator:
    """The task that releases what the gate passed, once a person said so where that is asked."""
    released = effect("release")
    if not manifest()["approval"]:
        after >> released
        return released
    record = "ti.xcom_pull('gate')['record']"
    ask = HITLOperator(
        task_id="ask",
        subject=f"Release {{{{ {record}['model'] }}}} version {{{{ {record}['version'] }}}}?",
        body=f"{{{{ {record}['reason'] }}}}",
        options=["Approve", "Reject"],
    )
    after >> ask >> _task("approval", _decision) >> released
    return released


def _decision(context: Context) -> list[str]:
    """What the person on the page said, for `approval` to write down."""
    pull = context["ti"].xcom_pull
    asked, judged = pull("ask"), pull("gate")["record"]
    who = asked["responded_by_user"]["name"]
    verdict = asked["chosen_options"][0].lower()
    said = [verdict, str(judged["version"]), "--who", who, "--why", "asked on Airflow's page"]
    return ["effect", "approval", "--run", run_id(context), "--with", json.dumps(said)]


def retrain_on_drift(begun: BaseOperator, drift: BaseOperator, lock: BaseOperator) -> BaseOperator:
    """Trigger `retrain` with the verdict's reasons where there is drift; once for each run."""

    @task.short_circuit(task_id="decide")
    def decide(outcome: dict[str, Any], run: dict[str, Any]) -> dict[str, str] | None:
        """What retrain is told; None where all is well."""
        verdict = outcome["metrics"]["reports/drift/verdict.json"]
        reasons = "; ".join(verdict["reasons"])
        print(f"drift: {reasons}" if verdict["drift"] else "all is well")
        # A run without an interval has the clock of params.yaml, and so has its retrain.
        clock = {"as_of": run["overrides"]["as_of"]} if "as_of" in run["overrides"] else {}
        return {"reason": f"watch: {reasons}"} | clock if verdict["drift"] else None

    decided: Any = decide(drift.output, begun.output)  # type: ignore[arg-type]
    retrain = TriggerDagRunOperator(
        task_id="retrain",
        trigger_dag_id="retrain",
        trigger_run_id="watch__{{ run_id }}",
        conf=decided,
        skip_when_already_exists=True,
    )
    lock >> decided >> retrain
    return retrain


def _arguments(verb: str, name: str, context: Context) -> list[str]:
    return [verb, name, "--run", run_id(context)]


def _spec(context: Context) -> dict[str, Any]:
    """What the run overrides. The form has it; a scheduled run's clock is the end of its data."""
    form = context["params"]
    overrides = {key: form[name] for name, key in FORM.items() if form.get(name) is not None}
    if "fit.max_epochs" in overrides:
        overrides["fit.max_epochs"] = int(overrides["fit.max_epochs"])  # the form takes 1.0
    end = context.get("data_interval_end")
    if "as_of" not in form and end is not None:
        overrides["as_of"] = _clock(end)
    return {
        "overrides": overrides,
        "force": bool(form.get("force", False)),
        "reason": form.get("reason") or "",
        "attempt": _attempt(context),
    }


def _attempt(context: Context) -> str:
    """Which beginning of the run this is; the text of a later one sorts after an earlier's."""
    run = context["dag_run"]
    started = run.start_date.astimezone(UTC).isoformat(timespec="microseconds")
    return f"{started} {run.clear_number:04} {context['ti'].try_number:04}"


def _clock(moment: datetime) -> str:
    """A moment as `as_of` says it: the date alone at midnight, in UTC."""
    utc = moment.astimezone(UTC)
    midnight = (utc.hour, utc.minute, utc.second, utc.microsecond) == (0, 0, 0, 0)
    return f"{utc:%Y-%m-%d}" if midnight else utc.isoformat()


def _task(name: str, arguments: Any, **settings: Any) -> BaseOperator:
    """A task under its policy, as the process or the pod that the configuration names."""
    orchestrate = manifest()["orchestrate"]
    tasks = orchestrate["tasks"]
    group = name.partition("@")[0]  # a member of a foreach has its group's policy
    policy = tasks.get(name) or tasks.get(group) or orchestrate["default"]
    settings |= {
        "task_id": name.replace("@", "."),  # graph.task_id, which would import DVC
        "owner": policy["owner"],
        "retries": policy["retries"],
        "retry_delay": timedelta(seconds=policy["retry_delay_seconds"]),
        "retry_exponential_backoff": 2.0,
        "execution_timeout": timedelta(minutes=policy["timeout_minutes"]),
        "pool": policy["pool"],
    }
    if orchestrate["execute"] == "pod":
        image = orchestrate["image"]
        pod: BaseOperator = pod_task(arguments=arguments, policy=policy, image=image, **settings)
        return pod
    return ProcessTask(arguments=arguments, **settings)
