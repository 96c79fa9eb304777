"""The arithmetic from a load to cores, processes and memory."""

from __future__ import annotations

import pytest
from ops.bench.sizing import LOAD, Figures, size

FIGURES = Figures(
    worker_token_us=100,
    relay_token_us=50,
    redis_token_us=20,
    job_worker_us=0,
    job_relay_us=0,
    job_redis_us=0,
    worker_base=1000,
    worker_stream=10,
    relay_base=500,
    relay_reader=1,
    redis_running=7,
    redis_log_token=2,
    redis_finished=3,
    redis_reader=1,
)


def test_cores_are_tokens_times_what_each_costs() -> None:
    need = size(FIGURES, 600, 10)
    assert (need.worker_cores, need.relay_cores, need.redis_cores) == pytest.approx((0.6, 0.3, 0.12))
    assert (need.workers, need.relays, need.redis_nodes) == (1, 1, 1)
    assert need.worker_cores / need.workers <= LOAD


def test_a_job_costs_beside_its_tokens() -> None:
    cheap = size(FIGURES, 100, 10, tokens_per_job=1000)
    dear = size(Figures(**{**_fields(), "job_redis_us": 1_000_000}), 100, 10, tokens_per_job=1000)
    assert dear.redis_cores - cheap.redis_cores == pytest.approx(1.0), "one job a second"
    assert dear.redis_nodes == 2


def test_slow_streams_need_workers_for_their_number() -> None:
    assert size(FIGURES, 3001, 0.1).workers == 4


def test_memory_is_what_runs_and_what_is_kept() -> None:
    need = size(FIGURES, 100, 10, tokens_per_job=100, kept_s=50)
    running, kept = 100 * (7 + 100 + 1), 10 * (50 * 3 + 60 * 200)
    assert need.redis_bytes == pytest.approx(running + kept)
    assert need.worker_bytes == 1000 + 1000
    assert need.relay_bytes == 500 + 100


@pytest.mark.parametrize(("streams", "speed", "tokens"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_a_load_that_is_none_is_refused(streams: int, speed: float, tokens: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        size(FIGURES, streams, speed, tokens_per_job=tokens)


def _fields() -> dict[str, float]:
    return {name: getattr(FIGURES, name) for name in FIGURES.__dataclass_fields__}
