"""How a task runs: as a process beside the worker, or as a pod. The body is the same command.

Airflow imports this when it parses a DAG, so it imports Airflow and the standard library alone.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from airflow.sdk import Asset, BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from pipelines.exchange import plain

Context = Any
Arguments = Callable[[Context], list[str]]
HOME = Path(__file__).resolve().parents[2]
BODY = ["python", "-m", "pipelines.orchestrate.task"]
GRACE = 10  # seconds between SIGTERM and SIGKILL
MISTAKE = 2  # the exit status of a user's mistake: to try again would not mend it


def run_id(context: Context) -> str:
    """The id of a DAG run for the body."""
    return plain(context["dag_run"].dag_id, context["dag_run"].run_id)


def announce(context: Context, outlets: list[Asset], result: dict[str, Any]) -> dict[str, Any]:
    """Put the content hash of every out into its asset's event; return what goes to XCom."""
    outs = {out["path"]: out["md5"] for out in result.get("lock", {}).get("outs", [])}
    for asset in outlets:
        context["outlet_events"][asset].extra = {
            "md5": outs.get(asset.name),
            "run": result.get("run"),
            "computed": result.get("ran", True),
        }
    shown = ("run", "commit", "overrides", "reason", "record", "metrics", "ran", "lock_md5")
    return {"outs": outs} | {key: result[key] for key in shown if key in result}


class ProcessTask(BaseOperator):
    """The body as a process of the worker, its output in the task's log."""

    def __init__(self, *, arguments: Arguments, **settings: Any) -> None:
        super().__init__(**settings)
        self.arguments = arguments
        self.process: subprocess.Popen[str] | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            command = [sys.executable, *BODY[1:], *self.arguments(context), "--result", str(result)]
            self.process = subprocess.Popen(
                command,
                cwd=HOME,
                text=True,
                errors="replace",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that on_kill reaches the stage too
            )
            last = ""
            assert self.process.stdout is not None
            for line in self.process.stdout:
                last = line.strip() or last
                self.log.info("%s", line.rstrip())
            status = self.process.wait()
            if status == MISTAKE:
                raise AirflowFailException(last)
            if status:
                raise AirflowException(last or f"the task ended with status {status}")
            return announce(context, self.outlets, json.loads(result.read_text()))

    def on_kill(self) -> None:
        """End the body and the stage, the kind way first."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
            os.killpg(self.process.pid, signal.SIGKILL)


def exit_status(pod: Any, container: str) -> int | None:
    """The exit status of a pod's container, None where Kubernetes does not know one."""
    ended = (
        one.state.terminated for one in pod.status.container_statuses or [] if one.name == container
    )
    return next((one.exit_code for one in ended if one), None)


def pod_task(*, arguments: Arguments, policy: dict[str, Any], image: str, **settings: Any) -> Any:
    """The body as a pod of `image`, with the cores, memory and GPUs that the policy names."""
    from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
    from kubernetes.client import models

    class PodTask(KubernetesPodOperator):
        """A pod whose exit status 2 is not tried again."""

        def execute(self, context: Context) -> dict[str, Any]:
            said = [*arguments(context), "--result", "/airflow/xcom/return.json"]
            # Kubernetes reads $(NAME) in an argument as a variable of the pod, a secret too.
            self.arguments = [argument.replace("$", "$$") for argument in said]
            return announce(context, self.outlets, super().execute(context))

        def cleanup(self, pod, remote_pod, xcom_result=None, context=None) -> None:  # type: ignore[no-untyped-def]
            try:
                super().cleanup(pod, remote_pod, xcom_result, context)
            except AirflowException as error:
                status = exit_status(remote_pod, self.base_container_name)
                said = (xcom_result or {}).get("error") or f"the pod ended with status {status}"
                kind = AirflowFailException if status == MISTAKE else AirflowException
                raise kind(said) from error

    wanted = {"cpu": f"{policy['cpu']:g}", "memory": f"{policy['memory_gib']:g}Gi"}
    if policy["gpu"]:
        wanted["nvidia.com/gpu"] = str(policy["gpu"])
    return PodTask(
        image=image,
        cmds=BODY,
        name=settings["task_id"],
        do_xcom_push=True,
        startup_timeout_seconds=1200,  # gigabytes to pull, or a GPU node to start
        automount_service_account_token=False,  # the body asks Kubernetes for nothing
        log_pod_spec_on_failure=False,
        container_resources=models.V1ResourceRequirements(
            requests=wanted, limits={key: wanted[key] for key in wanted if key != "cpu"}
        ),
        env_from=[
            models.V1EnvFromSource(
                secret_ref=models.V1SecretEnvSource(name="headrace", optional=True)
            )
        ],
        **settings,
    )
