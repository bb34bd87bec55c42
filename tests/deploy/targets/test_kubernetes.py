"""The kubernetes target: it keeps every target's promises against an API server over HTTP, and
what it applies is valid, closed and free of secrets.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from deploy.served import release
from deploy.targets import apiserver, bundles
from deploy.targets.apiserver import Cluster
from deploy.targets.compliance import Compliance, Place

from pipelines import params as parameters
from pipelines import stage
from pipelines.deploy.targets import store as bundles_in
from pipelines.deploy.targets.kubernetes import Kubernetes
from pipelines.errors import UserError
from pipelines.params import Params

# The oldest of pod mode, the one of the test's server, the newest that is described.
VERSIONS = ("1.30", "1.34", "1.37")


@pytest.fixture
def cluster() -> Iterator[tuple[Cluster, str]]:
    with apiserver.running() as made:
        yield made


@pytest.fixture
def target(cluster: tuple[Cluster, str], params: Params, store: str) -> Kubernetes:
    from kubernetes import client

    targets = params.targets.model_copy(update={"store": store})
    api = client.ApiClient(client.Configuration(host=cluster[1]))
    return Kubernetes(params.model_copy(update={"targets": targets}), api)


class TestKubernetes(Compliance):
    @pytest.fixture
    def place(
        self, target: Kubernetes, cluster: tuple[Cluster, str], tmp_path: Path
    ) -> Iterator[Place]:
        made = [_release(tmp_path, version) for version in (1, 2)]
        yield Place(target, *made, cluster[0].ask)
        assert not cluster[0].refused


def _release(folder: Path, version: int) -> Any:
    """A release whose bundle is whole as far as a store looks."""
    made = release(folder, version)
    (made.folder / "word").unlink()
    for name in ("bundle.json", "model.onnx", "reference.parquet"):
        (made.folder / name).write_text(f"version {version}")
    return type(made)("flights", version, stage.digest(made.folder), made.folder)


@pytest.fixture
def both(target: Kubernetes, cluster: tuple[Cluster, str], tmp_path: Path) -> Place:
    place = Place(target, _release(tmp_path, 1), _release(tmp_path, 2), cluster[0].ask)
    place.both_up()
    target.shift(25, shadow=True)
    return place


@pytest.fixture
def objects(both: Place, cluster: tuple[Cluster, str]) -> list[dict[str, Any]]:
    """Everything that was applied, without what the server added."""
    found = []
    for one in cluster[0].objects.values():
        meta = {key: value for key, value in one["metadata"].items() if key != "generation"}
        found.append({k: v for k, v in one.items() if k != "status"} | {"metadata": meta})
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_kubernetes(objects: list[dict[str, Any]], version: str) -> None:
    kinds = {one["kind"] for one in objects}
    assert kinds == {
        "ConfigMap", "Deployment", "HTTPRoute", "HorizontalPodAutoscaler", "NetworkPolicy",
        "PodDisruptionBudget", "Service",
    }  # fmt: skip
    for one in objects:
        if one["kind"] != "HTTPRoute":  # the Gateway API is no part of Kubernetes' own schemas
            kubernetes_validate.validate(one, version, strict=True)


def test_a_route_is_what_the_gateway_api_takes(objects: list[dict[str, Any]]) -> None:
    """Its weights and mirror, by the fields of gateway.networking.k8s.io/v1."""
    (route,) = (one for one in objects if one["kind"] == "HTTPRoute")
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    rule, *pinned = route["spec"]["rules"]
    # Not /metrics.
    assert [one["path"]["value"] for one in rule["matches"]] == ["/predict", "/openapi.json", "/v2"]
    assert rule["backendRefs"] == [
        {"name": "flights-champion", "port": 8080, "weight": 75},
        {"name": "flights-challenger", "port": 8080, "weight": 25},
    ]
    copy = {"backendRef": {"name": "flights-challenger", "port": 8080}}
    assert rule["filters"] == [{"type": "RequestMirror", "requestMirror": copy}]
    assert rule["timeouts"] == {"request": "5s"}
    # Who names a version is answered by it.
    assert [
        (one["matches"][0]["path"], one["backendRefs"][0]["name"], one["timeouts"])
        for one in pinned
    ] == [
        (
            {"type": "Exact", "value": f"/v2/models/flights/versions/{version}/infer"},
            f"flights-{slot}",
            {"request": "5s"},
        )
        for version, slot in ((1, "champion"), (2, "challenger"))
    ]


def test_no_container_may_do_more_than_it_needs(objects: list[dict[str, Any]]) -> None:
    for one in objects:
        if one["kind"] != "Deployment":
            continue
        pod = one["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"] + pod["initContainers"]:
            locked = container["securityContext"]
            assert locked["readOnlyRootFilesystem"] is True
            assert locked["allowPrivilegeEscalation"] is False
            assert locked["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert "env" not in container  # no credential stands in a manifest


def test_a_pod_hears_who_asks_from_outside(objects: list[dict[str, Any]]) -> None:
    for one in objects:
        if one["kind"] == "Deployment":
            said = one["spec"]["template"]["spec"]["containers"][0]["args"]
            assert said[said.index("--host") + 1] == "0.0.0.0"


def test_a_pod_has_the_time_to_drain(params: Params, objects: list[dict[str, Any]]) -> None:
    for one in objects:
        if one["kind"] == "Deployment":
            pod = one["spec"]["template"]["spec"]
            waits = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
            ends = waits + params.serve.drain_seconds + params.serve.read_seconds
            assert ends < pod["terminationGracePeriodSeconds"]


def test_a_pod_is_given_params_that_are_read(
    objects: list[dict[str, Any]], params: Params, tmp_path: Path
) -> None:
    (settings,) = (one for one in objects if one["kind"] == "ConfigMap")
    (tmp_path / "params.yaml").write_text(settings["data"]["params.yaml"])
    read = parameters.load(tmp_path / "params.yaml")
    assert read.serve.max_rows == params.serve.max_rows
    assert read.dataset == params.dataset


def test_a_shadow_gets_a_copy_of_each_request(both: Place) -> None:
    both.target.shift(0, shadow=True)
    assert both.ask is not None
    assert set(both.ask(30)) == {both.champion.digest}
    assert both.target.observe()["challenger"].requests >= 30


def test_no_request_finds_no_pod_while_slots_change(both: Place) -> None:
    """Every kind of change, with callers in between: one field moves at a time."""
    ask, seen = both.ask, set()
    assert ask is not None
    seen |= set(ask(20))
    both.target.switch()
    seen |= set(ask(20))
    both.target.start("champion", both.champion)
    while not both.target.healthy("champion"):
        seen |= set(ask(5))
    seen |= set(ask(5))
    assert seen == {both.champion.digest, both.challenger.digest}


def test_a_switch_killed_after_any_call_is_finished_by_the_next(
    both: Place, cluster: tuple[Cluster, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    original = Kubernetes._send
    for calls in range(1, 30):
        left = [calls]

        def counted(self: Kubernetes, *given: Any, left: list[int] = left, **named: Any) -> Any:
            if not left[0]:
                raise KilledError
            left[0] -= 1
            return original(self, *given, **named)

        monkeypatch.setattr(Kubernetes, "_send", counted)
        try:
            both.target.switch()
        except KilledError:
            assert both.ask is not None
            assert set(both.ask(20)) <= {both.champion.digest, both.challenger.digest}
            continue
        finally:
            monkeypatch.setattr(Kubernetes, "_send", original)
        break
    both.serves(both.challenger)
    names = {one["metadata"]["name"] for one in cluster[0].objects.values()}
    assert not any(name.endswith(("-blue", "-challenger")) for name in names)


def test_a_challenger_needs_a_champion(target: Kubernetes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no champion to start a challenger beside"):
        target.start("challenger", _release(tmp_path, 2))


def test_a_pod_brings_its_bundle_and_takes_no_other(store: str, tmp_path: Path) -> None:
    made = bundles.release(tmp_path, 1)
    bundles_in.put(store, made)
    bundles_in.get(store, made.digest, tmp_path / "held")
    assert stage.digest(tmp_path / "held") == made.digest
    with pytest.raises(UserError, match="Not Found"):
        bundles_in.get(store, "0" * 64, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_manifests_hold_no_secret() -> None:
    from pipelines.deploy.targets.kubernetes import MANIFESTS

    for file in MANIFESTS.glob("*.yaml"):
        text = re.sub(r"\$(\w+|\{\w+\})", "word", file.read_text())
        kinds = [one["kind"] for one in yaml.safe_load_all(text)]
        assert "Secret" not in kinds
