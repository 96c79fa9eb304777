"""``promptmill models explain`` and ``models test``: what would answer, and whether it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Final

import typer

from promptmill.client import AsyncProducer
from promptmill.contract import Job, JobRequest, Restart, parse_request
from promptmill.errors import JobCancelled, JobFailed, PromptmillError, StoreUnavailable, WaitTimeout
from promptmill.heartbeat import Beat, ready_workers
from promptmill.live import LiveRegistry
from promptmill.registry import Registry
from promptmill.routing import decide
from promptmill.settings import Settings
from promptmill.store import Store
from promptmill.up.signals import StopRequest, stop_on_signals

from . import exits
from .common import CANCEL_WAIT_S, ConfigOption, DataDirOption, JsonOption, client_settings, open_producer, unless_asked
from .output import note, out, out_json, printable

_PROMPT: Final = "Answer with one word: ready."
_PICKUP_S: Final = 10.0
_LOOK_S: Final = 0.1
_ADVICE: Final = {
    "auth": "the workers' key is wrong or missing: look at api_key_env or api_key_file, where the workers run",
    "auth_expired": "log in again where the workers run",
    "bad_request": "the model's configuration or its options are wrong; the message says which",
    "cut": "the provider's server or a proxy before it broke the answer off",
    "empty": "the provider answered without text: look at model_name",
    "malformed": "what answers there does not speak this protocol: look at type and api_url",
    "not_ready": "start `promptmill worker` with that --family",
    "overloaded": "the provider has no room for now: try again later, or give its role a backup",
    "rate_limited": "the provider's limit is reached: wait, or set limits for this model",
    "timeout_connect": "see that api_url is right and can be reached from where the workers run",
    "timeout_first_token": "it is slow to begin: raise its timeouts.first_token_s, or look at its load",
    "unknown_model": "the workers do not know it: `promptmill models list`",
    "unreachable": "see that api_url is right and that its server runs",
    "wait_timeout": "raise --timeout, or look at the workers with `promptmill doctor`",
}


async def look(settings: Settings, also: Callable[[Store], Awaitable[None]] | None = None) -> LiveRegistry:
    """The registry as it is now. Where nothing runs and no store is configured: what the file says, with a note.

    ``also`` is called with the store, where there is one.
    """
    live = LiveRegistry(settings)
    try:
        async with open_producer(settings) as producer:
            store = await producer.store()
            await live.refresh(store)
            if also is not None:
                await also(store)
    except StoreUnavailable as err:
        if settings.redis_url is not None:
            raise
        note(f"(the configuration file alone: {err})")
    return live


# -- explain ------------------------------------------------------------------------------------------------------


def explanation(registry: Registry, request: JobRequest) -> dict[str, Any]:
    """A decision of :func:`promptmill.routing.decide` as data: ``routes`` in order, ``automatic``, ``why``, ``note``.

    Raises BadRequest as it does.
    """
    decision = decide(registry, request)
    return {
        "routes": [
            {"model": r.name, "type": r.config.type, "family": r.config.worker_family, "slot": r.slot}
            for r in decision.routes
        ],
        "automatic": decision.automatic,
        "why": list(decision.why),
        "note": decision.note,
    }


def explain(
    *,
    role: Annotated[str | None, typer.Option(help="As in the request.")] = None,
    slot: Annotated[str | None, typer.Option(help="As in the request.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="As in the request.")] = None,
    user: Annotated[str, typer.Option(help="Whose request it is.")] = "default",
    exclude: Annotated[
        list[str] | None, typer.Option(help="A model or type that must not answer; may be given again.")
    ] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Say which models would answer a request, in which order, and why. Runs no job."""
    settings = client_settings(config, data_dir)
    fields = {"role": role, "slot": slot, "model": model, "user": user, "exclude": exclude or None}
    request = parse_request({"prompt": "x", **{k: v for k, v in fields.items() if v is not None}}, settings.limits)
    live = asyncio.run(look(settings))
    made = explanation(live.registry, request)
    if as_json:
        out_json(made)
        return
    for number, route in enumerate(made["routes"], 1):
        named = f", slot {route['slot']}" if route["slot"] else ""
        about = f"{route['type']}, {live.origin(route['model'])}, {route['family']} workers{named}"
        out(printable(f"{number}. {route['model']}  ({about})"))
    out("falls back: yes, where the class of the error permits it" if made["automatic"] else "falls back: no")
    for line in made["why"]:
        out(printable(f"- {line}"))


# -- test ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Times:
    """Seconds since the submit; None where it did not happen."""

    first_token_s: float | None = None
    total_s: float | None = None


