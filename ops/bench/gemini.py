"""``python -m ops.bench.gemini``: our adapter for the Gemini API beside google-genai, and beside httpx's own transport.

Each client runs alone in a fresh process against one provider simulator, in an order that alternates from round to
round: 100 streams of 200 tokens at 50 tokens/s each. Figures are medians; ratios are to the first line.

- **CPU a token**: user and system time of the client's process while the streams run, divided by the tokens that came.
- **Import**: CPU of importing the client and making it; **MB**: the anonymous pages that the process has more by then,
  and once all streams have run.

The clients: ``gemini_api`` as it is; the same with httpx's own transport in place of aiohttp's; ``google-genai``, which
takes aiohttp where that is installed, as it is with us, and the same over httpx2, which it takes elsewhere.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from ops.bench.procs import REPOSITORY, start_simulator
from ops.bench.report import machine, number, table
from ops.bench.stats import median, spread_percent

STREAMS = 100
TOKENS = 200
RATE = 50
MODEL = f"sim:tokens={TOKENS},rate={RATE},first=0.5"
CLIENTS = ("gemini_api", "gemini_api over httpx", "google-genai", "google-genai over httpx2")
Stream = Callable[[], AsyncIterator[str]]


def _ours(url: str, *, httpx_transport: bool) -> tuple[Stream, Callable[[], Any]]:
    from promptmill.settings import ModelConfig  # noqa: PLC0415 - importing is measured
    from promptmill_workers.backends.base import TextDelta  # noqa: PLC0415
    from promptmill_workers.backends.gemini_api import GeminiApi  # noqa: PLC0415
    from promptmill_workers.testing import call  # noqa: PLC0415

    config = ModelConfig(type="gemini_api", model_name=MODEL, api_url=url + "/v1beta/openai")
    backend = GeminiApi("model", config)
    asked = call("hello")
    if httpx_transport:
        import httpx  # noqa: PLC0415

        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        backend._transport = httpx.AsyncHTTPTransport(limits=limits)  # the one part that differs

    async def stream() -> AsyncIterator[str]:
        async for item in backend.complete(asked):
            if isinstance(item, TextDelta):
                yield item.text

    return stream, backend.aclose


def _googles(url: str, *, httpx2_transport: bool) -> tuple[Stream, Callable[[], Any]]:
    from google import genai  # noqa: PLC0415
    from google.genai import types  # noqa: PLC0415

    options = types.HttpOptions(base_url=url, api_version="v1beta")
    if httpx2_transport:
        import httpx2  # noqa: PLC0415

        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        options.httpx_async_client = httpx2.AsyncClient(limits=limits, trust_env=False, timeout=60)
    client = genai.Client(api_key="key", http_options=options)

    async def stream() -> AsyncIterator[str]:
        async for chunk in await client.aio.models.generate_content_stream(model=MODEL, contents="hello"):
            if chunk.text:
                yield chunk.text

    return stream, client.aio.aclose


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


async def _measure(name: str, url: str) -> dict[str, float]:
    """In the client's own process."""
    cpu, held = _cpu_s(), _anonymous_bytes()
    if name.startswith("gemini_api"):
        stream, close = _ours(url, httpx_transport=name.endswith("httpx"))
    else:
        stream, close = _googles(url, httpx2_transport=name.endswith("httpx2"))
    figures = {"import_cpu_ms": (_cpu_s() - cpu) * 1e3, "import_mb": (_anonymous_bytes() - held) / 1e6}

    async def read() -> int:
        return sum([len(text.split()) async for text in stream()])

    await read()  # what the first call imports and opens belongs to no token
    cpu = _cpu_s()
    counts = await asyncio.gather(*(read() for _ in range(STREAMS)))
    figures["cpu_us"] = (_cpu_s() - cpu) / sum(counts) * 1e6
    figures["memory_mb"] = (_anonymous_bytes() - held) / 1e6
    figures["lost"] = STREAMS * TOKENS - sum(counts)
    await close()
    return figures


def _run(name: str, url: str) -> dict[str, float]:
    command = [sys.executable, "-m", "ops.bench.gemini", "--client", name, "--url", url]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True, timeout=300)
    return json.loads(done.stdout)


def _report(results: dict[str, list[dict[str, float]]]) -> str:
    columns = ("cpu_us", "import_cpu_ms", "import_mb", "memory_mb")
    first = {column: median([figures[column] for figures in results[CLIENTS[0]]]) for column in columns}
    rows: list[list[str]] = []
    for name, rounds in results.items():
        row = [name, number(sum(figures["lost"] for figures in rounds))]
        for column in columns:
            value = median([figures[column] for figures in rounds])
            row += [number(value), f"{value / first[column]:.2f}"]
        rows.append([*row, number(spread_percent([figures["cpu_us"] for figures in rounds]))])
    header = ["client", "tokens lost"]
    for title in ("CPU µs a token", "import CPU ms", "import MB", "MB after all"):
        header += [title, "ratio"]
    rounds = len(results[CLIENTS[0]])
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    head = f"Measured {when}, {rounds} rounds of {STREAMS} streams x {TOKENS} tokens at {RATE} tokens/s.\n{machine()}"
    return f"{head}\n\n{table([*header, 'spread of CPU %'], rows)}"


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ops.bench.gemini", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds, in alternating order (3)")
    parser.add_argument("--client", choices=CLIENTS, help="measure this one here and print its figures as JSON")
    parser.add_argument("--url", help="with --client: the simulator's address")
    options = parser.parse_args()
    if options.client:
        import uvloop  # noqa: PLC0415 - as in a worker

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            print(json.dumps(runner.run(_measure(options.client, options.url))))
        return 0
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CLIENTS}
    with tempfile.TemporaryDirectory(prefix="promptmill-bench-") as directory:
        simulator, url = start_simulator(Path(directory))
        with simulator:
            for index in range(options.rounds):
                for name in CLIENTS if index % 2 == 0 else reversed(CLIENTS):
                    print(f"round {index + 1} of {options.rounds}, {name}", file=sys.stderr, flush=True)
                    results[name].append(_run(name, url))
    print(_report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
