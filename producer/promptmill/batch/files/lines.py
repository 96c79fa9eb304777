"""One line as the job request that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from promptmill.batch.files.format import Format
from promptmill.batch.files.records import Record
from promptmill.contract import JobRequest, Limits, parse_request

_ROUTING: Final = ("model", "role", "slot")


@dataclass(frozen=True, slots=True)
class LineReader:
    """Reads lines.

    ``overrides`` are fields of a request that win over what a line says; where they choose who answers, the line's own
    model, role and slot are void. ``known_as`` gives a model's name by what its provider calls it.
    """

    format: Format
    limits: Limits
    overrides: Mapping[str, Any] = field(default_factory=dict[str, Any])
    known_as: Mapping[str, str] = field(default_factory=dict[str, str])

    def read(self, record: Record) -> tuple[str, JobRequest]:
        """The caller's id and the request. Raises BadRequest."""
        parsed = self.format.parse(record)
        fields = parsed.fields
        if any(name in self.overrides for name in _ROUTING):
            for name in _ROUTING:
                fields.pop(name, None)
        elif self.format.provider_names and isinstance(fields.get("model"), str):
            fields["model"] = self.known_as.get(fields["model"], fields["model"])
        return parsed.id, parse_request({**fields, **self.overrides, "priority": "batch"}, self.limits)
