"""Envoy, the proxy before the replicas: its files, rendered from params.yaml, and what it counts.

in:   infra/envoy/*.yaml, the blocks `traffic` and `serve` of params.yaml
out:  in one folder: bootstrap.yaml, read once; clusters.json, routes.json and one endpoints file
      per cluster, which Envoy watches. Each takes the place of the one before by a rename.

A cluster is one started release. Its name never comes again, so its counters are its own.
"""

import hashlib
import http.client
import json
import string
import subprocess
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines import stage
from pipelines.errors import UserError
from pipelines.params import Serve, Traffic

TEMPLATES = Path(__file__).parent.parent.parent / "infra" / "envoy"
TYPES = "type.googleapis.com/envoy.config"
# What is for callers. The rest of a replica, such as /metrics, is for who runs it, at its own port.
ASKED = r"/predict|/v2/models/[^/]+(/versions/[^/]+)?/infer"
PINNED = r"/v2/models/[^/]+/versions/{}/infer"
TOLD = r"/openapi\.json|/v2(/.*)?"
# A cluster counts predictions alone: the champion tells of itself through another, to the same
# replicas.
TELLING = "-telling"


@dataclass(frozen=True)
class Way:
    """A share of the requests: the cluster that answers, and the one that gets a copy. Those that
    name its version are no part of it: they go there, all of them, and only there.
    """

    percent: int
    cluster: str
    copy: str | None = None
    version: int | None = None


@dataclass(frozen=True)
class Counted:
    """What callers met at a cluster: requests that ended in a status of 5xx, and the cumulative
    histogram of seconds of all.
    """

    broken: int
    latency: dict[float, int]


def prepare(folder: Path, traffic: Traffic, serve: Serve) -> Path:
    """Write the bootstrap, and routes and clusters of nothing where there are none yet."""
    folder.mkdir(parents=True, exist_ok=True)
    bootstrap = folder / "bootstrap.yaml"
    with stage.whole(bootstrap) as partial:
        values = serve.model_dump() | {
            "folder": folder.resolve(),
            "connections": _allowed(traffic, serve),
        }
        partial.write_text(yaml.safe_dump(_render("bootstrap", traffic, **values)))
    clusters(folder, traffic, [])
    routes(folder, traffic, [])
    return bootstrap


def _allowed(traffic: Traffic, serve: Serve) -> int:
    """So many callers may be connected that files are left for connections to replicas: without
    one, Envoy answers nobody. Its limit of open files is this process'.
    """
    from pipelines.deploy.serve.connection import allow

    asking = 2 * traffic.max_requests
    files = allow(serve.max_connections + asking)
    return min(serve.max_connections, max(files - asking, files // 2))


def clusters(folder: Path, traffic: Traffic, names: list[str]) -> str:
    """Write the clusters. Returns the version that Envoy reports once it has them."""
    place = folder.resolve()
    made = [
        _render("cluster", traffic, name=name + part, service=name, folder=place)
        for name in names
        for part in ("", TELLING)
    ]
    return _publish(folder / "clusters.json", made)


def endpoints(folder: Path, name: str, ports: list[int]) -> str:
    """Write the ports of a cluster's replicas."""
    found = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}}
        for port in ports
    ]
    assignment = {
        "@type": f"{TYPES}.endpoint.v3.ClusterLoadAssignment",
        "cluster_name": name,
        "endpoints": [{"lb_endpoints": found}],
    }
    return _publish(folder / f"endpoints-{name}.json", [assignment])


def routes(folder: Path, traffic: Traffic, ways: list[Way]) -> str:
    """Write the ways, whose percents sum to 100, the champion's last. Returns the version, as
    `clusters` does.
    """
    whole = 1_000_000
    # Of a challenger without a share callers see nothing; the champion answers whoever names it.
    made = [
        _render("route", traffic, name=way.cluster, share=whole, paths=PINNED.format(way.version))
        for way in ways
        if way.version is not None and (way.percent or way is ways[-1])
    ]
    left = 100
    for way in ways:
        # Each route sees what those before it left.
        share = round(whole * way.percent / left) if left else 0
        left -= way.percent
        route = _render("route", traffic, name=way.cluster, share=share, paths=ASKED)
        if way.copy is not None:
            route["route"]["request_mirror_policies"] = [{"cluster": way.copy}]
        made.append(route)
    if ways:
        champion = ways[-1].cluster + TELLING
        made.append(_render("route", traffic, name=champion, share=whole, paths=TOLD))
    # Until there is a way no path is a wrong one.
    rest = {"match": {"prefix": "/"}, "direct_response": {"status": 404 if ways else 503}}
    host = {"name": "all", "domains": ["*"], "routes": [*made, rest]}
    table = {"@type": f"{TYPES}.route.v3.RouteConfiguration", "name": "traffic"}
    return _publish(folder / "routes.json", [table | {"virtual_hosts": [host]}])


