"""lambda: the slots as versions of one function, and the alias `live` that callers ask.

    champion, challenger    aliases: which version a slot is; when it began stands beside it
    live                    an alias: the champion's version, and the challenger's with its share

A release is the package of infra/targets/lambda/handler.py with the bundle, published as a version,
which nothing can change. Nobody mirrors the calls of a function: the first share must be a share.
"""

import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any

from pipelines import bundle
from pipelines.deploy.targets import Observation, Release, Shadow, Slot, answered
from pipelines.errors import UserError
from pipelines.params import Params

HANDLER = Path(__file__).parent.parent.parent.parent / "infra" / "targets" / "lambda" / "handler.py"
RUNTIME = "python3.13"
SLOTS: tuple[Slot, ...] = ("champion", "challenger")
LIVE = "live"
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file in a package: the same bundle is the same package


class Lambda:
    """The function of one model."""

    shadow: Shadow = "none"

    def __init__(self, params: Params) -> None:
        import boto3

        self.place = params.targets.lambda_
        self.name = f"headrace-{params.dataset.name}"
        self.client = boto3.client("lambda")
        self.log = answered.Log(boto3.client("logs"), f"/aws/lambda/{self.name}")

    def up(self) -> bool:
        return True

    def start(self, slot: Slot, release: Release) -> None:
        if slot == "challenger" and self._alias(LIVE) is None:
            raise UserError("there is no champion to start a challenger beside")
        held = self._alias(slot)
        version = self._published(release)
        if held is None or held["FunctionVersion"] != version:
            self._point(slot, version, description=str(int(time.time() * 1000)))
            if slot == "champion":
                self._point(LIVE, version, self._routing())
            else:
                self._route({})

    def healthy(self, slot: Slot) -> bool:
        """Whether the version is there and one of its processes says that it has the bundle."""
        held = self._alias(slot)
        if held is None:
            return False
        version = held["FunctionVersion"]
        found = self.client.get_function_configuration(FunctionName=self.name, Qualifier=version)
        if found.get("State", "Active") != "Active":
            return False
        answer = self.client.invoke(
            FunctionName=f"{self.name}:{version}", Payload=b'{"ready": true}'
        )
        said = json.loads(answer["Payload"].read())
        return isinstance(said, dict) and said.get("bundle") == self._digest(version)

    def shift(self, percent: int, shadow: bool = False) -> None:
        if shadow and not percent:
            raise UserError("lambda: nothing mirrors the calls of a function; start with a share")
        challenger = self._alias("challenger")
        if challenger is None:
            raise UserError("there is no challenger to shift traffic to; start one first")
        self._route({challenger["FunctionVersion"]: percent / 100} if percent else {})

    def switch(self) -> None:
        challenger = self._alias("challenger")
        if challenger is not None:
            self._point(LIVE, challenger["FunctionVersion"], {})
            self._point("champion", challenger["FunctionVersion"], None, challenger["Description"])
            self.client.delete_alias(FunctionName=self.name, Name="challenger")

    def roll_back(self) -> None:
        if self._alias("challenger") is not None:
            self._route({})
            self.client.delete_alias(FunctionName=self.name, Name="challenger")

    def serving(self) -> dict[Slot, str]:
        held = {slot: self._alias(slot) for slot in SLOTS}
        return {
            slot: self._digest(alias["FunctionVersion"])
            for slot, alias in held.items()
            if alias is not None
        }

    def observe(self) -> dict[Slot, Observation]:
        """From the lines that the handler leaves in the log."""
        seen: dict[Slot, Observation] = {}
        for slot, digest in self.serving().items():
            alias = self._alias(slot)
            assert alias is not None, "a slot that serves has its alias"
            found = answered.observation(self.log.notes(digest, int(alias["Description"])))
            if found is not None:
                seen[slot] = found
        return seen

    def _published(self, release: Release) -> str:
        """The version of the function that is this release; told twice, the same one."""
        name = f"{release.version} {release.digest}"
        code = package(release)
        for found in self._versions():
            if found["Description"] == name:
                return str(found["Version"])
        try:
            self.client.update_function_code(FunctionName=self.name, ZipFile=code)
        except self.client.exceptions.ResourceNotFoundException:
            self.client.create_function(
                FunctionName=self.name,
                Runtime=RUNTIME,
                Role=self.place.role,
                Handler=f"{HANDLER.stem}.handler",
                Code={"ZipFile": code},
                Layers=[self.place.layer],
                MemorySize=self.place.memory_mb,
                Timeout=30,
            )
            self.client.get_waiter("function_active_v2").wait(FunctionName=self.name)
        self.client.get_waiter("function_updated_v2").wait(FunctionName=self.name)
        made = self.client.publish_version(FunctionName=self.name, Description=name)
        return str(made["Version"])

    def _versions(self) -> list[dict[str, Any]]:
        pages = self.client.get_paginator("list_versions_by_function")
        try:
            found = pages.paginate(FunctionName=self.name)
            return [version for page in found for version in page["Versions"]]
        except self.client.exceptions.ResourceNotFoundException:
            return []

    def _digest(self, version: str) -> str:
        found = self.client.get_function_configuration(FunctionName=self.name, Qualifier=version)
        return str(found["Description"].split()[-1])

    def _alias(self, name: str) -> dict[str, Any] | None:
        try:
            return dict(self.client.get_alias(FunctionName=self.name, Name=name))
        except self.client.exceptions.ResourceNotFoundException:
            return None

    def _routing(self) -> dict[str, float]:
        live = self._alias(LIVE) or {}
        return dict((live.get("RoutingConfig") or {}).get("AdditionalVersionWeights", {}))

    def _route(self, weights: dict[str, float]) -> None:
        champion = self._alias("champion")
        assert champion is not None, "a challenger starts beside a champion"
        self._point(LIVE, champion["FunctionVersion"], weights)

    def _point(
        self,
        alias: str,
        version: str,
        weights: dict[str, float] | None = None,
        description: str = "",
    ) -> None:
        asked: dict[str, Any] = {"FunctionName": self.name, "Name": alias}
        asked |= {"FunctionVersion": version, "Description": description}
        if weights is not None:
            asked["RoutingConfig"] = {"AdditionalVersionWeights": weights}
        try:
            self.client.update_alias(**asked)
        except self.client.exceptions.ResourceNotFoundException:
            self.client.create_alias(**asked)


def target(params: Params) -> Lambda:
    """The function in the account and region of the usual AWS chain."""
    return Lambda(params)


def package(release: Release) -> bytes:
    """The function's zip: the handler, the model, its contract and its name."""
    bundle.verify(release.folder, release.digest)
    about = {"model": release.model, "version": release.version, "bundle": release.digest}
    files = {
        HANDLER.name: HANDLER.read_bytes(),
        bundle.MODEL: (release.folder / bundle.MODEL).read_bytes(),
        bundle.CONTRACT: (release.folder / bundle.CONTRACT).read_bytes(),
        "release.json": json.dumps(about).encode(),
    }
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    return made.getvalue()
