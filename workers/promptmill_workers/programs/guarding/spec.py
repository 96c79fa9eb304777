"""What a guard is asked to run, and how that travels from the worker to it."""

from __future__ import annotations

import marshal

TYPE_CHECKING = False  # importing typing would cost as much as all the rest
if TYPE_CHECKING:
    from typing import Self

LENGTH_BYTES = 8


class Spec:
    """One program. ``targets`` are the descriptor numbers that it has, for each descriptor that comes along, in order.

    ``run`` is the token of the run, ``directory`` the job's, ``work`` the program's working directory.
    """

    def __init__(
        self,
        *,
        run: str,
        level: str,
        command: list[str],
        environment: dict[str, str],
        directory: str,
        work: str,
        targets: list[int],
        grace_s: float,
        run_s: float,
        memory_bytes: int | None,
        open_files: int,
    ) -> None:
        self.run = run
        self.level = level
        self.command = command
        self.environment = environment
        self.directory = directory
        self.work = work
        self.targets = targets
        self.grace_s = grace_s
        self.run_s = run_s
        self.memory_bytes = memory_bytes
        self.open_files = open_files

    def pack(self) -> bytes:
        """Its length in ``LENGTH_BYTES``, big end first, then all fields. Raises ValueError for no plain value."""
        text = marshal.dumps(self.__dict__)
        return len(text).to_bytes(LENGTH_BYTES, "big") + text

    @classmethod
    def unpack(cls, text: bytes) -> Self:
        """From what followed the length. Both ends are the same interpreter, and the writer is our own worker."""
        return cls(**marshal.loads(text))  # noqa: S302