def _render(template: str, traffic: Traffic, **values: Any) -> dict[str, Any]:
    ejection = {f"ejection_{key}": value for key, value in traffic.ejection.model_dump().items()}
    text = (TEMPLATES / f"{template}.yaml").read_text(encoding="utf-8")
    filled = string.Template(text).substitute(traffic.model_dump() | ejection | values)
    return dict(yaml.safe_load(filled))


def _publish(path: Path, resources: list[dict[str, Any]]) -> str:
    """Replace what Envoy watches, if it changed. The version is the content's."""
    version = hashlib.sha256(json.dumps(resources, sort_keys=True).encode()).hexdigest()[:16]
    value = {"version_info": version, "resources": resources}
    try:
        same = stage.read_json(path) == value
    except UserError:  # not there, or damaged
        same = False
    if not same:
        stage.write_json(path, value)
    return version


class Admin:
    """A running Envoy's own figures. Nothing can be read (OSError) from one that is not up."""

    def __init__(self, traffic: Traffic) -> None:
        self.url = f"http://127.0.0.1:{traffic.admin_port}"

    def applied(self, kind: str) -> str:
        """The version in force of `cds` or `rds`."""
        found = self._get(f"/stats?format=json&type=TextReadouts&filter={kind}.*version_text")
        return next((str(one["value"]) for one in found["stats"] if "value" in one), "")

    def healthy(self) -> dict[str, set[int]]:
        """The ports that Envoy would send a request to, by cluster."""
        found = self._get("/clusters?format=json")
        return {
            cluster["name"]: {
                host["address"]["socket_address"]["port_value"]
                for host in cluster.get("host_statuses", [])
                if host["health_status"] == {"eds_health_status": "HEALTHY"}
            }
            for cluster in found.get("cluster_statuses", [])
            if not cluster["name"].endswith(TELLING)  # to the same replicas
        }

    def counted(self, cluster: str) -> Counted:
        counters = "upstream_rq_(5xx|time)$"
        found = self._get(
            f"/stats?format=json&histogram_buckets=cumulative&filter=^cluster.{cluster}.{counters}"
        )
        broken = sum(one["value"] for one in found["stats"] if "name" in one)
        histograms: list[dict[str, Any]] = next(
            (one["histograms"] for one in found["stats"] if "histograms" in one), []
        )
        latency = {
            bucket["upper_bound"] / 1000: bucket["cumulative"]
            for histogram in histograms
            for bucket in histogram["buckets"]
        }
        return Counted(broken, latency)

    def _get(self, path: str) -> dict[str, Any]:
        return dict(json.loads(page(self.url + urllib.parse.quote(path, safe="/?&=."))))


def page(url: str) -> bytes:
    """What a process of ours tells there. Raises OSError where it does not tell all of it."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bytes(answer.read())
    except http.client.HTTPException as error:  # it died in the middle of its answer
        raise OSError(f"{url}: {error!r}") from error


def validate(bootstrap: Path) -> None:
    """Let Envoy itself read the file. Raises UserError with its first complaint."""
    command = ["envoy", "--mode", "validate", "-c", str(bootstrap), "--log-level", "error"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": stage.search_path()}, check=False
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise UserError(f"{bootstrap}: Envoy refuses it: {said[0]}")


def command(bootstrap: Path, log: Path) -> list[str]:
    """Envoy as a process that ends when its standard input does, whoever held the other end."""
    tether = 'exec 3<&0; (cat <&3 >/dev/null; kill $$) 2>/dev/null & exec "$@" 3<&- </dev/null'
    envoy = ["envoy", "-c", str(bootstrap), "--concurrency", "1", "--disable-hot-restart"]
    return ["sh", "-c", tether, "sh", *envoy, "--log-level", "warning", "--log-path", str(log)]
