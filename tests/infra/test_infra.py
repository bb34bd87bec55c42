"""infra: images that a linter finds nothing in; the chart's values say what airflow.cfg,
params.yaml and constraints.txt say, and every setting is one that Airflow knows.
"""

import configparser
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import grimp
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from world import ROOT

from pipelines.orchestrate.task import EFFECTS
from pipelines.params import Params

IMAGES = sorted((ROOT / "infra" / "images").glob("*.Dockerfile"))
AIRFLOW = ROOT / "infra" / "airflow"


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return dict(yaml.safe_load((AIRFLOW / "values.yaml").read_text()))


@pytest.fixture(scope="module")
def cfg() -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(AIRFLOW / "airflow.cfg")
    return {section: dict(parser[section]) for section in parser.sections()}


# Images.


def test_there_is_the_image_of_pod_mode() -> None:
    assert "pipeline.Dockerfile" in [path.name for path in IMAGES]


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_hadolint_finds_nothing_in_an_image(image: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", image], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_needs_no_extras() -> None:
    """Whatever the body of a task imports comes with the core of pyproject.toml."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    bodies = {"pipelines.orchestrate.task"}
    bodies |= {stage["cmd"].split()[-1] for stage in stages.values()}
    bodies |= {effect.module for effect in EFFECTS.values()}
    used = imported(bodies)
    assert {"dvc", "torch", "mlflow"} <= used
    assert used - core() == set()


def imported(modules: set[str]) -> set[str]:
    """The distributions that the modules import, directly or through other modules of ours."""
    graph = grimp.build_graph("pipelines", include_external_packages=True, cache_dir=None)
    tops = {
        name.partition(".")[0]
        for module in modules
        for name in graph.find_upstream_modules(module)
        if not name.startswith("pipelines")
    } - sys.stdlib_module_names
    held = metadata.packages_distributions()
    return {canonicalize_name(one) for top in tops for one in held.get(top, [top])}


def core() -> set[str]:
    """pyproject.toml's dependencies, and all that they need in turn."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    seen: set[str] = set()
    found = names(project["dependencies"])
    while found:
        seen |= found
        found = {need for name in found for need in names(_requires(name))} - seen
    return seen


def names(requirements: list[str]) -> set[str]:
    """The distributions that the lines name for this Python, those of extras left out."""
    needs = map(Requirement, requirements)
    return {
        canonicalize_name(need.name)
        for need in needs
        if need.marker is None or need.marker.evaluate({"extra": ""})
    }


def _requires(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # comes with an extra that is not installed
        return []


# Airflow's settings.


def test_the_chart_has_the_settings_of_airflow_cfg(
    values: dict[str, Any], cfg: dict[str, dict[str, str]]
) -> None:
    assert values["config"] == cfg


def test_airflow_knows_every_setting(
    values: dict[str, Any], cfg: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """A setting that it does not know it would ignore in silence."""
    known = options(tmp_path)
    named = {(section, option) for section, held in cfg.items() for option in held}
    for entry in values["env"]:
        if found := re.fullmatch(r"AIRFLOW__([A-Z_]+)__([A-Z_]+)", entry["name"]):
            named.add((found[1].lower(), found[2].lower()))
    assert not [f"[{section}] {name}" for section, name in sorted(named - known)]


def options(home: Path) -> set[tuple[str, str]]:
    """Every option of the installed Airflow and its providers, by section."""
    asked = (
        "import json; from airflow.configuration import conf;"
        "print(json.dumps({name: list(section['options'])"
        " for name, section in conf.configuration_description.items()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", asked],
        env=os.environ | {"AIRFLOW_HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    described = json.loads(done.stdout.splitlines()[-1])
    return {(section, option) for section, held in described.items() for option in held}


# The chart's values beside the rest of the repository.


def test_the_chart_installs_the_airflow_of_the_constraints(values: dict[str, Any]) -> None:
    pinned = re.search(r"^apache-airflow==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert values["defaultAirflowTag"] == values["airflowVersion"] == pinned[1]


def test_the_dags_are_those_of_the_image_that_the_pods_run(
    values: dict[str, Any], params: Params
) -> None:
    for component in (values["dagProcessor"], values["workers"]["celery"]):
        (dags,) = component["extraInitContainers"]
        assert dags["image"] == params.orchestrate.image


def test_the_chart_makes_the_pools_of_params(values: dict[str, Any], params: Params) -> None:
    told = " ".join(values["migrateDatabaseJob"]["args"])
    made = {name: int(slots) for name, slots in re.findall(r"pools set (\S+) (\d+)", told)}
    assert made == params.orchestrate.pools


def test_what_the_chart_passes_on_is_valid_kubernetes(values: dict[str, Any]) -> None:
    for component in (values["dagProcessor"], values["workers"]["celery"]):
        airflow = {
            "name": "airflow",
            "env": values["env"],
            "envFrom": yaml.safe_load(values["extraEnvFrom"]),
            "resources": component["resources"],
            "volumeMounts": component["extraVolumeMounts"],
        }
        spec = {
            "initContainers": component["extraInitContainers"],
            "containers": [airflow],
            "volumes": component["extraVolumes"],
        }
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": spec}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
