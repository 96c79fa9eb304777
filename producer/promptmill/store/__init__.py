"""Jobs in Redis: records, event logs, and the scripts that change them."""

from promptmill.store.client import Claimed, ClaimRefusal, Store
from promptmill.store.head import Record
from promptmill.store.ids import START, EventId
from promptmill.store.submission import Submission

__all__ = ["START", "ClaimRefusal", "Claimed", "EventId", "Record", "Store", "Submission"]
