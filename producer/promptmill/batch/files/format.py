"""What every format of a batch's lines has in common."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, cast

import orjson

from promptmill.batch.files.records import Input, Record
from promptmill.contract import ErrorInfo, Job, Usage
from promptmill.errors import BadRequest
from promptmill.text import clean_text

FormatName = Literal["openai", "openai-responses", "anthropic", "simple", "text", "csv"]

ID_MAX_LENGTH: Final = 512


@dataclass(frozen=True, slots=True)
class Parsed:
    """A line: the caller's id of it, and fields of a :class:`~promptmill.contract.JobRequest`, not yet checked."""

    id: str
    fields: dict[str, Any]


class Format(Protocol):
    """One way to write lines, and the answers to them.

    ``provider_names``: a line's model may be called as its provider calls it.
    """

    @property
    def name(self) -> FormatName:
        """As ``--format`` names it."""
        ...

    @property
    def provider_names(self) -> bool:
        """Whether lines come from a provider's world."""
        ...

    @property
    def id_key(self) -> str:
        """Where an answer has the caller's id."""
        ...

    def records(self, source: Input, limit_bytes: int) -> Iterator[Record]:
        """The records of an input that are lines of the batch."""
        ...

    def parse(self, record: Record) -> Parsed:
        """A line. Raises BadRequest, whose message begins with the field where there is one."""
        ...

    def answer(self, line_id: str, job: Job, usage: Usage, cost_usd: float | None) -> dict[str, Any]:
        """What is written for a line whose job succeeded.

        ``usage`` and ``cost_usd`` are what the line itself cost: nothing, where an earlier one was answered for it.
        """
        ...

    def failure(self, line_id: str, error: ErrorInfo, job: Job | None) -> dict[str, Any]:
        """What stands in the place of an answer where results and failures share one file."""
        ...


def json_object(record: Record) -> dict[str, Any]:
    """A record that is one JSON object. Raises BadRequest."""
    text = record.text()
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        # The stricter parser refuses escaped lone surrogates; the other keeps them, and they are replaced later.
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as err:
            raise BadRequest(f"not JSON: {err}") from None
    if not isinstance(value, dict):
        raise BadRequest("not a JSON object")
    return cast("dict[str, Any]", value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def line_id(value: Any, field: str) -> str:
    """A caller's id of a line: text or an integer. Raises BadRequest."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not 0 < len(value) <= ID_MAX_LENGTH:
        raise BadRequest(f"{field}: text of 1 to {ID_MAX_LENGTH} characters, or an integer, is needed", field=field)
    return clean_text(value)


class Fields:
    """The fields of an object of a provider's, taken one by one; what nobody took is refused, not silently dropped.

    ``place`` begins the names that errors tell. ``ignored`` are names that the user chose to drop.
    """

    def __init__(self, value: Any, place: str, ignored: frozenset[str] = frozenset()) -> None:
        if not isinstance(value, dict):
            raise BadRequest(f"{place or 'line'}: an object is needed", field=place or "line")
        self._left = {k: v for k, v in cast("dict[str, Any]", value).items() if k not in ignored}
        self._place = place
        self.ignored = ignored

    def name(self, field: str) -> str:
        """A field as errors name it."""
        return f"{self._place}.{field}" if self._place else field

    def take(self, *names: str) -> Any:
        """The value of the first of these fields that is there; None where none is."""
        found = [self._left.pop(name) for name in names if name in self._left]
        return next((value for value in found if value is not None), None)

    def need(self, name: str) -> Any:
        """A field that must be there. Raises BadRequest."""
        value = self.take(name)
        if value is None:
            raise BadRequest(f"{self.name(name)}: missing", field=self.name(name))
        return value

    def drop(self, names: frozenset[str]) -> None:
        """Take fields that change nothing of the answer."""
        for name in names & self._left.keys():
            del self._left[name]

    def drop_neutral(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Take fields whose value is the one that holds anyway."""
        for name in neutral.keys() & self._left.keys():
            if self._left[name] in neutral[name]:
                del self._left[name]

    def end(self) -> None:
        """Raise BadRequest for what is left and says something."""
        for name, value in self._left.items():
            if value is not None:
                known = self.name(name)
                raise BadRequest(f"{known}: not supported; `--ignore-field {name}` drops it", field=known)


def given(**fields: Any) -> dict[str, Any]:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def joined_system(texts: list[str]) -> str | None:
    """Several system messages as one text; None where there is none."""
    return "\n\n".join(texts) if texts else None


def not_supported(what: str, field: str) -> BadRequest:
    """The error for a part of a message that no job can have."""
    return BadRequest(f"{field}: {what} is not supported", field=field)
