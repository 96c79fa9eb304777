"""The HTTP interface to jobs."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Query
from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from promptmill.client import AsyncProducer
from promptmill.contract import Job, JobRequest, JobState, parse_request
from promptmill.contract.request import Name
from promptmill.errors import BadRequest, NotFound, PromptmillError
from promptmill.keys import check_job_id
from promptmill.settings import Settings
from promptmill_gateway.body import Bodies
from promptmill_gateway.failures import Forbidden
from promptmill_gateway.schemas import CancelRequest, Health, JobAnswer, JobList, Ready
from promptmill_relay.auth import Access

_CANCEL_MAX_BYTES: Final = 16 * 1024
_NAME: Final = TypeAdapter[str](Name)

JobId = Annotated[str, Path(description="The job's id.")]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers of these statuses, for OpenAPI."""
    body = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _WHY[status], "content": body} for status in statuses}


_WHY: Final = {
    400: "The request is wrong: `bad_request`, `unknown_model`, `unknown_role`.",
    401: "No API key, or not one that is known: `not_authorised`.",
    403: "Not with this API key: `not_authorised`.",
    404: "No such job, or not one of this user: `not_found`.",
    408: "The body did not arrive in time: `bad_request`.",
    409: "The idempotency key stands for another request: `idempotency_conflict`.",
    413: "The request is too large: `too_large`.",
    429: "Nothing more is taken for now: `backlog_full`, `budget_exceeded`.",
    503: "Redis cannot be reached: `store_unavailable`; too much at once: `backlog_full`. Repeat with the same "
    "idempotency key.",
}


class JobRoutes:
    """The handlers, with what they need."""

    def __init__(self, settings: Settings, producer: AsyncProducer, access: Access) -> None:
        self._limits = settings.limits
        self._bodies = Bodies(settings.limits.request_bytes)
        self._producer = producer
        self._access = access

    def add_to(self, router: APIRouter) -> None:
        """Add the routes, with what OpenAPI says of them."""
        router.add_api_route(
            "/v1/jobs",
            self.submit,
            methods=["POST"],
            tags=["jobs"],
            status_code=202,
            response_model=JobAnswer,
            summary="Submit a job",
            openapi_extra=_body_of("JobRequest", required=True),
            responses=problems(400, 401, 403, 408, 409, 413, 429, 503),
        )
        router.add_api_route(
            "/v1/jobs",
            self.list_jobs,
            methods=["GET"],
            tags=["jobs"],
            response_model=JobList,
            summary="List jobs, newest first",
            responses=problems(400, 401, 403, 503),
        )
        router.add_api_route(
            "/v1/jobs/{job_id}",
            self.get,
            methods=["GET"],
            tags=["jobs"],
            response_model=JobAnswer,
            summary="One job",
            responses=problems(401, 404, 503),
        )
        router.add_api_route(
            "/v1/jobs/{job_id}/cancel",
            self.cancel,
            methods=["POST"],
            tags=["jobs"],
            response_model=JobAnswer,
            summary="Stop a job; does nothing where it has ended",
            openapi_extra=_body_of("CancelRequest", required=False),
            responses=problems(400, 401, 404, 408, 413, 503),
        )

    async def submit(self, request: Request) -> Response:
        """Store a job and queue it. Repeated with the same `Idempotency-Key` it answers the same job."""
        user = self._access.user(request.headers.raw)
        async with self._bodies.read(request) as body:
            job_request = parse_request(body, self._limits)
        job_request = _with_key(job_request, request.headers.get("idempotency-key"))
        if user is not None:
            if "user" in job_request.model_fields_set and job_request.user != user:
                raise Forbidden("this API key submits jobs of its own user only", field="user")
            job_request = job_request.model_copy(update={"user": user})
        # Before the job is stored: afterwards its answer must not fail for want of a signing key.
        await self._access.stream_urls.prepare()
        handle = await self._producer.submit_request(job_request)
        job = await self._producer.get(handle.id)
        return await self._answer(job, 202, {"location": f"/v1/jobs/{job.id}"})

    async def list_jobs(
        self,
        request: Request,
        state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
        user: Annotated[str | None, Query(description="Only jobs of this user.")] = None,
        limit: Annotated[int, Query(ge=1, le=200, description="How many at most.")] = 50,
        cursor: Annotated[str | None, Query(description="Where the last page ended: its `next_cursor`.")] = None,
    ) -> Response:
        """Jobs, page by page. With API keys: those of the key's user."""
        owner = self._access.user(request.headers.raw)
        if owner is not None and user not in {None, owner}:
            raise Forbidden("this API key lists jobs of its own user only", field="user")
        page = await self._producer.list(user=owner or user, state=state, limit=limit, cursor=cursor)
        jobs = [await self._with_url(job) for job in page.jobs]
        return json_answer(JobList.model_construct(jobs=jobs, next_cursor=page.next_cursor).model_dump_json())

    async def get(self, request: Request, job_id: JobId) -> Response:
        """A job with its text, usage and error as far as they are known, and a fresh `stream_url`."""
        return await self._answer(await self._own_job(request, job_id))

    async def cancel(self, request: Request, job_id: JobId) -> Response:
        """End a job, whatever its worker does."""
        await self._own_job(request, job_id)
        async with self._bodies.read(request, _CANCEL_MAX_BYTES) as body:
            reason = _reason(body)
        return await self._answer(await self._producer.cancel(job_id, reason=reason))

    async def _own_job(self, request: Request, job_id: str) -> Job:
        user = self._access.user(request.headers.raw)
        try:
            check_job_id(job_id)
        except BadRequest:
            raise NotFound(f"there is no job {job_id[:80]!r}", field="id") from None
        job = await self._producer.get(job_id)
        if user is not None and job.user != user:
            raise NotFound(f"there is no job {job_id}", field="id")
        return job

    async def _with_url(self, job: Job) -> JobAnswer:
        return JobAnswer.model_construct(**dict(job), stream_url=await self._access.stream_urls.sign(job.id))

    async def _answer(self, job: Job, status: int = 200, headers: dict[str, str] | None = None) -> Response:
        return json_answer((await self._with_url(job)).model_dump_json(), status, headers)


