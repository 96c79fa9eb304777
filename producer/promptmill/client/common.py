"""What the producers' calls share."""

from __future__ import annotations

from promptmill.contract import Job
from promptmill.errors import JobCancelled, JobFailed, NotFound
from promptmill.settings import Settings, default_data_dir, load_settings
from promptmill.up.datadir import find_running_up


def found_settings() -> Settings:
    """The configuration as the command line finds it, with the store of the ``promptmill up`` that runs here."""
    settings = load_settings()
    if settings.redis_url is None and (running := find_running_up(settings.data_dir or default_data_dir())):
        return running.put_in(settings)
    return settings


def raise_for(job: Job) -> None:
    """Raise what tells how a job ended, unless it succeeded: JobFailed, JobCancelled; NotFound where it is gone."""
    if job.state == "cancelled":
        raise JobCancelled(f"job {job.id} was cancelled", job_id=job.id)
    if job.state in {"failed", "expired"}:
        error = job.error
        if error is None:
            raise JobFailed(f"job {job.id} {job.state}", job_id=job.id)
        raise JobFailed(
            error.message,
            job_id=job.id,
            code=error.code,
            retryable=error.retryable,
            retry_after_s=error.retry_after_s,
        )
    if not job.ended:
        raise NotFound(f"job {job.id} is no longer stored", field="id")
