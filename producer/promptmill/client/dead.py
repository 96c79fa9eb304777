"""Jobs that were given up because their workers died: reading them, and asking the same once more."""

from __future__ import annotations

from promptmill import keys
from promptmill.contract import Job, JobRequest
from promptmill.errors import BadRequest, NotFound, StoreUnavailable
from promptmill.store import Store
from promptmill.store.connection import store_errors
from promptmill.store.dead import is_dead, read_dead, unlist_dead


async def dead_jobs(store: Store, user: str | None) -> list[Job]:
    """Those that are still kept, the latest first; of one user or of all."""
    return [record.job() for record in await read_dead(store) if user is None or record.user == user]


async def dead_request(store: Store, job_id: str) -> JobRequest:
    """What was asked, whole.

    Raises
    ------
    NotFound
        There is no such job.
    BadRequest
        It was not given up.
    """
    record = await store.find(job_id)
    if record is None:
        raise NotFound(f"there is no job {job_id}", field="id")
    if not is_dead(record):
        raise BadRequest(f"job {job_id} was not given up: it is {record.state}", field="id")
    with store_errors(store.address):
        stored: bytes | None = await store.wire.call("HGET", keys.record(job_id), "request")
    if stored is None:
        raise StoreUnavailable(f"the request of job {job_id} is gone from the store", retryable=False)
    return JobRequest.model_validate_json(stored)


async def again(store: Store, job_id: str) -> JobRequest:
    """The same request for a new job; with a key of its own, so that repeating it makes no second one.

    Raises as :func:`dead_request`.
    """
    request = await dead_request(store, job_id)
    metadata = {**request.metadata, "retry_of": job_id}
    return request.model_copy(update={"idempotency_key": f"retry of {job_id}", "metadata": metadata})


async def dealt_with(store: Store, job_id: str) -> None:
    """Take a job off the list."""
    await unlist_dead(store, [job_id])
