"""A table of 64-bit hashes in little memory: 16 bytes a slot, where a dict of Python's takes over 100."""

from __future__ import annotations

import hashlib
from array import array
from typing import Final

_FIRST_SLOTS: Final = 1 << 12


def hash_of(data: bytes) -> int:
    """64 bits of a hash, never 0. Among 100,000 different values the chance of two equal ones is 3 in 10 ** 10."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) or 1


def hash_of_id(line_id: str) -> int:
    """The same of a line's id. Ids of our own making may hold lone surrogates, which no caller's has."""
    return hash_of(line_id.encode(errors="surrogatepass"))


class HashTable:
    """Hashes and a number for each, which is never negative. The hashes are spread evenly already."""

    def __init__(self) -> None:
        self._count = 0
        self._keys = array("Q", bytes(8 * _FIRST_SLOTS))
        self._numbers = array("q", bytes(8 * _FIRST_SLOTS))

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: int) -> bool:
        return self._keys[self._slot(key)] == key

    def get(self, key: int) -> int | None:
        """The number of a hash; None where it is not there."""
        slot = self._slot(key)
        return self._numbers[slot] if self._keys[slot] == key else None

    def add(self, key: int, number: int) -> int | None:
        """Note a hash that is not there, and answer None; for one that is, answer its number."""
        slot = self._slot(key)
        if self._keys[slot] == key:
            return self._numbers[slot]
        if 3 * self._count >= 2 * len(self._keys):
            self._grow()
            slot = self._slot(key)
        self._keys[slot], self._numbers[slot] = key, number
        self._count += 1
        return None

    def _slot(self, key: int) -> int:
        keys = self._keys
        mask = len(keys) - 1
        slot = key & mask
        while keys[slot] and keys[slot] != key:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        keys, numbers = self._keys, self._numbers
        self._keys = array("Q", bytes(16 * len(keys)))
        self._numbers = array("q", bytes(16 * len(keys)))
        for key, number in zip(keys, numbers, strict=True):
            if key:
                slot = self._slot(key)
                self._keys[slot], self._numbers[slot] = key, number
