"""What is asked about the server itself: models, health, readiness, metrics, version."""

import time
from typing import Any, Final, Literal

from fastapi import FastAPI
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from pdserve import __version__
from pdserve.core.errors import Unavailable, UnknownModel
from pdserve.proto import inference_pb2 as pb
from pdserve.router.openai.errors import ErrorAnswer
from pdserve.router.openai.fields import Shown
from pdserve.router.openai.gateway import Gateway

READY_RETRY_S = 1.0

_UNKNOWN: Final[dict[int | str, dict[str, Any]]] = {"4XX": {"model": ErrorAnswer}}


class ModelShown(Shown):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Tokens of prompt and completion together."""


class ModelsShown(Shown):
    object: Literal["list"]
    data: list[ModelShown]


class StateShown(Shown):
    status: Literal["ok", "ready"]


class VersionShown(Shown):
    version: str


def add_service_routes(app: FastAPI, gateway: Gateway) -> None:
    """None of them waits for anything."""
    started = int(time.time())

    def shown(model: pb.Model) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": started,
            "owned_by": "pdserve",
            "max_model_len": model.context_tokens,
        }

    @app.get("/v1/models", response_model=ModelsShown)
    async def list_models() -> Response:
        """The models whose workers are members now."""
        models = gateway.intake.models().models
        return JSONResponse({"object": "list", "data": [shown(model) for model in models]})

    @app.get("/v1/models/{model:path}", response_model=ModelShown, responses=_UNKNOWN)
    async def retrieve_model(model: str) -> Response:
        """One of them."""
        models = gateway.intake.models().models
        for known in models:
            if known.name == model:
                return JSONResponse(shown(known))
        listed = ", ".join(known.name for known in models) or "none yet"
        raise UnknownModel(f"model {model[:256]!r} is not served here: served are {listed}")

    @app.get("/health", response_model=StateShown)
    async def health() -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready", response_model=StateShown, responses={503: {"model": ErrorAnswer}})
    async def ready() -> Response:
        """Requests would be served: at least one model has a worker that can own them."""
        if not gateway.intake.servable():
            raise Unavailable("no worker can take a request now: ask again", retry_after_s=READY_RETRY_S)
        return JSONResponse({"status": "ready"})

    @app.get("/version", response_model=VersionShown)
    async def version() -> Response:
        """Of this server."""
        return JSONResponse({"version": __version__})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """In Prometheus' text format."""
        return Response(generate_latest(gateway.intake.registry), media_type=CONTENT_TYPE_LATEST)
