"""The sagemaker target: it keeps every target's promises against moto's server, and the container
speaks SageMaker's contract.

moto knows no UpdateEndpoint and no shadow variants: both are put in here, by the same words. What
is sent is held by boto3 to the shapes of the service.
"""

import copy
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
from botocore.stub import Stubber
from botocore.validate import ParamValidator
from deploy.targets.compliance import Compliance, Place
from moto.core.responses import ActionResult
from moto.sagemaker.models import FakeEndpoint
from moto.sagemaker.responses import SageMakerResponse
from world import ROOT

from pipelines import stage
from pipelines.deploy.replicas import free_port
from pipelines.deploy.targets import Release, answered
from pipelines.deploy.targets.sagemaker import SETTINGS, Sagemaker
from pipelines.errors import UserError
from pipelines.params import Params

UPDATES: list[Any] = []  # the DeploymentConfig of each


def _update_endpoint(self: SageMakerResponse) -> ActionResult:
    """What SageMaker does with it, at once."""
    backend = self.sagemaker_backend
    endpoint = backend.endpoints[self._get_param("EndpointName")]
    config = backend.endpoint_configs[self._get_param("EndpointConfigName")]
    UPDATES.append(self._get_param("DeploymentConfig"))
    _adopt(endpoint, config)
    return ActionResult({"EndpointArn": endpoint.arn})


def _adopt(endpoint: FakeEndpoint, config: Any) -> None:
    endpoint.endpoint_config_name = config.endpoint_config_name
    endpoint.production_variants = endpoint._process_production_variants(config.production_variants)
    shadows = getattr(config, "shadow_production_variants", [])
    endpoint.shadow_production_variants = endpoint._process_production_variants(shadows)


@pytest.fixture
def target(store: str, params: Params, monkeypatch: pytest.MonkeyPatch) -> Sagemaker:
    create = SageMakerResponse.create_endpoint_config

    def create_with_shadow(self: SageMakerResponse) -> ActionResult:
        made = create(self)
        held = self.sagemaker_backend.endpoint_configs[self._get_param("EndpointConfigName")]
        held.shadow_production_variants = self._get_param("ShadowProductionVariants") or []
        return made

    UPDATES.clear()
    monkeypatch.setattr(SageMakerResponse, "create_endpoint_config", create_with_shadow)
    monkeypatch.setattr(SageMakerResponse, "update_endpoint", _update_endpoint, raising=False)
    targets = params.targets.model_copy(update={"store": store})
    return Sagemaker(params.model_copy(update={"targets": targets}))


class TestSagemaker(Compliance):
    @pytest.fixture
    def place(self, target: Sagemaker, releases: list[Release]) -> Place:
        return Place(target, *releases)


@pytest.fixture
def both(target: Sagemaker, releases: list[Release]) -> Sagemaker:
    target.start("champion", releases[0])
    target.start("challenger", releases[1])
    return target


def weights(target: Sagemaker) -> dict[str, float]:
    shown = target.client.describe_endpoint(EndpointName=target.name)["ProductionVariants"]
    return {one["VariantName"]: one.get("CurrentWeight", 0.0) for one in shown}


def test_a_share_is_a_weight_changed_in_place(both: Sagemaker) -> None:
    before = len(UPDATES)
    both.shift(25)
    assert weights(both) == {"champion": 75.0, "challenger": 25.0}
    assert len(UPDATES) == before


def test_a_shadow_is_a_shadow_variant_until_there_is_a_share(both: Sagemaker) -> None:
    both.shift(0, shadow=True)
    shown = both.client.describe_endpoint(EndpointName=both.name)
    assert [one["VariantName"] for one in shown["ProductionVariants"]] == ["champion"]
    assert [one["VariantName"] for one in shown["ShadowProductionVariants"]] == ["challenger"]
    assert both.healthy("challenger")
    both.shift(5, shadow=True)
    assert weights(both) == {"champion": 95.0, "challenger": 5.0}


def test_another_champion_comes_by_a_canary_that_the_alarm_takes_back(both: Sagemaker) -> None:
    both.switch()
    deployment = UPDATES[-1]
    routing = deployment["BlueGreenUpdatePolicy"]["TrafficRoutingConfiguration"]
    assert routing["Type"] == "CANARY"
    (named,) = deployment["AutoRollbackConfiguration"]["Alarms"]
    (alarm,) = boto3.client("cloudwatch").describe_alarms()["MetricAlarms"]
    assert alarm["AlarmName"] == named["AlarmName"]
    assert alarm["MetricName"] == "Invocation5XXErrors"
    assert {one["Name"] for one in alarm["Dimensions"]} == {"EndpointName", "VariantName"}


