"""The ``gemini`` program (Gemini CLI), one process a call, as a model without tools.

How it is run, and why:

- The prompt goes to standard input; the system prompt, the settings and the key into files of the job: ``ps`` and the
  program's environment show none of them.
- The key's ``.env`` stands above the working directory. The program looks for one there and then further up, before it
  looks in its home: anybody's in the system's temporary directory could else give it another address or another key.
- Without boundary markers no ``GEMINI.md`` above the working directory is looked for.
- No extensions, tools or agents; ``maxAttempts`` 1, because the runner repeats; ``GEMINI_CLI_NO_RELAUNCH``, because the
  program else runs as a child of a wrapper that does not pass signals on.
- Its pipes are made blocking: Node's are not, and the program exits without waiting for what its reader has not taken.
  It prints the prompt too, so that a long one alone would be enough to lose the answer.
- What there is no flag for (``max_tokens``, ``temperature``, ``stop``, ``response_format``) stands in the settings'
  ``modelConfigs``.

Facts about the program: :mod:`.gemini_stream` and https://geminicli.com/docs/reference/configuration.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final, Literal

from promptmill.contract import ImagePart, JobRequest
from promptmill.errors import BackendError, ConfigError
from promptmill.settings import ModelConfig
from promptmill_workers.backends.base import Call, Item
from promptmill_workers.backends.gemini_stream import GeminiDecoder, GeminiTextDecoder
from promptmill_workers.backends.options import parse_options, secret_for_call, with_default_key
from promptmill_workers.backends.program_lines import ProgramOptions, decoded, refuse
from promptmill_workers.backends.transcript import not_a_command, transcript
from promptmill_workers.programs import Sandbox, find_program, open_sandbox

DEFAULT_URL: Final = "https://generativelanguage.googleapis.com"
DEFAULT_KEY_ENV: Final = "GEMINI_API_KEY"
NO_SYSTEM: Final = "You are a helpful assistant."
"""In place of the program's own system prompt, for coding, where the request has none."""
STDIN_BYTES: Final = 8 * 1024 * 1024
"""The program cuts a longer prompt there, with a note in its log."""
_BLOCKING: Final = """for (const stream of [process.stdout, process.stderr]) {
  const handle = stream._handle;
  if (handle && typeof handle.setBlocking === "function") handle.setBlocking(true);
}
"""
_KEY: Final = re.compile(r"[A-Za-z0-9._~+/=:-]+")  # nothing that a .env file gives a meaning


class GeminiOptions(ProgramOptions):
    """``options`` of a ``gemini_cli`` model."""

    program: str = "gemini"
    """The program's path, or its name on PATH."""
    output_format: Literal["stream-json", "text"] = "stream-json"
    """``text`` for versions that know no ``stream-json``."""


