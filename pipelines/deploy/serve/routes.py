"""The routes, and their OpenAPI document: its schemas are those of the bundle that answers now."""

import secrets
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from pipelines.deploy.serve import oip
from pipelines.deploy.serve.refusal import Refusal
from pipelines.deploy.serve.service import Service, refused

INFER = "/v2/models/{name}/infer"
INFER_VERSION = "/v2/models/{name}/versions/{version}/infer"


class Error(BaseModel):
    error: str


class Server(BaseModel):
    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool


class ModelReady(BaseModel):
    name: str
    ready: bool


class Tensor(BaseModel):
    name: str
    datatype: str
    shape: list[int]


class Metadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class Prediction(BaseModel):
    probability: float
    decision: bool


class Predictions(BaseModel):
    predictions: list[Prediction]
    model: str
    version: int
    bundle: str
    fallback: str | None = None


class Data(Tensor):
    data: list[float]


class Inferred(BaseModel):
    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any]
    outputs: list[Data]


class Direct(APIRoute):
    """A route that calls its endpoint with the raw request and what stands in the path.

    FastAPI's own way there, through dependencies that no endpoint here has, costs half a model.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = self.direct

    async def direct(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self.endpoint(Request(scope, receive), **scope.get("path_params", {}))
        await response(scope, receive, send)


class Door:
    """The application, with a way past its middleware for what nearly every request wants."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.direct = {
            route.path: route.direct
            for route in app.routes
            if isinstance(route, Direct) and not route.param_convertors
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self.app
        if scope["type"] == "http" and scope["method"] == "HEAD":
            # uvicorn knows what was asked, and sends no body.
            scope = {**scope, "method": "GET"}
        elif scope["type"] == "http" and scope["method"] == "POST":
            app = self.direct.get(scope["path"], app)
        await app(scope, receive, send)


REFUSALS = {
    400: "no JSON",
    401: "no known API key",
    404: "no such model",
    408: "the body did not come in time",
    413: "the body is too large",
    415: "another type than application/json",
    422: "JSON that breaks the contract; names row and column",
    429: "too many requests",
}


def build(service: Service) -> FastAPI:
    """The application of one replica."""
    app = FastAPI(
        title="Headrace", version="2", docs_url=None, redoc_url=None, redirect_slashes=False
    )
    _asked(app, service)
    _told(app, service)
    app.add_exception_handler(Refusal, _on_refusal)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_fault)
    app.openapi = lambda: _openapi(app, service)  # type: ignore[method-assign]
    return app


def _asked(app: FastAPI, service: Service) -> None:
    """The routes that ask the model."""
    for path, endpoint, answer, schema in (
        ("/predict", service.predict, Predictions, "Records"),
        (INFER, service.infer, Inferred, "Inference"),
        (INFER_VERSION, service.infer_version, Inferred, "Inference"),
    ):
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
        extra: dict[str, Any] = {"requestBody": {"required": True, "content": content}}
        if service.keys is not None:
            extra["security"] = [{"key": []}]
        app.router.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            response_model=None,
            responses=_refusals(*REFUSALS) | {200: {"model": answer}},
            openapi_extra=extra,
            route_class_override=Direct,
        )


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Error, "description": REFUSALS[status]} for status in statuses}


def _told(app: FastAPI, service: Service) -> None:
    """The routes that tell of the service."""

    @app.get("/v2")
    async def server() -> Server:
        return Server(name="headrace", version="2", extensions=[])

    @app.get("/v2/health/live")
    async def live() -> Live:
        return Live(live=True)

    @app.get("/v2/health/ready", responses={503: {"model": Ready}})
    async def ready() -> JSONResponse:
        status = 503 if service.draining else 200
        headers = {"x-bundle": service.holder.current.digest}
        return JSONResponse({"ready": not service.draining}, status, headers)

    told = {200: {"model": ModelReady}, 503: {"model": ModelReady}} | _refusals(404)

    @app.get("/v2/models/{name}/versions/{version}/ready", responses=told)
    @app.get("/v2/models/{name}/ready", responses=told)
    async def model_ready(name: str, version: str | None = None) -> JSONResponse:
        model, ready = service.model(name, version), not service.draining
        return JSONResponse({"name": model.name, "ready": ready}, 200 if ready else 503)

    @app.get("/v2/models/{name}/versions/{version}", responses=_refusals(404))
    @app.get("/v2/models/{name}", responses=_refusals(404))
    async def metadata(name: str, version: str | None = None) -> Metadata:
        model = service.model(name, version)
        return Metadata(**oip.metadata(model.contract, model.name, model.version))

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=1.0.0")


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refused(error, secrets.token_hex(16))


async def _on_http(request: Request, error: Exception) -> Response:
    """No such route, or another method."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _on_fault(request: Request, error: Exception) -> Response:
    """A fault of ours: the traceback is logged, and stays here."""
    return JSONResponse({"error": "a fault of the service"}, 500)


def _openapi(app: FastAPI, service: Service) -> dict[str, Any]:
    """The document for the contract of the bundle that answers now."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    contract = service.holder.current.contract
    many = {"type": "array", "minItems": 1, "maxItems": contract.max_rows}
    record = {"$ref": "#/components/schemas/Record"}
    document["components"]["schemas"] |= {
        "Record": contract.schema,
        "Records": {
            "oneOf": [
                record,
                {
                    "type": "object",
                    "required": ["records"],
                    "additionalProperties": False,
                    "properties": {"records": many | {"items": record}},
                },
            ]
        },
        "Inference": oip.schema(contract),
    }
    if service.keys is not None:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document
