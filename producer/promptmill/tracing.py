"""Traces, as OpenTelemetry has them: one a job, from its submission through the worker to its readers.

The Celery message carries the job's id and nothing else, so the context travels in the job's record (``trace`` in its
head, a W3C ``traceparent``). A job that was submitted without one gets a trace id that follows from its own id: workers
and relays agree on it without a word.

Servers of ours trace where ``otlp_endpoint`` is set. A program that uses the library is joined where it has set
OpenTelemetry up itself: the job then belongs to the trace of whoever submitted it.

Spans hold ids, names, numbers and error codes: never a prompt, an answer, a message or a user.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from types import TracebackType
from typing import Any, Final, Literal, Self

from promptmill.extras import require_extras
from promptmill.settings import Settings

Kind = Literal["internal", "server", "client", "producer", "consumer"]
Attributes = Mapping[str, str | int | float | bool | None]

FLUSH_S: Final = 3.0
_NAME: Final = "promptmill"


class _Tracing:
    """What this process traces with. ``decided`` is False in programs that only use the library."""

    provider: Any = None
    tracer: Any = None
    decided = False


_this: Final = _Tracing()


def start_tracing(settings: Settings, service: str) -> None:
    """Decide for this process, which is one of ours, whether and where its spans go.

    Raises :class:`~promptmill.errors.MissingExtra` where OpenTelemetry is wanted and not installed.
    """
    _this.decided = True
    if settings.otlp_endpoint is None:
        return
    require_extras("tracing")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    about = {
        "service.name": f"{_NAME}-{service}",
        "service.version": version(_NAME),
        "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
    }
    provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint.rstrip("/") + "/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _this.provider, _this.tracer = provider, provider.get_tracer(_NAME, version(_NAME))


def flush_tracing() -> None:
    """Send what is left, for up to three seconds. Blocks: call it from a thread, or at a process's end."""
    if _this.provider is not None:
        # The SDK's own bound does not hold while a request hangs, and a process that is to end must not wait for it.
        sending = threading.Thread(target=_this.provider.force_flush, name="last spans", daemon=True)
        sending.start()
        sending.join(FLUSH_S)


def _tracer() -> Any:
    if not _this.decided and (trace := sys.modules.get("opentelemetry.trace")) is not None:
        return trace.get_tracer(_NAME)  # the program's own; without one its spans are of no effect
    return _this.tracer


class Span:
    """A part of a trace, begun where the block is entered and ended where it is left. This one records nothing."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    @property
    def traceparent(self) -> str | None:
        """What others need to join, as W3C writes it; None where there is nothing to join."""
        return None

    def note(self, attributes: Attributes) -> None:
        """Add what became known meanwhile; values of None are left out."""

    def event(self, name: str) -> None:
        """Something happened now."""

    def rename(self, name: str) -> None:
        """What it is called is known only now."""

    def fail(self, code: str) -> None:
        """It ended with an error."""


_NOTHING: Final = Span()


class _Recorded(Span):
    __slots__ = ("_failed", "_span", "_token")

    def __init__(self, span: Any) -> None:
        self._span = span
        self._failed = False
        self._token: Any = None

    def __enter__(self) -> Self:
        from opentelemetry import context, trace  # noqa: PLC0415 - an extra

        self._token = context.attach(trace.set_span_in_context(self._span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        from opentelemetry import context  # noqa: PLC0415 - an extra

        context.detach(self._token)
        if kind is not None and not self._failed:
            # Its name alone: an exception's message may hold what somebody wrote.
            self.fail(kind.__name__)
        self.end()

    def end(self) -> None:
        """It is over. Leaving the block does this."""
        self._span.end()

    @property
    def traceparent(self) -> str | None:
        about = self._span.get_span_context()
        if not about.is_valid:
            return None
        return f"00-{about.trace_id:032x}-{about.span_id:016x}-{int(about.trace_flags):02x}"

    def note(self, attributes: Attributes) -> None:
        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})

    def event(self, name: str) -> None:
        self._span.add_event(name)

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def fail(self, code: str) -> None:
        from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415 - an extra

        self._failed = True
        self._span.set_attribute("error.type", code)
        self._span.set_status(Status(StatusCode.ERROR))


def span(name: str, kind: Kind = "internal", attributes: Attributes | None = None) -> Span:
    """A span within the current one."""
    tracer = _tracer()
    return _NOTHING if tracer is None else _begin(tracer, name, kind, attributes, None)


def job_span(job_id: str, trace: str | None, name: str, kind: Kind, attributes: Attributes | None = None) -> Span:
    """A span in a job's trace, whose record says ``trace``."""
    tracer = _tracer()
    if tracer is None:
        return _NOTHING
    return _begin(tracer, name, kind, {"promptmill.job.id": job_id, **(attributes or {})}, _context(job_id, trace))


