"""The HTTP side: ``uvicorn ops.bench.baseline.relay:app --loop uvloop --http httptools``."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator

import redis.asyncio as aioredis
from ops.bench.baseline.tasks import REDIS_URL, complete
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

# One connection a reader, quiet for as long as its job waits: neither redis-py's 100 connections nor its 5 s fit.
redis_client = aioredis.Redis.from_url(REDIS_URL, max_connections=5000, socket_timeout=None)


async def submit(request: Request) -> Response:
    """``POST /jobs`` with ``{"model", "prompt"}``: enqueue and answer ``{"id"}``."""
    body = await request.json()
    job_id = uuid.uuid4().hex
    await run_in_threadpool(complete.delay, job_id, body["model"], body["prompt"])
    return JSONResponse({"id": job_id}, status_code=202)


async def events(job_id: str) -> AsyncIterator[dict[str, str]]:
    """Subscribe to the job's channel and pass its messages on until ``done``."""
    async with redis_client.pubsub(ignore_subscribe_messages=True) as pubsub:
        await pubsub.subscribe(f"job:{job_id}")
        async for message in pubsub.listen():
            data = message["data"].decode()
            kind = json.loads(data)["type"]
            yield {"event": kind, "data": data}
            if kind == "done":
                return


async def stream(request: Request) -> Response:
    """``GET /jobs/{id}/stream``: the job's events as SSE."""
    return EventSourceResponse(events(request.path_params["job_id"]))


async def result(request: Request) -> Response:
    """``GET /jobs/{id}``: the stored text, or 404 while there is none."""
    text = await redis_client.get(f"result:{request.path_params['job_id']}")
    if text is None:
        return JSONResponse({"error": "not found"}, status_code=404)
    return JSONResponse({"text": text.decode()})


app = Starlette(
    routes=[
        Route("/jobs", submit, methods=["POST"]),
        Route("/jobs/{job_id}", result),
        Route("/jobs/{job_id}/stream", stream),
    ]
)
