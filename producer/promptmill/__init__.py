"""promptmill: a distributed task queue for LLM completion jobs.

This package is what producers import. Everything public is named here; the other packages of the distribution are
programs (workers, relay, gateway).
"""

from promptmill.batch import BatchResult
from promptmill.client import AsyncJob, AsyncProducer, JobHandle, JobPage, Producer, Readiness
from promptmill.contract import ImagePart, Job, JobRequest, Message, TextPart, Timeouts, Usage
from promptmill.errors import (
    BadRequest,
    ConfigError,
    IdempotencyConflict,
    JobCancelled,
    JobFailed,
    NotFound,
    PromptmillError,
    StoreUnavailable,
    WaitTimeout,
)
from promptmill.settings import Settings, load_settings

__all__ = [
    "AsyncJob",
    "AsyncProducer",
    "BadRequest",
    "BatchResult",
    "ConfigError",
    "IdempotencyConflict",
    "ImagePart",
    "Job",
    "JobCancelled",
    "JobFailed",
    "JobHandle",
    "JobPage",
    "JobRequest",
    "Message",
    "NotFound",
    "Producer",
    "PromptmillError",
    "Readiness",
    "Settings",
    "StoreUnavailable",
    "TextPart",
    "Timeouts",
    "Usage",
    "WaitTimeout",
    "load_settings",
]
