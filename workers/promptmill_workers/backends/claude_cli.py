"""The ``claude`` program (Claude Code), one process a call, as a model without tools.

How it is run, and why:

- The prompt goes to standard input as JSON, the system prompt and everything secret into files in the job's private
  home: ``ps`` and the program's environment show neither.
- ``--tools ""``, no settings of anybody's, no MCP servers, no memory files. ``CLAUDE_CODE_DISABLE_ATTACHMENTS``:
  without it a prompt with ``@/some/file`` is sent with that file's content, read with the worker's rights.
- Standard input stays open, so that the program waits to be ended: it exits without having written all that it said
  where its reader is slower than it is.
- No retries and no repetition without streaming: both would hide from the runner what went out.
- A system prompt file always, an empty one if need be: without it the program's own, for coding, is used.

Facts about the program: :mod:`.claude_stream` and https://code.claude.com/docs/en/env-vars.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final, Literal

from promptmill.contract import ImagePart, JobRequest
from promptmill.settings import ModelConfig
from promptmill_workers.backends.base import Call, Item
from promptmill_workers.backends.claude_login import Credential, Kind, Login
from promptmill_workers.backends.claude_stream import ClaudeDecoder
from promptmill_workers.backends.options import parse_options
from promptmill_workers.backends.program_lines import MARGIN_S, ProgramOptions, decoded, refuse
from promptmill_workers.backends.transcript import not_a_command, transcript
from promptmill_workers.programs import Sandbox, find_program, open_sandbox

_MAX_MS: Final = 2**31 - 1
_FLAGS: Final = (
    *("--print", "--input-format", "stream-json", "--output-format", "stream-json"),
    *("--verbose", "--include-partial-messages", "--no-session-persistence"),
    *("--tools", "", "--setting-sources", "", "--strict-mcp-config", "--disable-slash-commands"),
)
_ENVIRONMENT: Final = {
    "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",
    "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
    "CLAUDE_CODE_DISABLE_CLAUDE_MDS": "1",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1",
    "CLAUDE_CODE_MAX_RETRIES": "0",
    "DISABLE_AUTOUPDATER": "1",
    # At its start it would look for editors with `ps`, which inherits the key; not where it believes to run in one.
    # (Read in the program, 2.1.197.) Nor is it to connect to one, or to install anything there.
    "FORCE_CODE_TERMINAL": "1",
    "CLAUDE_CODE_AUTO_CONNECT_IDE": "0",
    "CLAUDE_CODE_IDE_SKIP_AUTO_INSTALL": "1",
}


class ClaudeOptions(ProgramOptions):
    """``options`` of a ``claude_cli`` model."""

    program: str = "claude"
    """The program's path, or its name on PATH."""
    credential: Kind | None = None
    """What it signs in with; None: ``api_key`` where a key is configured, else ``login``."""
    credentials_file: Path | None = None
    """Where the login is; None: ``~/.claude/.credentials.json``."""
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """How much the model thinks; None: the program's own choice."""


class ClaudeCli:
    """See the module. Holds nothing open."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        self._options = parse_options(ClaudeOptions, name, config)
        self._login = Login(name, config, self._options.credential, self._options.credentials_file)
        self._program = find_program(
            self._options.program,
            field=f"models.{name}.options.program",
            advice="npm install -g @anthropic-ai/claude-code",
        )
        self._model = config.model_name
        # The program appends /v1/messages.
        self._url = config.api_url.removesuffix("/v1") if config.api_url else None

    async def complete(self, call: Call) -> AsyncGenerator[Item, None]:
        """See :class:`~promptmill_workers.backends.base.Backend`."""
        extra = _extra_body(call.request)
        credential = self._login.read()
        decoder = ClaudeDecoder(secret=credential.secret, renewable=self._login.renewable)
        async with open_sandbox("claude") as box:
            running = box.run(
                self._command(box, call.request, credential, extra),
                environment=self._environment(call),
                stdin=_message(call.request, self._options),
                limits=self._options.limits(call),
                # At the end of its input the program exits, and what it has not yet got into a full pipe is lost.
                hold_stdin=True,
            )
            async with running as program, aclosing(decoded(program, decoder)) as items:
                async for item in items:
                    yield item

    async def aclose(self) -> None:
        """Nothing to close."""

    def login_fingerprint(self) -> str | None:
        """Changes when the login's file changes; None where the credential is not renewed by a file."""
        return self._login.fingerprint()

    def check_login(self) -> str:
        """What it would sign in with, in words. Raises BackendError ``auth`` or ``auth_expired``."""
        self._login.read()
        return self._login.kind.replace("_", " ")

    def _command(self, box: Sandbox, request: JobRequest, credential: Credential, extra: dict[str, Any]) -> list[str]:
        # The settings' `env` reaches the program only, where the process's own environment is shown by `ps e`.
        variables = {credential.variable: credential.secret}
        if extra:
            variables["CLAUDE_CODE_EXTRA_BODY"] = json.dumps(extra)
        settings = box.write("settings.json", json.dumps({"env": variables}))
        system = box.write("system.txt", request.system or "")
        command = [self._program, *_FLAGS, "--settings", str(settings), "--system-prompt-file", str(system)]
        if self._model:
            command += ["--model", self._model]
        if self._options.effort:
            command += ["--effort", self._options.effort]
        return command

    def _environment(self, call: Call) -> dict[str, str]:
        # The runner's bounds are to pass first, so that a job ends in their codes.
        patience_ms = str(min(int(((call.timeouts.total_s or 24 * 3600.0) + MARGIN_S) * 1000), _MAX_MS))
        environment = {
            **_ENVIRONMENT,
            "API_TIMEOUT_MS": patience_ms,
            "CLAUDE_STREAM_IDLE_TIMEOUT_MS": patience_ms,
        }
        if self._url:
            environment["ANTHROPIC_BASE_URL"] = self._url
        if call.request.max_tokens is not None:
            environment["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(call.request.max_tokens)
        if call.request.temperature is not None:
            # The API refuses a temperature beside thinking, which the program asks for by itself.
            environment["CLAUDE_CODE_DISABLE_THINKING"] = "1"
        return environment


def _extra_body(request: JobRequest) -> dict[str, Any]:
    """Fields that the program has no flag for; it merges them into its request as they are."""
    extra: dict[str, Any] = {}
    if request.temperature is not None:
        extra["temperature"] = request.temperature
    if request.stop:
        extra["stop_sequences"] = request.stop
    if request.response_format:
        if request.response_format.json_schema is None:
            raise refuse("response_format.type", "the Messages API knows no json_object; give a json_schema")
        # --json-schema would make a tool call of it, which does not stream.
        extra["output_config"] = {
            "format": {"type": "json_schema", "schema": request.response_format.json_schema},
        }
    return extra


def _message(request: JobRequest, options: ClaudeOptions) -> bytes:
    pieces = transcript(request, user_name=options.user_name, agent_name=options.agent_name)
    blocks = [_block(piece) for piece in pieces]
    message = {"type": "user", "message": {"role": "user", "content": blocks}}
    return json.dumps(message).encode() + b"\n"


def _block(piece: str | ImagePart) -> dict[str, Any]:
    if isinstance(piece, str):
        return {"type": "text", "text": not_a_command(piece)}
    if piece.url:
        return {"type": "image", "source": {"type": "url", "url": piece.url}}
    return {"type": "image", "source": {"type": "base64", "media_type": piece.media_type, "data": piece.data}}
