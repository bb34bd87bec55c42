"""kubernetes: the slots as services over two tracks of pods, blue and green, behind a Gateway.

A slot is the track that its service selects. So the challenger becomes champion by one field of
one object, and no pod moves. Shares and the mirror are an HTTPRoute, the Gateway API's word for
both. Everything is applied by the server (server-side apply), told twice the same. The manifests
are infra/targets/kubernetes/; pods take their bundle from targets.store and check it twice.
"""

import hashlib
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipelines.deploy.targets import Observation, Release, Shadow, Slot, contained, scraped, store
from pipelines.deploy.targets.scraped import Page
from pipelines.errors import UserError
from pipelines.params import Params

MANIFESTS = Path(__file__).parent.parent.parent.parent / "infra" / "targets" / "kubernetes"
OWNER = "headrace"  # who manages the fields, in Kubernetes' words
PATHS = {
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "HTTPRoute": "/apis/gateway.networking.k8s.io/v1/namespaces/{}/httproutes",
    "HorizontalPodAutoscaler": "/apis/autoscaling/v2/namespaces/{}/horizontalpodautoscalers",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "Pod": "/api/v1/namespaces/{}/pods",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{}/poddisruptionbudgets",
    "Service": "/api/v1/namespaces/{}/services",
}
TRACKED = ("HorizontalPodAutoscaler", "PodDisruptionBudget", "Deployment")
OTHER = {"blue": "green", "green": "blue"}
Object = dict[str, Any]


