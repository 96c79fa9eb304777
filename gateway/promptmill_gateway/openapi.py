"""The OpenAPI document: what FastAPI finds, and what it cannot see (bodies read by hand, the stream, the keys)."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter

from promptmill.contract import (
    Cancelled,
    Confirm,
    Done,
    Error,
    JobRequest,
    Progress,
    Restart,
    Token,
)
from promptmill_gateway.schemas import CancelRequest, Problem

_REF: Final = "#/components/schemas/{model}"
_EVENTS: Final[tuple[type[BaseModel], ...]] = (Progress, Token, Restart, Confirm, Done, Error, Cancelled)
_STREAM_PATH: Final = "/v1/jobs/{job_id}/stream"
_STREAM_EVENT: Final[dict[str, Any]] = {
    "description": "One Server-Sent Event. One without `id` leaves the reader's last id as it is.",
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "id": {"type": "string", "pattern": "^[0-9]+-[0-9]+$"},
        "event": {"type": "string", "description": "The `type` in its data."},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/Event"},
        },
    },
}


def describe(app: FastAPI) -> dict[str, Any]:
    """The document; the same one at every call."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        components = document.setdefault("components", {})
        schemas: dict[str, Any] = components.setdefault("schemas", {})
        for model in (JobRequest, CancelRequest, Problem, *_EVENTS):
            _add(schemas, model)
        schemas["Event"] = {
            "description": "The `data` of each event of a stream, by its `type`. Ignore types that you do not know.",
            "oneOf": [{"$ref": _REF.format(model=model.__name__)} for model in _EVENTS],
            "discriminator": {"propertyName": "type"},
        }
        schemas["StreamEvent"] = _STREAM_EVENT
        _offer_prompt(schemas["JobRequest"])
        _drop_unused(document, schemas)
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            "streamUrl": {"type": "apiKey", "in": "query", "name": "sig", "description": "As given in `stream_url`."},
        }
        document["paths"][_STREAM_PATH] = {"get": _stream()}
        for path, operations in document["paths"].items():
            if path.startswith("/v1/"):
                for operation in operations.values():
                    # The empty one: a server without API keys asks for none.
                    operation.setdefault("security", [{"bearer": []}, {"apiKey": []}, {}])
        app.openapi_schema = document
    return app.openapi_schema


def _add(schemas: dict[str, Any], model: type[BaseModel]) -> None:
    schema = TypeAdapter(model).json_schema(ref_template=_REF)
    for name, definition in schema.pop("$defs", {}).items():
        schemas.setdefault(name, definition)
    schemas[model.__name__] = schema


def _offer_prompt(schema: dict[str, Any]) -> None:
    # prompt is turned into messages before the model sees it, so the model's own schema does not know it.
    schema["properties"]["prompt"] = {
        "type": "string",
        "minLength": 1,
        "description": "Short for one message of the user.",
    }
    schema["required"] = [name for name in schema.get("required", []) if name != "messages"]
    schema["oneOf"] = [{"required": ["prompt"]}, {"required": ["messages"]}]


def _drop_unused(document: dict[str, Any], schemas: dict[str, Any]) -> None:
    # FastAPI documents its own form of a validation error, which we never send.
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)


def _stream() -> dict[str, Any]:
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    text = {"type": "string"}
    return {
        "tags": ["jobs"],
        "summary": "A job's events as Server-Sent Events",
        "operationId": "stream_job",
        "description": (
            "Every event of the job, from the beginning or behind `Last-Event-ID`, then live, each once and in order, "
            "up to `done`, `error` or `cancelled`. The tokens since the last `restart`, joined, are the job's text."
        ),
        "parameters": [
            {"name": "job_id", "in": "path", "required": True, "schema": text},
            {"name": "Last-Event-ID", "in": "header", "schema": text, "description": "The last event's id."},
            {
                "name": "last_event_id",
                "in": "query",
                "schema": text,
                "description": "The same, for readers that cannot set the header; the header wins.",
            },
            {"name": "expires", "in": "query", "schema": {"type": "integer"}, "description": "From `stream_url`."},
            {"name": "sig", "in": "query", "schema": text, "description": "From `stream_url`."},
        ],
        "security": [{"bearer": []}, {"apiKey": []}, {"streamUrl": []}, {}],
        "responses": {
            "200": {
                "description": "The events; the schema is that of each one.",
                "content": {"text/event-stream": {"schema": {"$ref": "#/components/schemas/StreamEvent"}}},
            },
            "204": {"description": "The reader has seen the end."},
            "400": {"description": "`Last-Event-ID` is malformed.", "content": problem},
            "401": {"description": "No key, an unknown one, or a wrong or expired signature.", "content": problem},
            "404": {"description": "No such job, or not one of this user.", "content": problem},
            "429": {"description": "Too many readers of this user's jobs; see Retry-After.", "content": problem},
            "503": {"description": "Too many readers; see Retry-After.", "content": problem},
        },
    }