def request_span(name: str, traceparent: str | None) -> Span:
    """A span for a request to a server, in the trace of who sent it where they told."""
    tracer = _tracer()
    return _NOTHING if tracer is None else _begin(tracer, name, "server", None, _joined(traceparent))


def note_wait(job_id: str, trace: str | None, from_ms: int, to_ms: int) -> None:
    """A span for the time in the queue, which is known only afterwards; times in ms since 1970."""
    tracer = _tracer()
    if tracer is not None:
        of_job = {"promptmill.job.id": job_id}
        at = {"start_time": from_ms * 1_000_000, "attributes": of_job, "context": _context(job_id, trace)}
        tracer.start_span("promptmill.queue", **at).end(max(from_ms, to_ms) * 1_000_000)


@contextmanager
def submitting(job_ids: Sequence[str]) -> Generator[list[str | None]]:
    """Spans for the submission of jobs, which end with the block; yields what their records are to say as ``trace``."""
    tracer = _tracer()
    if tracer is None:
        yield [None] * len(job_ids)
        return
    begun = [_begin(tracer, "promptmill.submit", "producer", {"promptmill.job.id": job_id}, None) for job_id in job_ids]
    try:
        yield [each.traceparent for each in begun]
    except BaseException as err:
        for each in begun:
            each.fail(type(err).__name__)
        raise
    finally:
        for each in begun:
            each.end()


def _begin(tracer: Any, name: str, kind: Kind, attributes: Attributes | None, context: Any) -> _Recorded:
    from opentelemetry.trace import SpanKind  # noqa: PLC0415 - an extra

    known = {key: value for key, value in (attributes or {}).items() if value is not None}
    return _Recorded(tracer.start_span(name, context=context, kind=SpanKind[kind.upper()], attributes=known))


def _joined(traceparent: str | None) -> Any:
    from opentelemetry.context import Context  # noqa: PLC0415 - an extra
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

    carrier = {"traceparent": traceparent} if traceparent else {}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _context(job_id: str, trace: str | None) -> Any:
    """Of the record, or where it says nothing, the one that follows from the job's id."""
    if trace is not None:
        return _joined(trace)
    from opentelemetry.context import Context  # noqa: PLC0415 - an extra
    from opentelemetry.trace import (  # noqa: PLC0415
        NonRecordingSpan,
        SpanContext,
        TraceFlags,
        set_span_in_context,
    )

    digest = hashlib.sha256(job_id.encode()).digest()
    trace_id, span_id = int.from_bytes(digest[:16]) or 1, int.from_bytes(digest[16:24]) or 1
    sampler = getattr(_tracer(), "sampler", None)
    # Everybody comes to the same decision: samplers go by the trace id.
    sampled = sampler is None or sampler.should_sample(None, trace_id, _NAME).decision.is_sampled()
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    return set_span_in_context(NonRecordingSpan(SpanContext(trace_id, span_id, True, flags)), Context())
