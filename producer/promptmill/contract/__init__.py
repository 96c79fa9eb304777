"""The contract: what producers send, what the store holds, what readers see.

Everything here is plain pydantic with no I/O. Readers ignore event types and fields that they do not know, so a newer
writer and an older reader work side by side.
"""

from promptmill.contract.events import (
    END_TYPES,
    Cancelled,
    Confirm,
    Done,
    Error,
    Event,
    Progress,
    Restart,
    Token,
    Unknown,
    parse_event,
)
from promptmill.contract.job import END_STATES, Attempt, ErrorInfo, Job, JobState, Usage
from promptmill.contract.limits import Limits
from promptmill.contract.request import (
    Content,
    ImagePart,
    JobRequest,
    Message,
    Part,
    Priority,
    ResponseFormat,
    TextPart,
    Timeouts,
    parse_request,
)

__all__ = [
    "END_STATES",
    "END_TYPES",
    "Attempt",
    "Cancelled",
    "Confirm",
    "Content",
    "Done",
    "Error",
    "ErrorInfo",
    "Event",
    "ImagePart",
    "Job",
    "JobRequest",
    "JobState",
    "Limits",
    "Message",
    "Part",
    "Priority",
    "Progress",
    "ResponseFormat",
    "Restart",
    "TextPart",
    "Timeouts",
    "Token",
    "Unknown",
    "Usage",
    "parse_event",
    "parse_request",
]
