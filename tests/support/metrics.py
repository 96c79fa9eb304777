"""Figures of a process of ours, read as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.support.processes import PATIENCE_S


class Figures:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families: dict[str, Metric] = {f.name: f for f in text_string_to_metric_families(text)}

    def __iter__(self) -> Iterator[tuple[str, dict[str, str], float]]:
        for family in self.families.values():
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels; 0 where there is none. ``name`` without ``promptmill_``."""
        wanted = labels.items()
        return sum(v for n, found, v in self if n == f"promptmill_{name}" and wanted <= found.items())


async def scrape(port: int) -> Figures:
    """What the process at ``port`` tells now."""
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as http:
        answer = await http.get(f"http://127.0.0.1:{port}/metrics")
    assert answer.status_code == 200
    return Figures(answer.text)
