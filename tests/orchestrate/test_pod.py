"""Pod mode: what Kubernetes is asked for is valid and as params.yaml says; the body needs nothing
but its image, its environment and the bucket; a mistake of the user is not tried again.

Airflow lives in a process of its own: this module is imported there, and its `show_…` functions
print JSON.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
from kubernetes.utils import parse_quantity
from orchestrate.place import commit, git, repository
from seaweed import Seaweed
from world import ROOT

from pipelines import params as parameters

AS_OF = "2013-04-01"
IMAGE = "registry.example/headrace/pipeline:1.2.3"
RUN = "retrain-manual__1"
RESULT = "/airflow/xcom/return.json"  # where Airflow's sidecar reads what a pod leaves
# The oldest that Airflow's chart installs on, the newest that is described, and one between.
KUBERNETES = ("1.30", "1.34", "1.37")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, weed: Seaweed, source: Path) -> Path:
    """A repository in pod mode, its raw data, its DVC remote and its exchange in one bucket."""
    client = weed.bucket("headrace")
    for file in source.rglob("*.csv"):
        key = f"source/{file.relative_to(source).as_posix()}"
        client.put_object(Bucket="headrace", Key=key, Body=file.read_bytes())
    made = repository(
        tmp_path_factory.mktemp("pod") / "home",
        source,
        fetch={"source": "s3://headrace/source"},
        orchestrate={
            "execute": "pod",
            "image": IMAGE,
            "record": "object",
            "tasks": {"evaluate": {"gpu": 1}},
        },
    )
    (made / ".dvc" / "config").write_text(
        "[core]\n    analytics = false\n    remote = bucket\n"
        "['remote \"bucket\"']\n    url = s3://headrace/dvc\n"
        f"    endpointurl = {weed.endpoint}\n"
    )
    commit(made, "in pods")
    return made


@pytest.fixture(scope="module")
def pods(home: Path) -> dict[str, Any]:
    """The pod of each task of retrain, as Airflow would send it to Kubernetes."""
    return told(home, "pods")


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_pod_is_valid_kubernetes(pods: dict[str, Any], version: str) -> None:
    assert {"begin", "fetch", "fit", "unite", "register", "gate"} <= set(pods)
    for pod in pods.values():
        kubernetes_validate.validate(pod, version, strict=True)


def test_a_pod_has_the_image_and_the_resources_of_its_policy(
    home: Path, pods: dict[str, Any]
) -> None:
    policy = parameters.load(home / "params.yaml").orchestrate.tasks["fit"]
    body = container(pods["fit"])
    assert body["image"] == IMAGE
    requests, limits = (amounts(body["resources"][kind]) for kind in ("requests", "limits"))
    assert requests == {"cpu": policy.cpu, "memory": policy.memory_gib * 2**30}
    # Memory beyond what was asked for is somebody else's; idle cores may be used.
    assert limits == {"memory": requests["memory"]}


def test_a_pod_asks_for_the_gpus_of_its_policy(pods: dict[str, Any]) -> None:
    for asked in container(pods["evaluate"])["resources"].values():
        assert asked["nvidia.com/gpu"] == "1"  # Kubernetes wants request and limit to be the same


def test_a_pod_runs_the_body_with_the_credentials_of_the_secret(pods: dict[str, Any]) -> None:
    body = container(pods["fit"])
    assert body["command"] == ["python", "-m", "pipelines.orchestrate.task"]
    assert body["args"] == ["stage", "fit", "--run", RUN, "--result", RESULT]
    assert body["envFrom"] == [{"secretRef": {"name": "headrace", "optional": True}}]
    assert not body.get("env")  # no credential stands in the pod itself


def test_a_pod_takes_what_the_form_says_for_text(pods: dict[str, Any]) -> None:
    """Kubernetes would put a variable of the pod in the place of $(NAME)."""
    (spec,) = (word for word in container(pods["begin"])["args"] if "reason" in word)
    assert '"reason": "$$(A_SECRET)"' in spec


def test_the_body_needs_no_disk_but_its_own(
    home: Path, pods: dict[str, Any], weed: Seaweed, tmp_path: Path
) -> None:
    """Each pod is a fresh clone that is gone before the next one starts."""
    begun = run(pods["begin"], home, weed, tmp_path)
    assert begun.result["commit"] == git(home, "rev-parse", "HEAD")
    assert begun.result["overrides"] == {"as_of": AS_OF}  # through the form, Airflow and the pod
    fetched = run(pods["fetch"], home, weed, tmp_path)
    loaded = run(pods["load"], home, weed, tmp_path)
    assert fetched.result["ran"]
    assert loaded.result["ran"]
    assert {out["path"] for out in loaded.result["lock"]["outs"]} == {"data/events"}
    published = weed.keys("headrace", f"dvc/orchestrate/runs/{RUN}/")
    assert [Path(key).stem for key in published] == ["fetch", "load", "run"]
    # Another attempt, in yet another pod, finds what the first one made.
    assert "nothing to compute" in run(pods["fetch"], home, weed, tmp_path).log


def test_a_mistake_of_the_user_ends_a_pod_with_2(
    home: Path, pods: dict[str, Any], weed: Seaweed, tmp_path: Path
) -> None:
    pod = json.loads(json.dumps(pods["fit"]).replace(RUN, "never-begun"))
    ended = run(pod, home, weed, tmp_path)
    assert ended.status == 2
    assert "run published nothing in the run never-begun" in ended.result["error"]


def test_only_a_mistake_of_the_user_is_never_tried_again(home: Path) -> None:
    ends = told(home, "ends")
    assert ends["done"] == []
    assert ends["mistake"] == ["AirflowFailException", "fetch: error: no such month"]
    assert ends["silent"] == ["AirflowFailException", "the pod ended with status 2"]
    assert ends["fault"][0] == ends["killed"][0] == "AirflowException"


# How a pod runs on this machine.


@dataclass(frozen=True)
class Ended:
    """How a pod ended: its exit status and what it left for Airflow."""

    status: int
    result: dict[str, Any]
    log: str = field(repr=False)


def container(pod: dict[str, Any]) -> dict[str, Any]:
    """The body's container."""
    return dict(next(one for one in pod["spec"]["containers"] if one["name"] == "base"))


