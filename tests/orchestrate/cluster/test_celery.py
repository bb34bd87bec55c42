"""The same DAGs under CeleryExecutor: two workers with folders of their own, no shared disk.

PostgreSQL and Redis are Debian's, S3 is SeaweedFS; all of them start and end with the test.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import seaweed
from orchestrate import servers
from orchestrate.place import (
    GREEN,
    Airflow,
    at_work,
    commit,
    environment,
    free_port,
    git,
    kill_group,
    parsed,
    repository,
)

from pipelines import signing
from pipelines.orchestrate import local
from pipelines.params import Params

pytestmark = [pytest.mark.airflow, servers.needed]
RUN = "celery-1"


class Cluster:
    """Airflow's servers on one checkout, two workers on two others, and the S3 between them."""

    def __init__(self, airflow: Airflow, workers: list[Path], store: seaweed.Seaweed) -> None:
        self.airflow, self.workers, self.store = airflow, workers, store

    def record(self, run: str, name: str) -> dict[str, Any]:
        """What a task published, read from the bucket."""
        key = f"dvc/orchestrate/runs/retrain-{run}/{name}.json"
        body = self.store.client().get_object(Bucket="headrace", Key=key)["Body"]
        return dict(json.loads(body.read()))


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory,
    half_year: Path,
    params: Params,
    databases: dict[str, str],
) -> Iterator[Cluster]:
    base = tmp_path_factory.mktemp("celery")
    with ExitStack() as stack:
        queue = stack.enter_context(servers.redis(base))
        store = stack.enter_context(seaweed.running(base / "seaweed"))
        store.bucket("headrace")
        origin = repository(
            base / "origin",
            half_year,
            tracking={"uri": databases["mlflow"], "artifacts": "s3://headrace/mlflow"},
            orchestrate={"record": "object"},
        )
        (origin / ".dvc" / "config").write_text(
            "[core]\n    analytics = false\n    remote = store\n"
            "['remote \"store\"']\n    url = s3://headrace/dvc\n    verify = true\n"
            f"    endpointurl = {store.endpoint}\n"
        )
        commit(origin, "an S3 remote")
        folders = [base / name for name in ("server", "worker-1", "worker-2")]
        for folder in folders:
            git(base, "clone", "-q", str(origin), str(folder))
        server, *workers = folders
        port = free_port()
        common = _common(port, queue, databases["celery"], server) | store.env
        envs = [_environment(folder, port, common) for folder in folders]
        log = base / "airflow.log"
        stack.enter_context(local.airflow(envs[0], log))
        url = f"http://127.0.0.1:{port}"
        local.ready(f"{url}/api/v2/monitor/health", log)
        for number, env in enumerate(envs[1:], 1):
            worker = ["airflow", "celery", "worker", "-c", "2", "-H", f"worker-{number}"]
            stack.enter_context(local.started(worker, env, base / f"worker-{number}.log"))
        passwords = Path(envs[0]["AIRFLOW_HOME"]) / "passwords.json"
        api = local.Api(url, json.loads(passwords.read_text())[local.USER])
        local.pools(api, params.orchestrate.pools)
        parsed(api)
        yield Cluster(Airflow(server, url, api, envs[0]), workers, store)


def _common(port: int, queue: str, database: str, server: Path) -> dict[str, str]:
    """What servers and workers agree on."""
    secret = local.environment(server, port)["AIRFLOW__API_AUTH__JWT_SECRET"]
    return {
        "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
        local.DATABASE: database,
        "AIRFLOW__CELERY__BROKER_URL": queue,
        "AIRFLOW__CELERY__RESULT_BACKEND": database.replace("postgresql", "db+postgresql", 1),
        "AIRFLOW__API_AUTH__JWT_SECRET": secret,
        # One worker signs a version, the other checks it.
        signing.VARIABLE: str(server / ".state" / "keys" / "signing.pem"),
        # A worker that dies is noticed soon.
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
    }


def _environment(folder: Path, port: int, common: dict[str, str]) -> dict[str, str]:
    own = local.environment(folder, port) | environment(folder)
    return own | common | {"AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(free_port())}


def test_two_workers_without_a_shared_disk_equal_a_plain_repro(
    cluster: Cluster, tmp_path: Path
) -> None:
    airflow = cluster.airflow
    airflow.trigger("retrain", RUN, as_of="2013-05-01", max_epochs=2)
    kill_group(at_work("fit", *cluster.workers))
    assert airflow.wait("retrain", RUN) == GREEN, airflow.tasks("retrain", RUN)
    assert airflow.tasks("retrain", RUN)["fit"]["try_number"] == 2

    worked = [sorted((one / ".state" / "workspaces" / f"retrain-{RUN}").glob("*-1"))
              for one in cluster.workers]  # fmt: skip
    assert all(worked), "both workers had tasks"
    assert not (airflow.home / ".state" / "workspaces").exists()
    assert not (airflow.home / ".dvc" / "cache").exists()

    plain = tmp_path / "plain"
    git(tmp_path, "clone", "-q", str(airflow.home), str(plain))
    text = (plain / "params.yaml").read_text()
    text = text.replace("'2013-06-01'", "'2013-05-01'", 1).replace("max_epochs: 1", "max_epochs: 2")
    (plain / "params.yaml").write_text(text)
    subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "-q"],
        cwd=plain, env=airflow.env | environment(plain), check=True,
    )  # fmt: skip
    assert cluster.record(RUN, "lock")["dvc.lock"] == (plain / "dvc.lock").read_text()


def test_a_damaged_object_in_the_bucket_is_no_green_end_and_is_healed(cluster: Cluster) -> None:
    """The same run again: what the bucket lost is made again, what it holds is not."""
    lost = cluster.record(RUN, "score")["lock"]["outs"][0]["md5"]
    key = f"dvc/files/md5/{lost[:2]}/{lost[2:]}"
    client = cluster.store.client()
    whole = client.get_object(Bucket="headrace", Key=key)["Body"].read()
    client.put_object(Bucket="headrace", Key=key, Body=whole[: len(whole) // 2])
    airflow = cluster.airflow
    airflow.trigger("retrain", "celery-2", as_of="2013-05-01", max_epochs=2)
    assert airflow.wait("retrain", "celery-2") == GREEN, airflow.tasks("retrain", "celery-2")
    assert client.get_object(Bucket="headrace", Key=key)["Body"].read() == whole
    ran = {name: cluster.record("celery-2", name)["ran"] for name in ("fit", "package", "score")}
    assert ran == {"fit": False, "package": False, "score": True}
    assert cluster.record("celery-2", "lock")["dvc.lock"] == cluster.record(RUN, "lock")["dvc.lock"]
