"""A batch's keys: what clients and the feeder both do with them.

All methods raise :class:`~promptmill.errors.StoreUnavailable` where Redis does not answer as it should.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

import orjson

from promptmill import keys
from promptmill.batch import scripts
from promptmill.batch.chunks import line_job_id, unpack
from promptmill.batch.models import BatchHead, BatchLine, BatchStatus
from promptmill.contract import Usage
from promptmill.errors import NotFound
from promptmill.store import Store
from promptmill.store.connection import store_errors
from promptmill.store.head import at
from promptmill.store.link import Command
from promptmill.store.scripts import Script
from promptmill.usage.booking import run_all
from promptmill.usage.entries import NANO

COUNT_MAX: Final = 200
"""How many lines one script counts, so that it holds nobody up."""
CHUNKS_AT_ONCE: Final = 5


@dataclass(frozen=True, slots=True)
class StoredHead:
    """What never changes of a batch. ``secret`` is what its jobs' ids are made of."""

    head: BatchHead
    secret: str

    def job_id(self, index: int) -> str:
        """The id of a line's job."""
        return line_job_id(self.secret, index)

    def to_json(self) -> bytes:
        """As it stands in the store."""
        return orjson.dumps({**self.head.model_dump(mode="json", exclude_none=True), "secret": self.secret})

    @classmethod
    def from_json(cls, data: bytes) -> StoredHead:
        """The reverse of :meth:`to_json`."""
        fields: dict[str, Any] = orjson.loads(data)
        return cls(BatchHead.model_validate(fields), fields["secret"])


def names(batch_id: str) -> tuple[str, str, str, str, str]:
    """The keys of a batch, in the order in which its scripts take them."""
    return (
        keys.batch(batch_id),
        keys.batch_lines(batch_id),
        keys.batch_counted(batch_id),
        keys.batch_ended(batch_id),
        keys.batch_same(batch_id),
    )


async def run(store: Store, script: Script, batch_id: str, *args: bytes | str | float) -> Any:
    """One script on one batch."""
    given = [arg if isinstance(arg, bytes) else str(arg) for arg in args]
    return (await run_all(store, script, [(names(batch_id), given)]))[0]


async def count(store: Store, batch_id: str, lines: Sequence[bytes]) -> tuple[int, str]:
    """Count lines that ended, each once however often it is told; see :mod:`promptmill.batch.ends`.

    Answers how many of them, with those equal to them, were not counted yet, and the batch's state.
    """
    new, state = 0, ""
    for start in range(0, len(lines), COUNT_MAX):
        reply = await run(store, scripts.COUNT, batch_id, *lines[start : start + COUNT_MAX])
        new, state = new + int(reply[0]), reply[1].decode()
    return new, state


async def read_head(store: Store, batch_id: str) -> StoredHead:
    """What never changes of a batch. Raises NotFound."""
    with store_errors(store.address):
        raw: bytes | None = await store.wire.call("HGET", keys.batch(batch_id), "head")
    if raw is None:
        raise no_batch(batch_id)
    return StoredHead.from_json(raw)


async def read_chunks(store: Store, batch_id: str, numbers: Sequence[int]) -> list[list[BatchLine]]:
    """The lines of some chunks; none where there is no such chunk."""
    with store_errors(store.address):
        rows: list[bytes | None] = await store.wire.call("HMGET", keys.batch_lines(batch_id), *numbers)
    return [unpack(raw) if raw else [] for raw in rows]


async def read_lines(store: Store, batch_id: str, chunk_lines: int, indexes: Iterable[int]) -> dict[int, BatchLine]:
    """Some lines by their index, without those that are not there. Reads a few chunks at a time."""
    wanted: dict[int, list[int]] = {}
    for index in indexes:
        wanted.setdefault(index // chunk_lines, []).append(index)
    found: dict[int, BatchLine] = {}
    chunks = sorted(wanted)
    for start in range(0, len(chunks), CHUNKS_AT_ONCE):
        part = chunks[start : start + CHUNKS_AT_ONCE]
        for chunk, lines in zip(part, await read_chunks(store, batch_id, part), strict=True):
            for index in wanted[chunk]:
                place = index - chunk * chunk_lines
                if 0 <= place < len(lines):
                    found[index] = lines[place]
    return found


def read_entry(row: bytes) -> tuple[int, int | None]:
    """An entry of the list of ended lines: the line's index, and that of the equal line whose job it shares."""
    index, _, first = row.partition(b":")
    return int(index), int(first) if first else None


def read_status(batch_id: str, row: dict[bytes, bytes]) -> BatchStatus:
    """A batch from all fields of its hash. Raises NotFound where it has none."""
    fields = {name.decode(): value for name, value in row.items()}
    if "head" not in fields:
        raise no_batch(batch_id)
    head = StoredHead.from_json(fields["head"]).head

    def number(name: str) -> int:
        return int(fields.get(name, 0))

    def counted(kind: str) -> dict[str, int]:
        own = {name[len(kind) :]: int(value) for name, value in fields.items() if name.startswith(kind)}
        return dict(sorted(own.items(), key=lambda item: -item[1]))

    return BatchStatus(
        id=batch_id,
        state=_state(fields["state"]),
        user=head.user,
        name=head.name,
        total=number("total") if "total" in fields else None,
        chunk_lines=head.chunk_lines,
        uploaded_chunks=-(-number("lines") // head.chunk_lines),
        uploaded_lines=number("lines"),
        fed=number("fed"),
        succeeded=number("succeeded"),
        failed=number("failed"),
        cancelled=number("cancelled"),
        expired=number("expired"),
        usage=Usage(
            input_tokens=number("input_tokens"),
            output_tokens=number("output_tokens"),
            cache_read_tokens=number("cache_read_tokens"),
            cache_write_tokens=number("cache_write_tokens"),
            estimated=number("estimated") > 0,
        ),
        cost_usd=number("cost_nano") / NANO,
        unpriced=number("unpriced"),
        failures=counted("code:"),
        models=counted("model:"),
        retry_of=head.retry_of,
        created_at=at(number("created")) or datetime.now(UTC),
        ended_at=at(number("ended")) if "ended" in fields else None,
        expires_at=at(number("deadline")),
        options=head.options,
    )


def _state(raw: bytes) -> Any:
    # Checked by the model; a state that only a newer version knows must not pass for another.
    return raw.decode()


def no_batch(batch_id: str) -> NotFound:
    """There is no such batch."""
    return NotFound(f"there is no batch {batch_id}", field="id")


def tell(news: Literal[b"batch", b"ready"]) -> Command:
    """The command by which feeder and workers hear at once that there is something for them."""
    return ("PUBLISH", keys.FEED, news)