def amounts(quantities: dict[str, str]) -> dict[str, Decimal]:
    """Kubernetes' quantities as numbers: 8Gi, 8.0Gi and 8192Mi are the same."""
    return {name: parse_quantity(amount) for name, amount in quantities.items()}


def run(pod: dict[str, Any], home: Path, weed: Seaweed, folder: Path) -> Ended:
    """The pod's command in a clone of its own, as in the image, and in no environment but the
    image's and the secret's.
    """
    body = container(pod)
    with image(home, folder / "image") as checkout:
        result = checkout.parent / "return.json"
        command = [*body["command"], *(str(result) if a == RESULT else a for a in body["args"])]
        done = subprocess.run(
            command,
            cwd=checkout,
            env=weed.env
            | {"PATH": f"{Path(sys.executable).parent}:{os.defpath}", "HOME": str(checkout.parent)},
            capture_output=True,
            text=True,
        )
        log = done.stdout + done.stderr
        assert result.is_file(), log
        return Ended(done.returncode, json.loads(result.read_text()), log)


@contextmanager
def image(home: Path, folder: Path) -> Iterator[Path]:
    """What infra/images/pipeline.Dockerfile puts into the image: a clone without an origin."""
    folder.mkdir()
    checkout = folder / "checkout"
    git(folder, "clone", "--quiet", home.as_uri(), str(checkout))
    git(checkout, "remote", "remove", "origin")
    try:
        yield checkout
    finally:
        shutil.rmtree(folder)


# What runs beside Airflow.