def test_a_model_takes_its_bundle_from_the_store_and_says_which(
    both: Sagemaker, releases: list[Release]
) -> None:
    name = f"{both.name}-1-{releases[0].digest[:12]}"
    container = both.client.describe_model(ModelName=name)["PrimaryContainer"]
    assert container["Environment"]["HEADRACE_DIGEST"] == releases[0].digest
    held = boto3.client("s3").list_objects_v2(Bucket="headrace")["Contents"]
    assert len([one for one in held if releases[0].digest in one["Key"]]) == 3


def test_what_the_log_says_is_observed(both: Sagemaker, releases: list[Release]) -> None:
    logs, group = boto3.client("logs"), f"/aws/sagemaker/Endpoints/{both.name}"
    logs.create_log_group(logGroupName=group)
    logs.create_log_stream(logGroupName=group, logStreamName="challenger/i-1")
    note = {"bundle": releases[1].digest, "seconds": 0.004, "memory_bytes": 7}
    lines = [
        json.dumps(note | {"predictions": [0.07, 1.0]}),
        json.dumps(note | {"predictions": [None]}),
        "INFO: no note of ours",
        json.dumps(note | {"bundle": "another", "predictions": [0.5]}),
    ]
    now = int(time.time() * 1000) + 1000
    logs.put_log_events(
        logGroupName=group,
        logStreamName="challenger/i-1",
        logEvents=[{"timestamp": now, "message": line} for line in lines],
    )
    seen = both.observe()
    assert set(seen) == {"challenger"}
    found = seen["challenger"]
    assert (found.requests, found.errors, found.memory_bytes) == (3, 1, 7)
    assert (found.predictions[1], found.predictions[19]) == (1, 1)
    assert (found.latency[0.0025], found.latency[0.005]) == (0, 3)
    assert both.observe() == seen  # what was read is not counted twice


def test_a_line_that_is_no_note_is_passed_over() -> None:
    assert answered.notes(['{"bundle": "a"', "{}", "[]", '{"bundle": "a"}'], "a") == []


def test_a_challenger_needs_a_champion(target: Sagemaker, releases: list[Release]) -> None:
    with pytest.raises(UserError, match="no champion to start a challenger beside"):
        target.start("challenger", releases[1])


def test_what_moto_does_not_know_has_the_services_own_shape(both: Sagemaker) -> None:
    """UpdateEndpoint as SageMaker's model describes it, DeploymentConfig and all."""
    service = botocore.session.get_session().get_service_model("sagemaker")
    shape = service.operation_model("UpdateEndpoint").input_shape
    asked = {
        "EndpointName": both.name,
        "EndpointConfigName": "one",
        "DeploymentConfig": both._deployment(),
    }
    assert not ParamValidator().validate(asked, shape).has_errors()
    client = boto3.client("sagemaker")
    with Stubber(client) as stubber:
        arn = "arn:aws:sagemaker:us-east-1:123456789012:endpoint/one"
        stubber.add_response("update_endpoint", {"EndpointArn": arn}, copy.deepcopy(asked))
        client.update_endpoint(**asked)


@pytest.fixture
def container(releases: list[Release], tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The image's command, as SageMaker starts it; its URL and its log."""
    port, log = free_port(), tmp_path / "log"
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HEADRACE_MODEL": str(releases[0].folder),
        "HEADRACE_DIGEST": releases[0].digest,
        "SAGEMAKER_BIND_TO_PORT": str(port),
    }
    with log.open("w") as out:
        command = [sys.executable, SETTINGS / "serve"]
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.DEVNULL
        )
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 30
        while _status(f"{url}/ping") != 200:
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield url, log
        process.terminate()
        process.wait(30)


def _status(url: str, body: bytes | None = None) -> int:
    headers = {"content-type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=5) as found:
            return int(found.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_the_container_speaks_the_contract_and_leaves_a_line(
    container: tuple[str, Path], releases: list[Release]
) -> None:
    url, log = container
    record = json.dumps({"origin": "EWR", "delay": 3.5, "temp": None}).encode()
    assert _status(f"{url}/invocations", record) == 200
    assert _status(f"{url}/invocations", b'{"orign": 1}') == 422
    notes = answered.notes(log.read_text().splitlines(), releases[0].digest)
    assert len(notes) == 1
    assert 0 < notes[0]["predictions"][0] < 1
    found = answered.observation(notes)
    assert found is not None
    assert found.errors == 0
    assert stage.digest(releases[0].folder) == releases[0].digest
