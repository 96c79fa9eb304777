"""Which messages count as sent to RabbitMQ: those that it confirmed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from kombu.exceptions import KombuError

from promptmill.enqueue import Confirms

Answer = tuple[str, int, bool]


class Channel:
    """What py-amqp's channel does with a broker's answers, and with their absence."""

    def __init__(self, *answers: Answer) -> None:
        self.events: dict[str, set[Callable[[int, bool], Any]]] = defaultdict(set)
        self.connection = self
        self.selected = False
        self._answers = list(answers)

    def confirm_select(self) -> None:
        self.selected = True

    def drain_events(self, timeout: float) -> None:
        assert timeout > 0
        if not self._answers:
            raise TimeoutError
        kind, tag, multiple = self._answers.pop(0)
        for told in self.events[kind]:
            told(tag, multiple)


def sent(count: int, *answers: Answer) -> Confirms:
    channel = Channel(*answers)
    confirms = Confirms(channel)
    assert channel.selected
    for _ in range(count):
        confirms.sent()
    return confirms


@pytest.mark.parametrize(
    "answers",
    [
        [("basic_ack", 1, False), ("basic_ack", 2, False), ("basic_ack", 3, False)],
        [("basic_ack", 3, False), ("basic_ack", 1, False), ("basic_ack", 2, False)],
        [("basic_ack", 3, True)],
        [("basic_ack", 2, True), ("basic_ack", 3, False)],
    ],
)
def test_all_are_sent_once_each_is_confirmed_in_whatever_order(answers: list[Answer]) -> None:
    sent(3, *answers).wait(10)


@pytest.mark.parametrize("answers", [[], [("basic_ack", 2, True)], [("basic_ack", 3, False)]])
def test_one_that_is_never_confirmed_is_not_sent(answers: list[Answer]) -> None:
    with pytest.raises(TimeoutError):
        sent(3, *answers).wait(0.01)


def test_one_that_is_refused_is_not_sent_and_the_next_ones_may_be() -> None:
    confirms = sent(2, ("basic_ack", 1, False), ("basic_nack", 2, False), ("basic_ack", 3, False))
    with pytest.raises(KombuError, match="refused"):
        confirms.wait(10)
    confirms.sent()
    confirms.wait(10)
