"""The first pass over an input: every line is checked before anything is sent, and its place is noted."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from promptmill.batch.files.hashes import HashTable, hash_of, hash_of_id
from promptmill.batch.files.lines import LineReader
from promptmill.batch.files.records import Input, Record
from promptmill.batch.models import CHUNK_LINES, BatchLine
from promptmill.contract import JobRequest
from promptmill.errors import BadRequest
from promptmill.usage.estimates import estimated_usage

BAD_LINES_MAX: Final = 10_000
"""With more the input is not what its reader takes it for; skipping them all would hide that."""
CHUNK_BYTES_MAX: Final = 8 << 20
_CHUNK_SIZES: Final = (CHUNK_LINES, 50, 20, 10, 5, 2, 1)
_NONE: Final = -1


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request, by its number in the file and its place there."""

    number: int
    offset: int
    size: int
    code: str
    message: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.message}"


@dataclass(frozen=True, slots=True)
class Choice:
    """Who shall answer a line, as it says."""

    model: str | None
    role: str | None
    slot: str | None
    user: str
    exclude: tuple[str, ...]

    @classmethod
    def of(cls, request: JobRequest) -> Choice:
        """The request's."""
        return cls(request.model, request.role, request.slot, request.user, tuple(request.exclude or ()))


@dataclass(slots=True)
class Amounts:
    """How much the lines of one choice ask for; equal lines count once where they run once.

    ``output_max`` sums ``max_tokens`` over the lines that have it, ``unbounded`` counts the others.
    """

    first_number: int
    example: JobRequest
    lines: int = 0
    input_tokens: int = 0
    output_max: int = 0
    unbounded: int = 0

    def add(self, request: JobRequest) -> None:
        """One more line."""
        self.lines += 1
        self.input_tokens += estimated_usage(request, 0).input_tokens
        self.output_max += request.max_tokens or 0
        self.unbounded += request.max_tokens is None


