"""The OpenAPI document: FastAPI's, with the bodies that this application parses itself."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REFERENCE = "#/components/schemas/{model}"


def request_body(model: str) -> dict[str, Any]:
    """For a route: its body is the model of that name, as JSON."""
    schema = {"$ref": _REFERENCE.format(model=model)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Make `app` serve a document in which the routes' bodies are described by these models."""
    made: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not made:
            document = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            _, schemas = models_json_schema(
                [(body, "validation") for body in bodies], ref_template=_REFERENCE
            )
            document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
            made.update(document)
        return made

    app.openapi = openapi  # type: ignore[method-assign]
