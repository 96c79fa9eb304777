"""Usage over HTTP."""

from __future__ import annotations

from typing import Annotated

import orjson
from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from promptmill.client import AsyncProducer
from promptmill_gateway.failures import Forbidden
from promptmill_gateway.routes import json_answer, problems
from promptmill_relay.auth import Access


class UsageSums(BaseModel):
    """Sums over attempts. ``estimated`` and ``unpriced`` count attempts; what the latter cost is not in the sums."""

    attempts: int
    failed: int
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    estimated: int
    unpriced: int
    cost_usd: float


class UsageGroup(UsageSums):
    """The sums of one group; of the first five those that were grouped by."""

    user: str | None = None
    model: str | None = None
    backend: str | None = None
    role: str | None = None
    day: str | None = None


class UsageAnswer(BaseModel):
    """What was used from one UTC day through another."""

    from_: str = Field(alias="from")
    to: str
    by: list[str]
    rows: list[UsageGroup]
    total: UsageSums


class UsageRoutes:
    """The handler, with what it needs."""

    def __init__(self, producer: AsyncProducer, access: Access) -> None:
        self._producer = producer
        self._access = access

    def add_to(self, router: APIRouter) -> None:
        """Add the route, with what OpenAPI says of it."""
        router.add_api_route(
            "/v1/usage",
            self.usage,
            methods=["GET"],
            tags=["usage"],
            response_model=UsageAnswer,
            summary="What was used, in tokens and dollars",
            responses=problems(400, 401, 403, 503),
        )

    async def usage(
        self,
        request: Request,
        from_day: Annotated[
            str | None, Query(alias="from", description="The first day (UTC): `2026-01-31`, `today`, `yesterday`.")
        ] = None,
        to_day: Annotated[str | None, Query(alias="to", description="The last day, likewise.")] = None,
        by: Annotated[
            str | None, Query(description="`user`, `model`, `backend`, `role`, `day`, joined with commas.")
        ] = None,
        user: Annotated[str | None, Query(description="Only this user's.")] = None,
    ) -> Response:
        """Today's, where no day is given. With API keys: that of the key's user."""
        owner = self._access.user(request.headers.raw)
        if owner is not None and user not in {None, owner}:
            raise Forbidden("this API key sees the usage of its own user only", field="user")
        report = await self._producer.usage(from_day, to_day, by, owner or user)
        return json_answer(orjson.dumps(report.to_dict()))
