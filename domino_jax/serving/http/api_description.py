"""The OpenAPI description: bodies as `request_types` checks them, and every status that a route may answer with."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from domino_jax.serving.http.request_types import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from domino_jax.serving.http.response_types import ChatChunk, CompletionChunk, ErrorAnswer

_REF = "#/components/schemas/{model}"
_BODIES: Sequence[type[BaseModel]] = (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody)
_CHUNKS: Sequence[type[BaseModel]] = (ChatChunk, CompletionChunk)
_ERRORS = {
    400: "No valid JSON, a wrong type or value, an unsupported field, or a prompt that does not fit the context",
    401: "No API key or a wrong one",
    404: "The model, or the path, does not exist",
    405: "The method is not allowed here",
    408: "Head or body arrived too slowly",
    413: "The body is too large",
    429: "The queue is full; see Retry-After",
    431: "The request's head is too large",
    500: "A fault of the server or of the generation",
    503: "Loading, draining, failed or out of connections; see Retry-After",
    504: "The request took longer than the server allows",
}
_ALWAYS = (400, 401, 405, 408, 431, 500, 503)
_OF_BODIES = (404, 413)
_OF_ENGINE = (429, 504)


def describe_answers(
    answer: type[BaseModel] | None,
    *statuses: int,
    chunk: type[BaseModel] | None = None,
) -> dict[int | str, dict[str, Any]]:
    """Return a route's `responses`: its answer (also as a stream of `chunk`s) and its errors."""
    fine: dict[str, Any] = {"description": "The answer"}
    if answer is not None:
        fine["model"] = answer
    if chunk is not None:
        fine["content"] = {"text/event-stream": {"itemSchema": _describe_event(chunk)}}
    errors = {status: {"model": ErrorAnswer, "description": _ERRORS[status]} for status in (*_ALWAYS, *statuses)}
    return {200: fine, **errors}


def _describe_event(chunk: type[BaseModel]) -> dict[str, Any]:
    forms = [{"$ref": _REF.format(model=form.__name__)} for form in (chunk, ErrorAnswer)]
    json_data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": forms}}
    data = {"anyOf": [{"const": "[DONE]"}, json_data]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def describe_body_route(
    body: type[Body], answer: type[BaseModel], chunk: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Return the keyword arguments that describe a route with a body."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model=body.__name__)}}}
    statuses = _OF_BODIES if chunk is None else (*_OF_BODIES, *_OF_ENGINE)
    return {
        "responses": describe_answers(answer, *statuses, chunk=chunk),
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }


def describe_api(app: FastAPI, needs_key: bool) -> dict[str, Any]:
    """Return the description of `app`; `needs_key`: routes but `/health` ask for a key."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    description = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, definitions = models_json_schema(
        [(body, "validation") for body in _BODIES] + [(chunk, "serialization") for chunk in _CHUNKS],
        ref_template=_REF,
    )
    components = description.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name, schema in definitions["$defs"].items():
        schemas.setdefault(name, schema)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path, operations in description["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if needs_key and path != "/health":
                operation["security"] = [{"bearer": []}]
    if needs_key:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    app.openapi_schema = description
    return description
