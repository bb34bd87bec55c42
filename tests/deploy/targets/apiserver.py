"""A small API server of Kubernetes: it stores, applies, and runs deployments of pods that answer.

It speaks HTTP as the client does, holds every object to the schemas of Kubernetes, and has a
gateway that follows the HTTPRoute.
"""

import copy
import functools
import itertools
import json
import os
import random
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import kubernetes_validate
import numpy as np
import yaml

from pipelines.deploy.serve.metrics import Metrics

Object = dict[str, Any]
VERSION = "1.34"
STARTS = 0.1  # seconds until a pod is ready


@functools.cache
def _validate(body: str) -> None:
    if "gateway.networking.k8s.io" not in body:  # a custom resource has no schema here
        kubernetes_validate.validate(json.loads(body), VERSION, strict=True)


@dataclass
class Pod:
    """One replica: what it was made from, and what it counted."""

    name: str
    template: Object
    born: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.digest = str(self.template["metadata"]["annotations"]["headrace/bundle"])
        self.metrics = Metrics(lambda: (self.digest, 1))

    @property
    def ready(self) -> bool:
        return time.monotonic() - self.born > STARTS

    def shown(self) -> Object:
        ready = {"type": "Ready", "status": str(self.ready)}
        status = {"conditions": [ready], "containerStatuses": [{"restartCount": 0}]}
        meta = self.template["metadata"] | {"name": self.name, "uid": self.name}
        return {"kind": "Pod", "metadata": meta, "status": status}


class Cluster:
    """One namespace."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.pods: dict[str, list[Pod]] = {}
        self.asked: list[tuple[str, str]] = []
        self.refused: list[str] = []
        self.lock = threading.RLock()
        self.numbers = itertools.count()

    def apply(self, path: str, body: Object) -> tuple[int, Object]:
        """Server-side apply by one manager: what it no longer says is gone; others' fields stay."""
        try:
            _validate(json.dumps(body))
        except kubernetes_validate.ValidationError as error:
            self.refused.append(str(error))
            return 422, {"kind": "Status", "message": str(error)}
        held = self.objects.get(path, {"metadata": {"generation": 0}})
        made = copy.deepcopy(body)
        if "replicas" in held.get("spec", {}):
            made["spec"].setdefault("replicas", held["spec"]["replicas"])
        changed = made.get("spec") != held.get("spec")
        made["metadata"]["generation"] = held["metadata"]["generation"] + changed
        self.objects[path] = made
        return 200, made

    def work(self) -> None:
        """What the controllers do: scale, replace pods one by one, report."""
        for path, deployment in self.objects.items():
            if deployment["kind"] != "Deployment":
                continue
            scaler = self.objects.get(path.replace("apps/v1", "autoscaling/v2").replace(
                "deployments", "horizontalpodautoscalers"
            ))  # fmt: skip
            spec = deployment["spec"]
            wanted = scaler["spec"]["minReplicas"] if scaler else 1
            if spec.get("replicas") != wanted:
                spec["replicas"] = wanted
                deployment["metadata"]["generation"] += 1
            pods = self.pods.setdefault(path, [])
            new = [pod for pod in pods if pod.template == spec["template"]]
            old = [pod for pod in pods if pod.template != spec["template"]]
            if len(new) < wanted and all(pod.ready for pod in new):
                name = f"{deployment['metadata']['name']}-{next(self.numbers)}"
                pods.append(Pod(name, copy.deepcopy(spec["template"])))
            if old and len([pod for pod in pods if pod.ready]) > wanted:
                pods.remove(old[0])
            ready = [pod for pod in pods if pod.ready]
            deployment["status"] = {
                "observedGeneration": deployment["metadata"]["generation"],
                "replicas": len(pods),
                "updatedReplicas": len([p for p in pods if p.template == spec["template"]]),
                "readyReplicas": len(ready),
                "availableReplicas": len(ready),
            }
        for path in [path for path in self.pods if path not in self.objects]:
            del self.pods[path]

    def selected(self, labels: Object) -> list[Pod]:
        pods = itertools.chain.from_iterable(self.pods.values())
        return [p for p in pods if labels.items() <= p.template["metadata"]["labels"].items()]

    def find(self, kind: str, name: str) -> Object | None:
        return next(
            (
                one
                for one in self.objects.values()
                if (one["kind"], one["metadata"]["name"]) == (kind, name)
            ),
            None,
        )

    def ask(self, times: int) -> Counter[str]:
        """Requests through the gateway; the bundle that answered, or what kept it."""
        with self.lock:
            return Counter(self._answer() for _ in range(times))

    def _answer(self) -> str:
        self.work()
        (route,) = (one for one in self.objects.values() if one["kind"] == "HTTPRoute")
        rule = route["spec"]["rules"][0]
        backends = rule["backendRefs"]
        (chosen,) = random.choices(backends, [one["weight"] for one in backends])
        for mirror in rule.get("filters", []):
            self._reach(mirror["requestMirror"]["backendRef"])
        return self._reach(chosen)

    def _reach(self, backend: Object) -> str:
        service = self.find("Service", backend["name"])
        if service is None:
            return "no such service"
        pods = [pod for pod in self.selected(service["spec"]["selector"]) if pod.ready]
        if not pods:
            return "no endpoint"
        pod = random.choice(pods)
        pod.metrics.answered("predict", os.urandom(8), 0.002, np.array([0.3], np.float32), False)
        return pod.digest


def _handler(cluster: Cluster) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._do()

        do_PATCH = do_DELETE = do_GET  # noqa: N815

        def _do(self) -> None:
            url = urllib.parse.urlparse(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            with cluster.lock:
                cluster.asked.append((self.command, url.path))
                cluster.work()
                status, answer = self._answered(url.path, query, body)
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _answered(
            self, path: str, query: dict[str, str], body: bytes
        ) -> tuple[int, Object | bytes]:
            if self.command == "PATCH":
                assert self.headers["content-type"] == "application/apply-patch+yaml"
                assert query == {"fieldManager": "headrace", "force": "true"}
                return cluster.apply(path, yaml.safe_load(body))
            if path.endswith("/pods"):
                labels = dict(one.split("=") for one in query["labelSelector"].split(","))
                return 200, {"items": [pod.shown() for pod in cluster.selected(labels)]}
            if path.endswith(":8080/proxy/metrics"):
                name = path.split("/")[-3].partition(":")[0]
                return 200, next(p for p in cluster.selected({}) if p.name == name).metrics.page()
            if path not in cluster.objects:
                return 404, {"kind": "Status", "code": 404}
            if self.command == "DELETE":
                return 200, cluster.objects.pop(path)
            return 200, cluster.objects[path]

    return Handler


@contextmanager
def running() -> Iterator[tuple[Cluster, str]]:
    """A cluster and the URL of its API until the block ends."""
    cluster = Cluster()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(cluster))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield cluster, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