def probe(
    name: Annotated[str, typer.Argument(help="The model's name in the registry.")],
    *,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = _PROMPT,
    timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="Wait no longer than this; the job is then cancelled.")
    ] = 60,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Run one small job on a model through a real worker, and say how long it took and what it cost.

    The provider may bill it. Exit codes as for `run`.
    """
    code = asyncio.run(_probe(client_settings(config, data_dir), name, prompt, timeout, as_json=as_json))
    raise typer.Exit(code)


async def _probe(settings: Settings, name: str, prompt: str, timeout_s: float, *, as_json: bool) -> int:
    times = _Times()
    with stop_on_signals() as stop:
        async with open_producer(settings) as producer:
            try:
                job = await _ask(producer, stop, name, prompt, timeout_s, times)
            except PromptmillError as err:
                _show_failure(name, err, times, as_json=as_json)
                return exits.exit_code(err)
    if job is None:
        return exits.INTERRUPTED
    _show(name, job, times, as_json=as_json)
    return exits.OK


async def _ask(
    producer: AsyncProducer, stop: StopRequest, name: str, prompt: str, timeout_s: float, times: _Times
) -> Job | None:
    """The job, succeeded; None after a signal. Raises what :meth:`AsyncProducer.result` does."""
    await _known_to_workers(producer, name)
    job = await producer.submit(prompt, model=name)
    began = time.monotonic()  # behind the import of Celery, which is no part of the answer

    async def follow() -> Job:
        async with aclosing(job.stream()) as pieces:
            async for piece in pieces:
                if isinstance(piece, Restart):
                    times.first_token_s = None
                elif times.first_token_s is None:
                    times.first_token_s = time.monotonic() - began
        return await job.get()

    try:
        done = await unless_asked(stop, follow(), timeout_s)
    except TimeoutError:
        await _cancel(producer, job.id)
        raise WaitTimeout(f"no end within {timeout_s:g} s; job {job.id} was cancelled") from None
    finally:
        times.total_s = time.monotonic() - began
    if done is None:
        await _cancel(producer, job.id)
    return done


async def _cancel(producer: AsyncProducer, job_id: str) -> None:
    try:
        async with asyncio.timeout(CANCEL_WAIT_S):
            await producer.cancel(job_id, "the test ended")
    except (PromptmillError, TimeoutError) as err:
        note(f"the job could not be cancelled ({err or 'no answer'}): `promptmill job cancel {job_id}`")


async def _known_to_workers(producer: AsyncProducer, name: str) -> None:
    """Wait until every ready worker of the model's family goes by the newest registry, so that it is what is tested.

    Raises ``not_ready`` where there is no such worker, and what :func:`decide` does for a name that nothing answers to.
    """
    store = await producer.store()
    live = LiveRegistry(producer.settings)
    await live.refresh(store)
    if not producer.settings.models and name not in live.registry.models:
        return  # the workers may know more than this configuration does
    family = decide(live.registry, parse_request({"prompt": "x", "model": name})).first.config.worker_family
    deadline = time.monotonic() + _PICKUP_S
    while True:
        beats: list[Beat] = [beat for beat in await ready_workers(store) if beat.family == family]
        if not beats:
            raise PromptmillError(f"no worker of the family {family} is ready to claim a job", code="not_ready")
        behind = [beat.worker for beat in beats if beat.registry < live.registry.version]
        if not behind:
            return
        if time.monotonic() > deadline:
            note(f"(not yet at the newest registry: {', '.join(behind)})")
            return
        await asyncio.sleep(_LOOK_S)


def _show(name: str, job: Job, times: _Times, *, as_json: bool) -> None:
    usage = job.usage
    if as_json:
        out_json(
            {
                "ok": True,
                "model": name,
                "answered_by": job.model,
                "backend": job.backend,
                "job_id": job.id,
                "first_token_s": times.first_token_s,
                "total_s": times.total_s,
                "usage": usage.model_dump() if usage else None,
                "cost_usd": job.cost_usd,
                "attempts": len(job.attempts),
                "text": job.text,
            }
        )
        return
    out(printable(f"{name} answers: {job.text}"))
    first = f"{times.first_token_s:.2f} s" if times.first_token_s is not None else "-"
    out(f"first token {first}, total {times.total_s:.2f} s, attempts {len(job.attempts)}")
    if usage is not None:
        about = " (estimated)" if usage.estimated else ""
        cost = f", ${job.cost_usd:.6f}" if job.cost_usd is not None else ""
        out(f"{usage.input_tokens} tokens in, {usage.output_tokens} out{about}{cost}")


def _show_failure(name: str, err: PromptmillError, times: _Times, *, as_json: bool) -> None:
    advice = _ADVICE.get(err.code)
    job_id = err.job_id if isinstance(err, JobFailed | JobCancelled) else None
    if as_json:
        error = {**err.to_dict(), "advice": advice}
        out_json({"ok": False, "model": name, "job_id": job_id, "total_s": times.total_s, "error": error})
        return
    note(f"error [{err.code}]: {err.message}")
    if advice:
        note(f"  -> {advice}")
    if job_id:
        note(f"  -> promptmill job show {job_id}")