@dataclass(slots=True)
class Plan:
    """An input whose lines are known: their places, in order, and which of them are equal.

    ``bad`` are lines that were left out. ``choices`` says who shall answer how many. ``input_lines`` counts the good
    lines, also where only a sample of them is in the plan.
    """

    numbers: array[int] = field(default_factory=lambda: array("q"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    same: array[int] = field(default_factory=lambda: array("q"))
    bad: list[BadLine] = field(default_factory=list[BadLine])
    choices: dict[Choice, Amounts] = field(default_factory=dict[Choice, Amounts])
    input_lines: int = 0

    def __len__(self) -> int:
        return len(self.offsets)

    def record(self, source: Input, index: int) -> Record:
        """A line as it stands in the input."""
        offset, size = self.offsets[index], self.sizes[index]
        return Record(self.numbers[index], offset, size, source.read(offset, size))

    def same_as(self, index: int) -> int | None:
        """The index of an equal earlier line; None where there is none, or nobody asked."""
        return None if self.same[index] == _NONE else self.same[index]

    def chunk_lines(self) -> int:
        """How many lines a chunk shall have so that none is beyond 8 MB, but for one line that is so alone."""
        if max(self.sizes, default=0) * CHUNK_LINES <= CHUNK_BYTES_MAX:
            return CHUNK_LINES
        sizes = self.sizes
        fitting = (
            lines
            for lines in _CHUNK_SIZES
            if all(sum(sizes[start : start + lines]) <= CHUNK_BYTES_MAX for start in range(0, len(sizes), lines))
        )
        return next(fitting, 1)

    def place(self, record: Record, same: int) -> None:
        """Note where a line stands; ``same`` is the index of an equal one, or -1."""
        self.numbers.append(record.number)
        self.offsets.append(record.offset)
        self.sizes.append(record.size)
        self.same.append(same)

    def add(self, record: Record, same: int, request: JobRequest) -> None:
        """One more line, and what it asks for."""
        self.place(record, same)
        if same != _NONE:
            return
        choice = Choice.of(request)
        amounts = self.choices.get(choice)
        if amounts is None:
            amounts = self.choices[choice] = Amounts(record.number, request)
        amounts.add(request)


def check_input(
    source: Input,
    reader: LineReader,
    *,
    dedupe: bool = False,
    skip_bad: bool = False,
    seen: Callable[[int, int], None] | None = None,
) -> Plan:
    """Read all of an input and check every line.

    ``seen`` is called with the lines and the bytes that are done with. Raises :class:`BadInput` where lines are wrong
    (with ``skip_bad``: where more than 10,000 are), and BadRequest where there is no line.
    """
    plan = Plan()
    ids, requests = HashTable(), HashTable()
    for record in reader.format.records(source, reader.limits.request_bytes):
        try:
            _check(plan, record, source, reader, ids, requests if dedupe else None)
        except BadRequest as err:
            # Not the error itself, which would keep the whole line in memory.
            plan.bad.append(BadLine(record.number, record.offset, record.size, err.code, err.message))
            if len(plan.bad) > BAD_LINES_MAX:
                break
        if seen is not None:
            seen(len(plan), record.offset + record.size)
    if plan.bad and (not skip_bad or len(plan.bad) > BAD_LINES_MAX):
        raise BadInput(source.name, plan.bad, len(plan))
    if not len(plan):
        more = f": all {len(plan.bad)} are wrong" if plan.bad else ""
        raise BadRequest(f"{source.name} has no line to run{more}", field="input")
    source.check_unchanged()
    plan.input_lines = len(plan)
    return plan


def locate_lines(source: Input, reader: LineReader, skipped: frozenset[int]) -> Plan:
    """The places of an input's lines, without looking at what they say: for one that was checked before.

    ``skipped`` are the numbers of those that were left out then.
    """
    plan = Plan()
    for record in reader.format.records(source, reader.limits.request_bytes):
        if record.number in skipped:
            plan.bad.append(BadLine(record.number, record.offset, record.size, "bad_request", "left out before"))
        else:
            plan.place(record, _NONE)
    plan.input_lines = len(plan)
    return plan


def _check(
    plan: Plan, record: Record, source: Input, reader: LineReader, ids: HashTable, requests: HashTable | None
) -> None:
    line_id, request = reader.read(record)
    index = len(plan)
    earlier = ids.add(hash_of_id(line_id), index)
    if earlier is not None:
        raise BadRequest(f"id: {line_id!r} is the id of line {plan.numbers[earlier]}, too", field="id")
    same = _NONE if requests is None else _equal_line(plan, source, reader, requests, request)
    plan.add(record, same, request)


def _equal_line(plan: Plan, source: Input, reader: LineReader, requests: HashTable, request: JobRequest) -> int:
    wanted = request.to_json()
    earlier = requests.add(hash_of(wanted), len(plan))
    if earlier is None:
        return _NONE
    # Two lines with one hash and different requests would get one answer: compare what they say.
    _, other = reader.read(plan.record(source, earlier))
    return earlier if other.to_json() == wanted else _NONE


def sample_of(plan: Plan, source: Input, reader: LineReader, count: int) -> Plan:
    """``count`` lines of a plan, spread evenly over the input; all of them where there are no more."""
    if count >= len(plan):
        return plan
    sample = Plan(input_lines=plan.input_lines)
    for number in range(count):
        record = plan.record(source, number * len(plan) // count)
        sample.add(record, _NONE, reader.read(record)[1])
    return sample


class BadInput(BadRequest):
    """Lines of an input are wrong; ``lines`` are they, in order."""

    def __init__(self, name: str, lines: list[BadLine], good: int) -> None:
        if len(lines) > BAD_LINES_MAX:
            found = f"more than {BAD_LINES_MAX} lines are wrong, so it is hardly what it was taken for"
        else:
            found = f"{len(lines)} of {len(lines) + good} lines {'is' if len(lines) == 1 else 'are'} wrong"
        super().__init__(f"{name}: {found}; nothing was sent. {lines[0]}", field="input")
        self.lines = lines


def batch_lines(source: Input, reader: LineReader, plan: Plan, start: int, stop: int) -> list[BatchLine]:
    """Lines of a plan as they are uploaded. Raises BadRequest where the input was changed meanwhile."""
    lines: list[BatchLine] = []
    for index in range(start, min(stop, len(plan))):
        try:
            line_id, request = reader.read(plan.record(source, index))
        except BadRequest:
            source.check_unchanged()
            raise
        data = request.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        lines.append(BatchLine(line_id, data, plan.same_as(index)))
    return lines


def ids_of(source: Input, reader: LineReader, plan: Plan) -> Iterator[tuple[int, str]]:
    """Index and id of every line, in order."""
    for index in range(len(plan)):
        yield index, reader.format.parse(plan.record(source, index)).id
