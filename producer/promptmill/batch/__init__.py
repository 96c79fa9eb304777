"""Batches: many requests as one object in the store, that is fed to the workers bit by bit and survives everybody."""

from promptmill.batch.client import BatchClient
from promptmill.batch.models import (
    BATCH_END_STATES,
    CHUNK_LINES,
    BatchHead,
    BatchLine,
    BatchResult,
    BatchState,
    BatchStatus,
)

__all__ = [
    "BATCH_END_STATES",
    "CHUNK_LINES",
    "BatchClient",
    "BatchHead",
    "BatchLine",
    "BatchResult",
    "BatchState",
    "BatchStatus",
]
