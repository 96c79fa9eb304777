"""Bounds on what one request may hold, so that no single job can fill the store or a worker's memory."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """Bounds on a request. Sizes are UTF-8 bytes; an image's size is that of the decoded picture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    request_bytes: int = Field(default=32 * 1024 * 1024, gt=0)
    messages: int = Field(default=2_000, gt=0)
    text_bytes: int = Field(default=8 * 1024 * 1024, gt=0)
    images: int = Field(default=50, ge=0)
    image_bytes: int = Field(default=8 * 1024 * 1024, gt=0)
    metadata_bytes: int = Field(default=16 * 1024, gt=0)
    max_tokens: int = Field(default=1_000_000, gt=0)
    stop_sequences: int = Field(default=16, ge=0)
    response_format_bytes: int = Field(default=64 * 1024, ge=0)
