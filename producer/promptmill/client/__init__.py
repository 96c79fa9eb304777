"""The producer library: submit jobs, follow them, stop them."""

from promptmill.client.aio import AsyncJob, AsyncProducer
from promptmill.client.pages import JobPage, Readiness
from promptmill.client.sync import JobHandle, Producer

__all__ = ["AsyncJob", "AsyncProducer", "JobHandle", "JobPage", "Producer", "Readiness"]
