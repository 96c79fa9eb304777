"""``promptmill demo``: everything, on a real small model, in less than half a minute."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import httpx
import typer

from promptmill.demo_model import MODEL_NAME, THREADS, require_model
from promptmill.errors import PromptmillError
from promptmill.extras import require_extras
from promptmill.settings import Settings, child_environment, load_settings
from promptmill.up.embedded import free_port
from promptmill.up.part import PartSpec
from promptmill.up.signals import stop_on_signals
from promptmill.up.stack import Stack
from promptmill.up.tell import Teller

from . import exits
from .common import unless_asked
from .demo_batch import batch_tour
from .output import note, out, printable, yes

PROMPT: Final = "Why is the sky blue? Answer in three short sentences."
_MODEL_READY_S: Final = 60.0
_READ_S: Final = 120.0

_MODEL: Final = "smollm2"
_CONFIG: Final = """\
[models.{name}]
type = "local_openai"
api_url = "http://127.0.0.1:{port}/v1"
model_name = "{model}"
"""

_NEXT: Final = """\
What next
  Your own model: write promptmill.toml, one entry a model,

    [models.ollama]
    type = "local_openai"                  # any OpenAI-compatible server
    api_url = "http://127.0.0.1:11434/v1"
    model_name = "llama3.2"

    [models.sonnet]
    type = "anthropic_api"
    model_name = "claude-sonnet-4-6"
    api_key_env = "ANTHROPIC_API_KEY"      # the key stays in the environment

  then, in one terminal,        promptmill up
  and in another,               promptmill run --model ollama "Why is the sky blue?"
  What works and what does not: promptmill doctor"""


@dataclass(frozen=True, slots=True)
class SentEvent:
    """A Server-Sent Event as it came."""

    id: str
    type: str
    data: dict[str, Any]


def demo(
    prompt: Annotated[str, typer.Argument(help="What to ask the model.")] = PROMPT,
    *,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the parts say.")] = False,
) -> None:
    """Show all of it on a real small model: a job's tokens over HTTP, live, late and resumed, and a file of prompts.

    Needs no key, no server and no Docker. Everything stands in a temporary directory and is gone afterwards.
    """
    require_extras("workers", "gateway", "demo")
    require_model()
    raise typer.Exit(asyncio.run(_demo(prompt, verbose=verbose)))


async def _demo(prompt: str, *, verbose: bool) -> int:
    said: deque[str] = deque(maxlen=40)
    tell = Teller()

    async def show() -> bool:
        with tempfile.TemporaryDirectory(prefix="promptmill-demo-", ignore_cleanup_errors=True) as directory:
            port = free_port()
            settings = _settings(Path(directory), port)
            started = time.monotonic()
            out(f"1. starting Valkey, a worker, the gateway and {MODEL_NAME} on {THREADS} threads")
            model = _model_part(port)
            async with Stack(settings, tell if verbose else said.append, hurry=stop.hurry, extra=[model]) as stack:
                keys = list(settings.keys_by_user().values())
                headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
                # Never through a proxy: all of it is on this machine.
                async with httpx.AsyncClient(
                    base_url=stack.url, headers=headers, timeout=_READ_S, trust_env=False
                ) as client:
                    await _wait_for_model(client, port)
                    out(f"   ready {stack.url} after {time.monotonic() - started:.1f} s\n")
                    streamed = await _tour(client, prompt)
                redis_url = stack.about().redis_url
                here = settings.model_copy(update={"redis_url": redis_url, "broker_url": redis_url})
                return await batch_tour(here, Path(directory), stop, _MODEL) and streamed

    with stop_on_signals() as stop:
        try:
            good = await unless_asked(stop, show())
        except (PromptmillError, httpx.HTTPError) as err:
            for line in said:
                note(line)
            if isinstance(err, PromptmillError):
                raise
            raise PromptmillError(f"the gateway did not answer: {err!r}", code="not_ready") from err
        finally:
            tell.close()
    if good is None:
        return exits.INTERRUPTED
    out(_NEXT if good else "That was not as it should be: please report it.")
    return exits.OK if good else exits.FAILED


def _settings(directory: Path, model_port: int) -> Settings:
    config = directory / "promptmill.toml"
    config.write_text(_CONFIG.format(name=_MODEL, port=model_port, model=MODEL_NAME))
    settings = load_settings(config, host="127.0.0.1", port=0, workers=1, data_dir=directory / "data")
    # Whatever Redis this shell is set up for: the demo brings its own.
    return settings.model_copy(update={"redis_url": None, "broker_url": None})


def _model_part(port: int) -> Callable[[int], PartSpec]:
    def spec(lifeline: int) -> PartSpec:
        return PartSpec(
            name="model",
            command=(sys.executable, "-m", "promptmill.demo_model", "--port", str(port)),
            env=child_environment({}, lifeline_fd=lifeline),
            stop_order=3,
        )

    return spec


async def _wait_for_model(client: httpx.AsyncClient, port: int) -> None:
    deadline = time.monotonic() + _MODEL_READY_S
    while time.monotonic() < deadline:
        try:
            if (await client.get(f"http://127.0.0.1:{port}/health")).status_code == 200:
                return
        except httpx.ConnectError:
            pass  # not listening yet
        await asyncio.sleep(0.05)
    raise PromptmillError(f"{MODEL_NAME} is not ready after {_MODEL_READY_S:.0f} s", code="not_ready")


async def _tour(client: httpx.AsyncClient, prompt: str) -> bool:
    """The job, live; then again late, resumed and from its end. True where all of it agrees."""
    request = {"model": _MODEL, "prompt": prompt, "max_tokens": 160}
    answer = await client.post("/v1/jobs", json=request)
    answer.raise_for_status()
    job: dict[str, Any] = answer.json()
    out(f"2. POST /v1/jobs {json.dumps(request, ensure_ascii=False)}")
    out(f"   {answer.status_code}, job {job['id']}; its tokens, as Server-Sent Events:\n")
    live = await _read_live(client, job["stream_url"])
    text = _text(live)
    tokens = [event for event in live if event.type == "token"]

    late = await _read(client, job["stream_url"])
    late_same = [(e.id, e.data) for e in late] == [(e.id, e.data) for e in live]
    out(f"3. the same job, read again late: {_count(late)} token events, the same ids and text: {yes(late_same)}")

    middle = tokens[len(tokens) // 2 - 1] if len(tokens) > 1 else live[0]
    rest = await _read(client, job["stream_url"], after=middle.id)
    first_half = live[: live.index(middle) + 1]
    resumed_same = _text(first_half) + _text(rest) == text
    out(
        f"4. resumed in the middle, Last-Event-ID: {middle.id}: {_count(rest)} token events, "
        f"{_count(first_half)} + {_count(rest)} = {len(tokens)} and the same text: "
        f"{yes(resumed_same and _count(first_half) + _count(rest) == len(tokens))}"
    )
    ended = await client.get(job["stream_url"], headers={"Last-Event-ID": live[-1].id})
    out(f"   resumed at the end: {ended.status_code}, nothing is left to read: {yes(ended.status_code == 204)}")

    stored: dict[str, Any] = (await client.get(f"/v1/jobs/{job['id']}")).json()
    stored_same = stored["state"] == "succeeded" and stored["text"] == text
    usage: dict[str, Any] = stored.get("usage") or {}
    out(
        f"5. stored: {stored['state']}, {usage.get('input_tokens')} tokens in, {usage.get('output_tokens')} out, "
        f"text equal to the tokens joined: {yes(stored_same)}\n"
    )
    return bool(tokens) and late_same and resumed_same and ended.status_code == 204 and stored_same


async def _read_live(client: httpx.AsyncClient, url: str) -> list[SentEvent]:
    started = time.monotonic()
    first_s: float | None = None
    events: list[SentEvent] = []
    sys.stdout.write("   ")
    async with aclosing(_events(client, url)) as stream:
        async for event in stream:
            events.append(event)
            if event.type == "token":
                first_s = first_s if first_s is not None else time.monotonic() - started
                sys.stdout.write(printable(event.data["text"]).replace("\n", "\n   "))
                sys.stdout.flush()
    all_s = time.monotonic() - started
    out("\n")
    end = events[-1]
    if end.type != "done":
        raise PromptmillError(f"the job ended as {end.type}: {end.data.get('message')}", code=end.data.get("code"))
    out(f"   {_count(events)} token events, the first after {first_s or 0:.2f} s, all in {all_s:.2f} s\n")
    return events


async def _read(client: httpx.AsyncClient, url: str, after: str | None = None) -> list[SentEvent]:
    async with aclosing(_events(client, url, after)) as stream:
        return [event async for event in stream]


async def _events(client: httpx.AsyncClient, url: str, after: str | None = None) -> AsyncGenerator[SentEvent]:
    """The events of one connection. Bytes are split at the line feed only, as the gateway writes them."""
    async with client.stream("GET", url, headers={"Last-Event-ID": after} if after else None) as answer:
        answer.raise_for_status()
        rest = b""
        async for piece in answer.aiter_bytes():
            *blocks, rest = (rest + piece).split(b"\n\n")
            for block in blocks:
                lines = (line.partition(b": ") for line in block.split(b"\n"))
                fields = {name.decode(): value.decode() for name, _, value in lines}
                if "data" in fields:
                    yield SentEvent(fields.get("id", ""), fields["event"], json.loads(fields["data"]))


def _text(events: list[SentEvent]) -> str:
    """The tokens behind the last ``restart``, joined."""
    text = ""
    for event in events:
        if event.type == "token":
            text += event.data["text"]
        elif event.type == "restart":
            text = ""
    return text


def _count(events: list[SentEvent]) -> int:
    return sum(event.type == "token" for event in events)
