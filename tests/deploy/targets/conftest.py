"""AWS as moto's server answers it, over HTTP on this machine, empty for every test."""

from collections.abc import Iterator

import boto3
import pytest
import requests
from deploy.targets import bundles
from moto.server import ThreadedMotoServer

from pipelines.deploy.targets import Release

REGION = "us-east-1"


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The endpoint, which boto3 finds in the environment."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": REGION,
            "NO_PROXY": "127.0.0.1",
        }.items():
            environment.setenv(name, value)
        yield url
    server.stop()


@pytest.fixture
def aws(moto: str) -> str:
    """Nothing is there. Functions are answered by moto itself: no container runs."""
    requests.post(f"{moto}/moto-api/reset", timeout=10)
    requests.post(f"{moto}/moto-api/config", json={"lambda": {"use_docker": False}}, timeout=10)
    return moto


@pytest.fixture
def store(aws: str) -> str:
    """An empty bucket for bundles."""
    boto3.client("s3").create_bucket(Bucket="headrace")
    return "s3://headrace/bundles"


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[Release]:
    """Versions 1 and 2, which no test changes."""
    folder = tmp_path_factory.mktemp("bundles")
    return [bundles.release(folder, version) for version in (1, 2)]
