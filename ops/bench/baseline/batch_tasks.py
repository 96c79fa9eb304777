"""What people write for many prompts: a Celery task a line, results in the result backend.

``celery -A ops.bench.baseline.batch_tasks worker --pool threads --concurrency 500``
"""

from __future__ import annotations

import json
import os

import httpx
from celery import Celery

REDIS_URL = os.environ.get("BASELINE_REDIS_URL", "redis://127.0.0.1:6379/0")
PROVIDER_URL = os.environ.get("BASELINE_PROVIDER_URL", "http://127.0.0.1:8000/v1")

app = Celery("baseline", broker=REDIS_URL, backend=REDIS_URL)
app.conf.update(result_expires=3600, redis_max_connections=5000)

http_client = httpx.Client(
    timeout=httpx.Timeout(60, pool=None), limits=httpx.Limits(max_connections=None, max_keepalive_connections=1000)
)


@app.task(name="baseline.nothing", ignore_result=True)
def nothing(index: int) -> None:
    """Do nothing: what is left is the price of a message."""


@app.task(name="baseline.line")
def line(model: str, prompt: str) -> str:
    """Answer one prompt."""
    request = {"model": model, "stream": True, "messages": [{"role": "user", "content": prompt}]}
    parts: list[str] = []
    with http_client.stream("POST", f"{PROVIDER_URL}/chat/completions", json=request) as response:
        response.raise_for_status()
        for raw in response.iter_lines():
            if raw.startswith("data: ") and raw != "data: [DONE]":
                choices = json.loads(raw[6:])["choices"]
                parts.append((choices[0]["delta"].get("content") or "") if choices else "")
    return "".join(parts)