class Kubernetes:
    """The namespace of targets.kubernetes, reached by the kubeconfig or from inside a pod."""

    shadow: Shadow = "paired"

    def __init__(self, params: Params, api: Any) -> None:
        self.params, self.api = params, api
        self.place = params.targets.kubernetes
        self.model = re.sub(r"[^a-z0-9-]+", "-", params.dataset.name.lower()).strip("-")
        # The last page of every pod that was ever seen: its counters end with it, a slot's do not.
        self.pages: dict[str, dict[str, Page]] = {}

    def up(self) -> bool:
        return True

    def start(self, slot: Slot, release: Release) -> None:
        """The champion's pods are replaced one by one; a challenger gets the track that is free."""
        champion = self._track("champion")
        track = champion or "blue"
        if slot == "challenger":
            if champion is None:
                raise UserError("there is no champion to start a challenger beside")
            track = OTHER[champion]
        store.put(self.params.targets.store, release)
        settings = contained.settings(self.params)
        words = {
            "track": track,
            "slot": slot,
            "digest": release.digest,
            "version": release.version,
            "settings": hashlib.sha256(settings.encode()).hexdigest()[:8],
        }
        for manifest in self._manifests("model", words):
            if manifest["kind"] == "ConfigMap":
                manifest["data"] = {"params.yaml": settings}
            self._apply(manifest)
        held = self._get("Deployment", f"{self.model}-{track}")
        for manifest in (*self._manifests("track", words), *self._manifests("slot", words)):
            self._apply(manifest)
        # A new challenger has no share yet; a new champion keeps what it has.
        if held is None or (slot == "challenger" and _started(held) != release.digest):
            self._route(0)

    def healthy(self, slot: Slot) -> bool:
        track = self._track(slot)
        deployment = self._get("Deployment", f"{self.model}-{track}") if track else None
        if deployment is None:
            return False
        status, wanted = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
        counts = [status.get(f"{kind}Replicas", 0) for kind in ("updated", "ready", "available")]
        return bool(
            status.get("observedGeneration") == deployment["metadata"]["generation"]
            and counts == [wanted] * 3
            and status.get("replicas") == wanted >= self.place.replicas[0]
            and self._digests(track) == {_started(deployment)}
        )

    def shift(self, percent: int, shadow: bool = False) -> None:
        if self._track("challenger") is None:
            raise UserError("there is no challenger to shift traffic to; start one first")
        self._route(percent, shadow)

    def switch(self) -> None:
        track = self._track("challenger")
        if track is not None:
            for manifest in self._manifests("slot", {"slot": "champion", "track": track}):
                self._apply(manifest)
        self.roll_back()

    def roll_back(self) -> None:
        """The champion alone, whichever track it is by now; what nothing selects is removed."""
        champion = self._track("champion")
        if champion is None:
            return
        self._route(0, alone=True)
        self._delete("Service", f"{self.model}-challenger")
        for kind in TRACKED:
            self._delete(kind, f"{self.model}-{OTHER[champion]}")

    def serving(self) -> dict[Slot, str]:
        found: dict[Slot, str] = {}
        for slot in ("champion", "challenger"):
            digests = self._digests(self._track(slot))
            if len(digests) == 1:
                found[slot] = digests.pop()
        return found

    def observe(self) -> dict[Slot, Observation]:
        """From the pods' own pages, through the API server."""
        seen: dict[Slot, Observation] = {}
        for slot in ("champion", "challenger"):
            track = self._track(slot)
            pods = [pod for pod in self._pods(track) if _ready(pod)]
            digests = {_digest(pod) for pod in pods}
            if len(digests) != 1:
                continue
            pages = self.pages.setdefault(f"{track} {digests.pop()}", {})
            alive = {pod["metadata"]["uid"]: self._page(pod) for pod in pods}
            pages |= alive
            restarts = sum(
                one["restartCount"]
                for pod in self._pods(track)
                for one in pod["status"].get("containerStatuses", [])
            )
            seen[slot] = scraped.observation(pages.values(), alive.values(), restarts)
        return seen

    def _page(self, pod: Object) -> Page:
        path = f"{self._path('Pod')}/{pod['metadata']['name']}:8080/proxy/metrics"
        return scraped.page(self._send("GET", path).decode())

    def _track(self, slot: str) -> str | None:
        """The track that the slot's service selects."""
        service = self._get("Service", f"{self.model}-{slot}")
        return service["spec"]["selector"]["headrace/track"] if service else None

    def _pods(self, track: str | None) -> list[Object]:
        if track is None:
            return []
        labels = f"headrace/model={self.model},headrace/track={track}"
        found = self._call("GET", self._path("Pod"), query=[("labelSelector", labels)])
        return [pod for pod in found["items"] if "deletionTimestamp" not in pod["metadata"]]

    def _digests(self, track: str | None) -> set[str]:
        return {_digest(pod) for pod in self._pods(track) if _ready(pod)}

    def _route(self, percent: int, shadow: bool = False, alone: bool = False) -> None:
        (route,) = self._manifests("route", {})
        rule = route["spec"]["rules"][0]
        rule["backendRefs"] = [self._backend("champion") | {"weight": 100 - percent}]
        if not alone and self._track("challenger") is not None:
            rule["backendRefs"].append(self._backend("challenger") | {"weight": percent})
            if shadow:
                mirror = {"backendRef": self._backend("challenger")}
                rule["filters"] = [{"type": "RequestMirror", "requestMirror": mirror}]
        # A version that is named has no share; a challenger without one is seen by nobody.
        for slot in ("champion", "challenger") if percent else ("champion",):
            model, version = self.params.dataset.name, self._version(slot)
            path = {"type": "Exact", "value": f"/v2/models/{model}/versions/{version}/infer"}
            pinned = {"matches": [{"path": path}], "backendRefs": [self._backend(slot)]}
            route["spec"]["rules"].append(pinned | {"timeouts": rule["timeouts"]})
        self._apply(route)

    def _version(self, slot: str) -> str:
        held = self._get("Deployment", f"{self.model}-{self._track(slot)}")
        annotations = held["spec"]["template"]["metadata"]["annotations"] if held else {}
        return str(annotations.get("headrace/version", ""))

    def _backend(self, slot: str) -> Object:
        return {"name": f"{self.model}-{slot}", "port": 8080}

    def _manifests(self, name: str, words: dict[str, Any]) -> Iterator[Object]:
        text = (MANIFESTS / f"{name}.yaml").read_text(encoding="utf-8")
        least, most = self.place.replicas
        rendered = string.Template(text).substitute(
            words,
            model=self.model,
            image=self.place.image,
            gateway=self.place.gateway,
            store=self.params.targets.store,
            timeout=self.params.traffic.timeout_seconds,
            least=least,
            most=most,
        )
        yield from yaml.safe_load_all(rendered)

    def _path(self, kind: str) -> str:
        return PATHS[kind].format(self.place.namespace)

    def _apply(self, manifest: Object) -> None:
        path = f"{self._path(manifest['kind'])}/{manifest['metadata']['name']}"
        query = [("fieldManager", OWNER), ("force", "true")]
        self._call("PATCH", path, query=query, body=manifest)

    def _get(self, kind: str, name: str) -> Object | None:
        return self._if_there("GET", kind, name)

    def _delete(self, kind: str, name: str) -> None:
        self._if_there("DELETE", kind, name)

    def _if_there(self, verb: str, kind: str, name: str) -> Object | None:
        from kubernetes.client import ApiException

        try:
            return self._call(verb, f"{self._path(kind)}/{name}")
        except ApiException as error:
            if error.status != 404:
                raise
            return None

    def _call(
        self,
        verb: str,
        path: str,
        query: list[tuple[str, str]] | None = None,
        body: Object | None = None,
    ) -> Object:
        return dict(json.loads(self._send(verb, path, query, body)))

    def _send(
        self,
        verb: str,
        path: str,
        query: list[tuple[str, str]] | None = None,
        body: Object | None = None,
    ) -> bytes:
        """The client's own classes know no Gateway and no apply: it lends its connection."""
        kind = "application/apply-patch+yaml" if verb == "PATCH" else "application/json"
        answer = self.api.call_api(
            path,
            verb,
            query_params=query or [],
            header_params={"Accept": "*/*", "Content-Type": kind},
            body=body,
            auth_settings=["BearerToken"],
            _return_http_data_only=True,
            _preload_content=False,
            _request_timeout=30,
        )
        return bytes(answer.data)


def target(params: Params) -> Kubernetes:
    """The target of the current kubeconfig context, or of the pod this runs in."""
    from kubernetes import client, config

    config.load_config()
    return Kubernetes(params, client.ApiClient())


def _started(deployment: Object) -> str:
    return _digest(deployment["spec"]["template"])


def _digest(pod: Object) -> str:
    return str(pod["metadata"].get("annotations", {}).get("headrace/bundle", ""))


def _ready(pod: Object) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