class GeminiCli:
    """See the module. Holds nothing open.

    The key is read at each call. Where none is configured, it is ``GEMINI_API_KEY`` for Google's own address, and none
    for another ``api_url``.
    """

    def __init__(self, name: str, config: ModelConfig) -> None:
        self._name = name
        self._options = parse_options(GeminiOptions, name, config)
        if not config.model_name:
            raise ConfigError(f"models.{name}: gemini_cli needs model_name", field=f"models.{name}.model_name")
        self._model = config.model_name
        self._config = with_default_key(config, DEFAULT_URL, DEFAULT_KEY_ENV)
        self._url = config.api_url or DEFAULT_URL
        self._program = find_program(
            self._options.program,
            field=f"models.{name}.options.program",
            advice="npm install -g @google/gemini-cli",
        )

    async def complete(self, call: Call) -> AsyncGenerator[Item, None]:
        """See :class:`~promptmill_workers.backends.base.Backend`."""
        request, options = call.request, self._options
        prompt = self._prompt(request)
        secret = self._secret()
        decoder = (
            GeminiDecoder(secret=secret, max_tokens=request.max_tokens)
            if options.output_format == "stream-json"
            else GeminiTextDecoder(secret=secret)
        )
        async with open_sandbox("gemini") as box:
            running = box.run(
                [self._program, "-m", self._model, "-e", "", "-o", options.output_format],
                environment=self._prepare(box, request, secret),
                stdin=prompt,
                limits=options.limits(call),
            )
            async with running as program, aclosing(decoded(program, decoder)) as items:
                async for item in items:
                    yield item

    async def aclose(self) -> None:
        """Nothing to close."""

    def check_login(self) -> str:
        """What it would sign in with, in words. Raises BackendError ``auth``."""
        self._secret()
        return "api key"

    def _secret(self) -> str:
        secret = secret_for_call(self._name, self._config)
        if secret is None:
            raise BackendError(f"no key for the model {self._name}: configure api_key_env or api_key_file", code="auth")
        if not _KEY.fullmatch(secret):
            raise BackendError(f"the key for the model {self._name} has characters that no key has", code="auth")
        return secret

    def _prompt(self, request: JobRequest) -> bytes:
        pieces = transcript(request, user_name=self._options.user_name, agent_name=self._options.agent_name)
        texts = [piece for piece in pieces if isinstance(piece, str)]
        if len(texts) < len(pieces) or any(isinstance(p, ImagePart) for m in request.messages for p in m.parts):
            raise refuse("messages", "the gemini program takes no pictures; use a gemini_api model")
        prompt = not_a_command("".join(texts)).encode()
        if len(prompt) > STDIN_BYTES:
            raise BackendError(
                f"the prompt is {len(prompt)} bytes, the gemini program takes {STDIN_BYTES}; use a gemini_api model",
                code="context_too_long",
                field="messages",
                limit=STDIN_BYTES,
            )
        return prompt

    def _prepare(self, box: Sandbox, request: JobRequest, secret: str) -> dict[str, str]:
        """Write the job's files; answers the environment."""
        box.write(".gemini/settings.json", json.dumps(self._settings(request)))
        dotenv = box.write(".gemini/.env", f"GEMINI_API_KEY={secret}\n")
        above = box.root / ".gemini"
        above.mkdir(mode=0o700)
        dotenv.rename(above / ".env")
        system = box.write("system.md", request.system or NO_SYSTEM)
        blocking = box.write("blocking.cjs", _BLOCKING)
        return {
            "GEMINI_CLI_NO_RELAUNCH": "true",
            "GEMINI_CLI_TRUST_WORKSPACE": "true",
            "GEMINI_SYSTEM_MD": str(system),
            "GOOGLE_GEMINI_BASE_URL": self._url,
            "NODE_OPTIONS": f'--require "{blocking}"',
            "NO_COLOR": "1",
        }

    def _settings(self, request: JobRequest) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "security": {"auth": {"selectedType": "gemini-api-key"}},
            "tools": {"core": []},
            "context": {"memoryBoundaryMarkers": [], "includeDirectoryTree": False},
            "general": {"maxAttempts": 1, "disableAutoUpdate": True, "enableAutoUpdate": False},
            "experimental": {"enableAgents": False},
            # A text that repeats itself (a table, a list) would be broken off, and called a success.
            "model": {"disableLoopDetection": True},
            "privacy": {"usageStatisticsEnabled": False},
        }
        if config := _generation(request):
            override = {"match": {"model": self._model}, "modelConfig": {"generateContentConfig": config}}
            settings["modelConfigs"] = {"customOverrides": [override]}
        return settings


def _generation(request: JobRequest) -> dict[str, Any]:
    """Fields of the API's ``generationConfig``: https://ai.google.dev/api/generate-content#generationconfig."""
    config: dict[str, Any] = {}
    if request.max_tokens is not None:
        config["maxOutputTokens"] = request.max_tokens
    if request.temperature is not None:
        config["temperature"] = request.temperature
    if request.stop:
        config["stopSequences"] = request.stop
    if request.response_format:
        config["responseMimeType"] = "application/json"
        if request.response_format.json_schema is not None:
            config["responseJsonSchema"] = request.response_format.json_schema
    return config
