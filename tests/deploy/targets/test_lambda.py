"""The lambda target: it keeps every target's promises against moto's server, whose functions run
the package that was published; callers ask the alias.
"""

import base64
import importlib.util
import io
import json
import random
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pytest
from deploy.targets.bundles import ANY
from deploy.targets.compliance import Compliance, Place
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.awslambda_simple.models import LambdaSimpleBackend

from pipelines import bundle
from pipelines.deploy.serve.contract import Contract
from pipelines.deploy.serve.refusal import Refusal
from pipelines.deploy.targets import Release, lambda_
from pipelines.deploy.targets.lambda_ import Lambda
from pipelines.errors import UserError
from pipelines.params import Params

RECORD = {"origin": "EWR", "delay": 3.5, "temp": None}
GROUP = "/aws/lambda/headrace-flights"


class Processes:
    """What moto does not do: it runs a version's package in a process, routes by weight, logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[str]] = {}

    def invoke(self, backend: Any, name: str, _: str | None, body: Any, *__: Any) -> bytes:
        name, _, qualifier = name.partition(":")  # moto does not read boto3's Qualifier
        alias = backend._lambdas._get_function_aliases(name).get(qualifier)
        if alias is not None:
            weights = (alias.routing_config or {}).get("AdditionalVersionWeights", {})
            others = list(weights)
            rest = 1 - sum(weights.values())
            (qualifier,) = random.choices(
                [*others, alias.function_version], [*weights.values(), rest]
            )
        code = backend.get_function(name, qualifier).code_bytes
        answer, lines = self._run(f"{name}-{qualifier}", code, body)
        self._log(lines)
        return answer.encode()

    def _run(self, key: str, code: bytes, body: Any) -> tuple[str, list[str]]:
        """A warm process for each version, as Lambda keeps them."""
        if key not in self.running:
            zipfile.ZipFile(io.BytesIO(code)).extractall(self.folder / key)
            loop = (
                "import handler, json, sys\n"
                "for line in sys.stdin:\n"
                "    print('END', json.dumps(handler.handler(json.loads(line), None)), flush=True)"
            )
            self.running[key] = subprocess.Popen(
                [sys.executable, "-c", loop],
                cwd=self.folder / key,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        process = self.running[key]
        assert process.stdin is not None
        assert process.stdout is not None
        text = body.decode() if isinstance(body, bytes) else body
        process.stdin.write(text + "\n")
        process.stdin.flush()
        lines = []
        while not (line := process.stdout.readline()).startswith("END "):
            assert line, "the handler ended"
            lines.append(line)
        return line.removeprefix("END "), lines

    def _log(self, lines: list[str]) -> None:
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.logs.models import logs_backends

        backend = logs_backends[DEFAULT_ACCOUNT_ID]["us-east-1"]
        if GROUP not in backend.groups:
            backend.create_log_group(GROUP, {})
        if "one" not in backend.groups[GROUP].streams:
            backend.create_log_stream(GROUP, "one")
        now = int(time.time() * 1000)
        events = [{"timestamp": now, "message": line} for line in lines]
        backend.put_log_events(GROUP, "one", events)

    def stop(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    made = Processes(tmp_path / "processes")
    monkeypatch.setattr(LambdaSimpleBackend, "invoke", lambda *given: made.invoke(*given))
    yield made
    made.stop()


@pytest.fixture
def target(aws: str, processes: Processes, params: Params) -> Lambda:
    role = boto3.client("iam").create_role(
        RoleName="headrace-lambda", AssumeRolePolicyDocument="{}"
    )["Role"]["Arn"]
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    layer = boto3.client("lambda").publish_layer_version(
        LayerName="headrace", Content={"ZipFile": empty.getvalue()}
    )["LayerVersionArn"]
    place = params.targets.lambda_.model_copy(update={"role": role, "layer": layer})
    targets = params.targets.model_copy(update={"lambda_": place})
    return Lambda(params.model_copy(update={"targets": targets}))


def invoked(event: dict[str, Any], alias: str = "live") -> Any:
    answer = boto3.client("lambda").invoke(
        FunctionName=f"headrace-flights:{alias}", Payload=json.dumps(event)
    )
    return json.loads(answer["Payload"].read())


class TestLambda(Compliance):
    @pytest.fixture
    def place(self, target: Lambda, releases: list[Release]) -> Place:
        client = boto3.client("lambda")
        event = json.dumps({"body": json.dumps(RECORD)})

        def one() -> str:
            answer = client.invoke(FunctionName="headrace-flights:live", Payload=event)
            return str(json.loads(answer["Payload"].read())["headers"]["x-bundle"])

        return Place(target, *releases, lambda times: Counter(one() for _ in range(times)))


@pytest.fixture
def up(target: Lambda, releases: list[Release]) -> Lambda:
    target.start("champion", releases[0])
    return target


def test_a_call_is_answered_as_the_bundle_does(up: Lambda, releases: list[Release]) -> None:
    row = pa.table({"origin": ["EWR"], "delay": pa.array([3.5], pa.float32()),
                    "temp": pa.array([None], pa.float32())})  # fmt: skip
    right = bundle.load(releases[0].folder).predict(row)[0]
    for event in (RECORD, {"records": [RECORD]}, {"body": json.dumps({"records": [RECORD]})}):
        answer = invoked(event)
        assert answer["statusCode"] == 200
        body = json.loads(answer["body"])
        assert body["bundle"] == releases[0].digest
        assert body["predictions"][0]["probability"] == pytest.approx(right, abs=1e-6)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{", "Expecting property name"),
        (json.dumps(RECORD | {"a": 1}), "row 0, column a: missing, or not of the contract"),
        ('{"origin": "EWR", "delay": 3.5}', "row 0, column temp: missing, or not of the contract"),
        (json.dumps(RECORD | {"delay": "late"}), "row 0, column delay: expected float32 or null"),
        (json.dumps(RECORD | {"delay": True}), "row 0, column delay: expected float32 or null"),
        (json.dumps(RECORD | {"delay": 10**400}), "row 0, column delay: expected float32 or null"),
        (json.dumps(RECORD).replace("3.5", "1e400"), "row 0, column delay: expected float32"),
        (json.dumps(RECORD).replace("3.5", "NaN"), "row 0, column delay: expected float32 or null"),
        (json.dumps(RECORD | {"origin": "\ud800"}), "surrogates not allowed"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        (json.dumps({"records": [RECORD], "more": 1}), "row 0, column delay: missing"),
        ('{"records": []}', "expected a list of at least one record"),
        ('{"records": [3]}', "row 0: expected an object"),
        ("[1]", "object"),
    ],
)
def test_what_breaks_the_contract_is_400_with_one_line(up: Lambda, body: str, said: str) -> None:
    answer = invoked({"body": body})
    assert answer["statusCode"] == 400
    assert said in json.loads(answer["body"])["error"]


VALUES = ANY | st.integers(-(2**129), 2**129) | st.floats(-4e38, 4e38)
BARE = st.fixed_dictionaries(dict.fromkeys(RECORD, VALUES)) | ANY
EVENTS = BARE | st.lists(BARE, max_size=2).map(lambda records: {"records": records})


def test_whatever_is_answered_is_what_the_service_takes_and_its_answer(
    releases: list[Release], tmp_path: Path
) -> None:
    """Of any event, bare or as a gateway wraps it: an answer, or 400 with one line."""
    zipfile.ZipFile(io.BytesIO(lambda_.package(releases[0]))).extractall(tmp_path)
    spec = importlib.util.spec_from_file_location("handler", tmp_path / "handler.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    service = Contract(module.CONTRACT["columns"], max_rows=9)

    def asked(text: str | bytes, event: Any) -> None:
        answer = module.handler(event, None)
        try:
            columns = service.read(text if isinstance(text, bytes) else text.encode())
        except Refusal:
            assert answer["statusCode"] == 400
            assert "\n" not in json.loads(answer["body"])["error"]
            return
        feed = dict(zip(service.texts, columns.texts, strict=True))
        feed |= dict(zip(service.numbers, columns.numbers, strict=True))
        right = module.SESSION.run(None, feed)[0].tolist()
        if all(0 <= value <= 1 for value in right):
            found = json.loads(answer["body"])["predictions"]
            assert [one["probability"] for one in found] == right
        else:
            assert answer["statusCode"] == 500

    @settings(max_examples=300, deadline=None)
    @given(event=EVENTS, text=st.text(), content=st.binary())
    def holds(event: Any, text: str, content: bytes) -> None:
        body = json.dumps(event)
        if event != {"ready": True}:  # which asks for another thing
            asked(body, event)
        asked(body, {"body": body})
        asked(text, {"body": text})
        asked(content, {"body": base64.b64encode(content).decode(), "isBase64Encoded": True})

    holds()


def test_the_same_release_is_one_package_and_one_version(
    up: Lambda, releases: list[Release]
) -> None:
    assert lambda_.package(releases[0]) == lambda_.package(releases[0])
    up.start("challenger", releases[1])
    up.roll_back()
    up.start("challenger", releases[1])
    found = boto3.client("lambda").list_versions_by_function(FunctionName="headrace-flights")
    assert [one["Version"] for one in found["Versions"]] == ["$LATEST", "1", "2"]


def test_a_bundle_that_is_not_its_name_is_not_published(
    target: Lambda, releases: list[Release]
) -> None:
    wrong = Release("flights", 3, "0" * 64, releases[0].folder)
    with pytest.raises(UserError, match="its hash is"):
        target.start("champion", wrong)
    assert target.serving() == {}


def test_the_share_is_a_weight_of_the_alias(up: Lambda, releases: list[Release]) -> None:
    up.start("challenger", releases[1])
    up.shift(25)
    live = boto3.client("lambda").get_alias(FunctionName="headrace-flights", Name="live")
    assert live["FunctionVersion"] == "1"
    assert live["RoutingConfig"] == {"AdditionalVersionWeights": {"2": 0.25}}


def test_nothing_mirrors_the_calls_of_a_function(up: Lambda, releases: list[Release]) -> None:
    up.start("challenger", releases[1])
    with pytest.raises(UserError, match="start with a share"):
        up.shift(0, shadow=True)


def test_what_began_before_the_slot_does_not_count(up: Lambda, releases: list[Release]) -> None:
    up.start("challenger", releases[1])
    up.shift(100)
    invoked(RECORD)
    assert up.observe()["challenger"].requests == 1
    up.roll_back()
    time.sleep(0.01)
    up.start("challenger", releases[1])
    assert "challenger" not in up.observe()
