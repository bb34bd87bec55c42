"""sagemaker: the slots as variants of one endpoint.

A share is a weight of a variant, changed in place. Another champion is a blue/green update with a
canary, which SageMaker itself takes back where the alarm rings (infra/targets/sagemaker/). A
mirror is a shadow variant, which an endpoint may have only beside one other: so with a share
above none the share itself is the evidence, and nothing is copied.

A model of SageMaker is a release in a slot: its name says which, its creation when it began.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pipelines.deploy.targets import Observation, Release, Shadow, Slot, answered, store
from pipelines.errors import UserError
from pipelines.params import Params

SETTINGS = Path(__file__).parent.parent.parent.parent / "infra" / "targets" / "sagemaker"
Variants = dict[Slot, dict[str, Any]]


class Sagemaker:
    """The endpoint of one model."""

    # Captures stay inside the containers, which have no network.
    shadow: Shadow = "copied"

    def __init__(self, params: Params) -> None:
        import boto3

        self.params, self.place = params, params.targets.sagemaker
        model = re.sub(r"[^A-Za-z0-9]+", "-", params.dataset.name).strip("-")
        self.name = f"headrace-{model}"
        self.client = boto3.client("sagemaker")
        self.alarms = boto3.client("cloudwatch")
        self.log = answered.Log(boto3.client("logs"), f"/aws/sagemaker/Endpoints/{self.name}")

    def up(self) -> bool:
        return True

    def start(self, slot: Slot, release: Release) -> None:
        now = self._variants()
        if slot == "challenger" and "champion" not in now:
            raise UserError("there is no champion to start a challenger beside")
        model = f"{self.name}-{release.version}-{release.digest[:12]}"
        if slot in now and now[slot]["ModelName"] == model:
            return
        self._model(model, release)
        weight = 1.0 if slot == "champion" else 0.0
        self._update(now | {slot: self._variant(slot, model, weight)}, canary=slot == "champion")

    def healthy(self, slot: Slot) -> bool:
        endpoint = self._endpoint()
        if endpoint is None or endpoint["EndpointStatus"] != "InService":
            return False
        shown = [*endpoint["ProductionVariants"], *endpoint.get("ShadowProductionVariants", [])]
        return any(
            one["VariantName"] == slot
            and one["CurrentInstanceCount"] == one["DesiredInstanceCount"] > 0
            for one in shown
        )

    def shift(self, percent: int, shadow: bool = False) -> None:
        now = self._variants()
        if "challenger" not in now:
            raise UserError("there is no challenger to shift traffic to; start one first")
        mirrored = bool(shadow and not percent)
        if mirrored != self._mirrored():
            self._update(now, mirrored=mirrored)
        if not mirrored:
            self._weigh({"champion": 100.0 - percent, "challenger": float(percent)})

    def switch(self) -> None:
        now = self._variants()
        if "challenger" in now:
            model = now["challenger"]["ModelName"]
            # The old model stays: the alarm may yet bring it back.
            self._update({"champion": self._variant("champion", model, 1.0)}, canary=True)

    def roll_back(self) -> None:
        """Callers are back with the champion at once; the challenger's machines go after."""
        now = self._variants()
        if "challenger" in now:
            if not self._mirrored():
                self._weigh({"champion": 100.0, "challenger": 0.0})
            self._update({"champion": now["champion"]})

    def serving(self) -> dict[Slot, str]:
        return {
            slot: self._described(variant["ModelName"])["digest"]
            for slot, variant in self._variants().items()
        }

    def observe(self) -> dict[Slot, Observation]:
        """From the lines that the container leaves in the log."""
        seen: dict[Slot, Observation] = {}
        for slot, variant in self._variants().items():
            model = self._described(variant["ModelName"])
            found = answered.observation(self.log.notes(model["digest"], model["since"]))
            if found is not None:
                seen[slot] = found
        return seen

    def _model(self, name: str, release: Release) -> None:
        """A model of that name, from an earlier time in a slot, gives way: a slot begins anew."""
        if self._there("Model", name):
            self.client.delete_model(ModelName=name)
        source = {
            "S3Uri": store.put(self.params.targets.store, release),
            "S3DataType": "S3Prefix",
            "CompressionType": "None",
        }
        self.client.create_model(
            ModelName=name,
            ExecutionRoleArn=self.place.role,
            EnableNetworkIsolation=True,
            PrimaryContainer={
                "Image": self.place.image,
                "ModelDataSource": {"S3DataSource": source},
                "Environment": {
                    "HEADRACE_DIGEST": release.digest,
                    "HEADRACE_VERSION": str(release.version),
                },
            },
        )

    def _variant(self, slot: Slot, model: str, weight: float) -> dict[str, Any]:
        return {
            "VariantName": slot,
            "ModelName": model,
            "InstanceType": self.place.instance,
            "InitialInstanceCount": self.place.replicas,
            "InitialVariantWeight": weight,
        }

    def _update(self, wanted: Variants, canary: bool = False, mirrored: bool = False) -> None:
        """Give the endpoint these variants, under a configuration named by what it says."""
        variants = list(wanted.values())
        asked: dict[str, Any] = {"ProductionVariants": variants}
        if mirrored:
            copies = wanted["challenger"] | {"InitialVariantWeight": 1.0}
            asked = {
                "ProductionVariants": [wanted["champion"]],
                "ShadowProductionVariants": [copies],
            }
        named = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        config = f"{self.name}-{named}"
        if not self._there("EndpointConfig", config):
            self.client.create_endpoint_config(EndpointConfigName=config, **asked)
        held = self._endpoint()
        if held is None:
            self.client.create_endpoint(EndpointName=self.name, EndpointConfigName=config)
            self.alarms.put_metric_alarm(**self._alarm())
        elif held["EndpointConfigName"] != config:
            # An endpoint takes one change at a time.
            self.client.get_waiter("endpoint_in_service").wait(EndpointName=self.name)
            self.client.update_endpoint(
                EndpointName=self.name,
                EndpointConfigName=config,
                **({"DeploymentConfig": self._deployment()} if canary else {}),
            )

    def _weigh(self, weights: dict[Slot, float]) -> None:
        endpoint = self._endpoint()
        assert endpoint is not None, "a share is of an endpoint"
        shown = endpoint["ProductionVariants"]
        if {one["VariantName"]: one.get("DesiredWeight") for one in shown} == weights:
            return
        self.client.get_waiter("endpoint_in_service").wait(EndpointName=self.name)
        self.client.update_endpoint_weights_and_capacities(
            EndpointName=self.name,
            DesiredWeightsAndCapacities=[
                {
                    "VariantName": slot,
                    "DesiredWeight": weight,
                    "DesiredInstanceCount": self.place.replicas,
                }
                for slot, weight in weights.items()
            ],
        )

    def _deployment(self) -> dict[str, Any]:
        policy = dict(json.loads((SETTINGS / "deployment.json").read_text()))
        alarm = {"AlarmName": self._alarm()["AlarmName"]}
        return policy | {"AutoRollbackConfiguration": {"Alarms": [alarm]}}

    def _alarm(self) -> dict[str, Any]:
        """Rings where the champion's answers are errors."""
        settings = dict(json.loads((SETTINGS / "alarm.json").read_text()))
        where = {"EndpointName": self.name, "VariantName": "champion"}
        dimensions = [{"Name": name, "Value": value} for name, value in where.items()]
        return settings | {"AlarmName": f"{self.name}-errors", "Dimensions": dimensions}

    def _endpoint(self) -> dict[str, Any] | None:
        return self._there("Endpoint", self.name)

    def _config(self) -> dict[str, Any]:
        endpoint = self._endpoint()
        return (
            self._there("EndpointConfig", endpoint["EndpointConfigName"]) if endpoint else None
        ) or {}

    def _variants(self) -> Variants:
        config = self._config()
        shown = config.get("ProductionVariants", []) + config.get("ShadowProductionVariants", [])
        return {one["VariantName"]: one for one in shown}

    def _mirrored(self) -> bool:
        return bool(self._config().get("ShadowProductionVariants"))

    def _described(self, model: str) -> dict[str, Any]:
        """The bundle of a model, and since when it is there, in milliseconds."""
        found = self.client.describe_model(ModelName=model)
        digest = found["PrimaryContainer"]["Environment"]["HEADRACE_DIGEST"]
        return {"digest": digest, "since": int(found["CreationTime"].timestamp() * 1000)}

    def _there(self, kind: str, name: str) -> dict[str, Any] | None:
        """SageMaker says of what is not there that the request was not valid."""
        ask = {
            "Endpoint": self.client.describe_endpoint,
            "EndpointConfig": self.client.describe_endpoint_config,
            "Model": self.client.describe_model,
        }[kind]
        try:
            return dict(ask(**{f"{kind}Name": name}))
        except self.client.exceptions.ClientError as error:
            if "could not find" not in error.response["Error"]["Message"].lower():
                raise
            return None


def target(params: Params) -> Sagemaker:
    """The endpoint in the account and region of the usual AWS chain."""
    return Sagemaker(params)
