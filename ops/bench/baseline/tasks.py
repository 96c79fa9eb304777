"""The Celery side: ``celery -A ops.bench.baseline.tasks worker --pool gevent --concurrency 1000``."""

from __future__ import annotations

import json
import os

import httpx
import redis
from celery import Celery

REDIS_URL = os.environ.get("BASELINE_REDIS_URL", "redis://127.0.0.1:6379/0")
PROVIDER_URL = os.environ.get("BASELINE_PROVIDER_URL", "http://127.0.0.1:8000/v1")
RETENTION_S = 3600

app = Celery("baseline", broker=REDIS_URL)
app.conf.task_ignore_result = True

# redis-py's default of 100 connections is too few for 1,000 tasks.
redis_client = redis.Redis.from_url(REDIS_URL, max_connections=5000)
# One client for all tasks: a client a task would load the certificate store each time.
http_client = httpx.Client(
    timeout=httpx.Timeout(30, pool=None), limits=httpx.Limits(max_connections=None, max_keepalive_connections=100)
)


@app.task(name="baseline.complete")
def complete(job_id: str, model: str, prompt: str) -> None:
    """Stream one completion, publish each token on ``job:{id}``, then ``done``; store the text for an hour."""
    channel = f"job:{job_id}"
    request = {"model": model, "stream": True, "messages": [{"role": "user", "content": prompt}]}
    parts: list[str] = []
    with http_client.stream("POST", f"{PROVIDER_URL}/chat/completions", json=request) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            choices = json.loads(line[6:])["choices"]
            text = choices[0]["delta"].get("content") if choices else None
            if text:
                parts.append(text)
                redis_client.publish(channel, json.dumps({"type": "token", "text": text}))
    redis_client.set(f"result:{job_id}", "".join(parts), ex=RETENTION_S)
    redis_client.publish(channel, json.dumps({"type": "done"}))
