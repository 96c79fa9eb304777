"""Jobs in Redis: records, event logs, and the scripts that change them."""

from promptmill.store.client import Claimed, ClaimRefusal, Store, Submission
from promptmill.store.head import Record
from promptmill.store.ids import START, EventId

__all__ = ["START", "ClaimRefusal", "Claimed", "EventId", "Record", "Store", "Submission"]
