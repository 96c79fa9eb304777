"""The live part of the registry: what operators change while everything runs. See ``docs/reference/models.md``."""

from promptmill.live.changes import AuditEntry, Change, Editor
from promptmill.live.entries import Entries, named_in
from promptmill.live.reading import LiveRegistry, families_of

__all__ = ["AuditEntry", "Change", "Editor", "Entries", "LiveRegistry", "families_of", "named_in"]
