"""A public tool for batches of prompts, Bespoke Curator, on the same lines; ``ops.bench.batch`` runs it.

Arguments: the provider's URL, the model, how many lines, how many at once. Prints what it took from the call to the
last answer, as JSON; its import is not counted. https://github.com/bespokelabsai/curator
"""

import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Ask for every line once."""
    url, model, lines, at_once = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    # Its tokenizer's table would be downloaded; litellm, which it needs anyway, brings the same one along.
    litellm = importlib.util.find_spec("litellm")
    tables = Path(litellm.origin or "").parent / "litellm_core_utils" / "tokenizers" if litellm else Path()
    os.environ.update(TELEMETRY_ENABLED="false", OPENAI_API_KEY="none", TIKTOKEN_CACHE_DIR=str(tables))
    from bespokelabs import curator  # noqa: PLC0415 - it reads the environment

    with tempfile.TemporaryDirectory() as directory:
        params = {
            "base_url": url,
            "max_concurrent_requests": at_once,
            "max_requests_per_minute": 10_000_000,
            "max_tokens_per_minute": 1_000_000_000,
        }
        llm = curator.LLM(model_name=model, backend="openai", backend_params=params)
        began, cpu = time.perf_counter(), time.process_time()
        answers = llm([f"say {index}" for index in range(lines)], working_dir=directory)
        wall_s = time.perf_counter() - began
        used = {"wall_s": wall_s, "cpu_s": time.process_time() - cpu, "answers": len(answers.dataset)}
        print(json.dumps(used))


if __name__ == "__main__":
    main()