def told(home: Path, what: str) -> dict[str, Any]:
    """What `show_<what>` prints in a process with Airflow and the repository's code."""
    state = home.parent / "airflow"
    state.mkdir(exist_ok=True)
    kubeconfig = state / "kubeconfig"
    kubeconfig.write_text(json.dumps(KUBECONFIG))
    done = subprocess.run(
        [sys.executable, "-c", f"from orchestrate import test_pod; test_pod.show_{what}()"],
        cwd=home,
        env=os.environ
        | {
            "PYTHONPATH": f"{home}{os.pathsep}{ROOT / 'tests'}",
            "AIRFLOW_HOME": str(state),
            "AIRFLOW_CONFIG": str(home / "infra" / "airflow" / "airflow.cfg"),
            "AIRFLOW_CONN_KUBERNETES_DEFAULT": "kubernetes://",
            "KUBECONFIG": str(kubeconfig),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


# A cluster that nobody asks anything.
KUBECONFIG = {
    "apiVersion": "v1",
    "kind": "Config",
    "current-context": "none",
    "clusters": [{"name": "none", "cluster": {"server": "http://127.0.0.1:9"}}],
    "contexts": [{"name": "none", "context": {"cluster": "none", "user": "none"}}],
    "users": [{"name": "none", "user": {}}],
}


def show_pods() -> None:
    """The pods of retrain by task id."""
    from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
    from kubernetes.client import ApiClient

    asked: dict[str, Any] = {}

    def execute_sync(task: Any, context: dict[str, Any]) -> dict[str, Any]:
        pod = task.build_pod_request_obj(context)
        asked[task.task_id] = ApiClient().sanitize_for_serialization(pod)
        return {}

    KubernetesPodOperator.execute_sync = execute_sync  # nothing is sent anywhere
    for task in _retrain().tasks:
        context = _context(task)
        task.render_template_fields(context)
        task.execute(context)
    print(json.dumps(asked))


def show_ends() -> None:
    """What each end of a pod raises in Airflow."""
    mistake = {"status": 2, "error": "fetch: error: no such month"}
    fault = {"status": 1, "error": "fetch: fault: the bucket is away"}
    ends = {
        "done": (0, {"run": RUN}),
        "mistake": (2, mistake),
        "fault": (1, fault),
        "silent": (2, None),
        "killed": (137, None),
    }
    task = _retrain().get_task("fetch")
    print(json.dumps({name: _raised(task, *end) for name, end in ends.items()}))


def _raised(task: Any, exit_code: int, result: dict[str, Any] | None) -> list[str]:
    from unittest.mock import Mock

    pod = _ended(exit_code)
    # The two ways to the cluster.
    task.__dict__ |= {"client": Mock(), "pod_manager": Mock(**{"read_pod.return_value": pod})}
    try:
        task.cleanup(pod, pod, result, _context(task))
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def _ended(exit_code: int) -> Any:
    """A pod as Kubernetes shows it when its body is over and Airflow has stopped the sidecar."""
    from kubernetes.client import models

    reason = "Completed" if exit_code == 0 else "Error"
    over = models.V1ContainerStateTerminated(exit_code=exit_code, reason=reason)
    body = models.V1ContainerStatus(
        name="base",
        image=IMAGE,
        image_id=IMAGE,
        ready=False,
        restart_count=0,
        state=models.V1ContainerState(terminated=over),
    )
    return models.V1Pod(
        metadata=models.V1ObjectMeta(name="fetch-1", namespace="headrace"),
        spec=models.V1PodSpec(containers=[models.V1Container(name="base", image=IMAGE)]),
        status=models.V1PodStatus(
            phase="Failed" if exit_code else "Succeeded", container_statuses=[body]
        ),
    )


def _retrain() -> Any:
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag("dags")
    assert not bag.import_errors, bag.import_errors
    return bag.dags["retrain"]


def _context(task: Any) -> dict[str, Any]:
    """What a task reads of its run."""
    attempt = SimpleNamespace(
        dag_id="retrain",
        task_id=task.task_id,
        map_index=-1,
        try_number=1,
        get_task_states=lambda **_: {},
        xcom_push=lambda *_, **__: None,
    )
    events = {asset: SimpleNamespace(extra=None) for asset in task.outlets}
    return {
        "dag": task.dag,
        "dag_run": SimpleNamespace(
            dag_id="retrain",
            run_id="manual__1",
            start_date=datetime(2026, 1, 1, tzinfo=UTC),
            clear_number=0,
        ),
        "outlet_events": events,
        "params": {"as_of": AS_OF, "max_epochs": None, "reason": "$(A_SECRET)", "force": False},
        "run_id": "manual__1",
        "ti": attempt,
    }