class HealthRoutes:
    """Health of the process, and readiness of the system. Both need no key."""

    def __init__(self, producer: AsyncProducer) -> None:
        self._producer = producer

    def add_to(self, router: APIRouter) -> None:
        """Add the routes, with what OpenAPI says of them."""
        router.add_api_route(
            "/healthz", self.health, methods=["GET"], tags=["health"], response_model=Health, summary="Alive"
        )
        router.add_api_route(
            "/readyz",
            self.ready,
            methods=["GET"],
            tags=["health"],
            response_model=Ready,
            summary="A job submitted now can be claimed",
            responses={503: {"description": "It cannot; `reason` says why.", "model": Ready}},
        )

    async def health(self) -> Response:
        """Touches nothing but this process."""
        return json_answer(Health().model_dump_json())

    async def ready(self) -> Response:
        """Redis answers, and at least one worker can claim."""
        try:
            found = await self._producer.ready()
        except PromptmillError as err:
            answer = Ready(ready=False, reason=err.message, workers=0)
        else:
            answer = Ready(
                ready=found.ok,
                reason=found.reason,
                workers=found.workers,
                families=found.families,
                paused=found.paused,
            )
        return json_answer(answer.model_dump_json(), 200 if answer.ready else 503)


def _with_key(request: JobRequest, header: str | None) -> JobRequest:
    if header is None:
        return request
    try:
        key = _NAME.validate_python(header)
    except ValidationError as err:
        raise BadRequest(f"Idempotency-Key: {err.errors()[0]['msg']}", field="idempotency_key") from None
    if request.idempotency_key not in {None, key}:
        raise BadRequest("Idempotency-Key and idempotency_key differ: give one", field="idempotency_key")
    return request.model_copy(update={"idempotency_key": key})


def _reason(body: bytes) -> str:
    try:
        # As for a submit: the standard library's parser keeps escaped lone surrogates, which are then cleaned.
        return CancelRequest.model_validate(json.loads((body.strip() or b"{}").decode())).reason
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as err:
        raise BadRequest(f"the request is not JSON: {err}", field="request") from None
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "request"
        raise BadRequest(f"{field}: {first['msg']}", field=field) from None


def json_answer(body: str | bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer that nobody keeps, and that no browser takes for anything else."""
    own = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
    return Response(body, status, {**own, **(headers or {})}, "application/json")


def _body_of(schema: str, *, required: bool) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": required, "content": content}}
