"""Every failure of the HTTP interface as problem+json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from promptmill.errors import BadRequest, NotFound, PromptmillError
from promptmill_gateway.body import BodyTimeout, Busy
from promptmill_relay.problem import encode_problem


class Forbidden(PromptmillError):
    """The credentials are good, but not for this; answered with 403."""

    default_code = "not_authorised"


def answer(error: PromptmillError, status: int | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """The error as a response."""
    extra = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    status, raw, body = encode_problem(error, status=status, headers=extra)
    response = Response(body, status)
    response.raw_headers = raw
    return response


async def _known(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, PromptmillError)  # noqa: S101 - registered for this type only
    if isinstance(error, BodyTimeout):
        return answer(error, 408, {"connection": "close"})
    if isinstance(error, Busy):
        return answer(error, 503)
    return answer(error, 403 if isinstance(error, Forbidden) else None)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this type only
    where = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        return answer(NotFound(f"there is no {where}"))
    if error.status_code == 405:
        allowed = _allowed(request)
        return answer(BadRequest(f"there is no {where}, but {allowed}"), 405, {"allow": allowed})
    return answer(BadRequest(str(error.detail)), error.status_code, error.headers)


def _allowed(request: Request) -> str:
    # Starlette names the methods of the first route that fits; GET and POST of one path are two routes here.
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    return ", ".join(sorted({m for r in routes if r.path_regex.match(request.url.path) for m in r.methods or ()}))


async def _invalid(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this type only
    first: dict[str, Any] = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or "request"
    return answer(BadRequest(f"{field}: {first['msg']}", field=field))


async def _unexpected(request: Request, error: Exception) -> Response:
    # Starlette raises it again after this answer, and the server logs it with its trace.
    del request, error
    return answer(PromptmillError("something failed here that should not; the server's log says what", code="internal"))


def add_failures(app: FastAPI) -> None:
    """Register the handlers."""
    app.add_exception_handler(PromptmillError, _known)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _unexpected)
