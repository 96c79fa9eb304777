"""Any server that speaks OpenAI's chat completions: Ollama, vLLM, llama.cpp, LM Studio, Open WebUI, OpenAI itself.

``host_type`` openai asks ``{api_url}/chat/completions``, openwebui asks ``{api_url}/api/chat/completions``. An answer
counts as complete with a ``finish_reason`` or with ``[DONE]``; without either it was ``cut``. A server that ignores
``stream`` and answers with one JSON object is understood: its text is taken whole. Reasoning that a server sends beside
the answer (``reasoning_content``) is not part of it and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field

from promptmill.errors import BackendError, ConfigError
from promptmill.settings import ModelConfig, read_secret
from promptmill_workers.backends.chat import ChatCompletions, ChatOptions
from promptmill_workers.backends.options import parse_options

_PATHS: Final = {"openai": "/chat/completions", "openwebui": "/api/chat/completions"}


class LocalOpenAIOptions(ChatOptions):
    """``options`` of a ``local_openai`` model."""

    headers_env: dict[str, str] = Field(default_factory=dict)
    """Further headers: name to the environment variable that holds the value, read at each call."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """OpenAI's reasoning models refuse ``max_tokens``; most local servers know nothing else."""
    include_usage: bool = True
    """Ask for ``stream_options.include_usage``; switch off for servers that refuse unknown fields."""
    strict_schema: bool = False
    """Ask for OpenAI's strict form of a ``response_format`` with a schema, which not every schema fits."""


class LocalOpenAI(ChatCompletions):
    """See the module."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        options = parse_options(LocalOpenAIOptions, name, config)
        if not config.api_url or not config.model_name:
            raise ConfigError(f"models.{name}: local_openai needs api_url and model_name", field=f"models.{name}")
        parts = urlsplit(config.api_url)
        path = parts.path.rstrip("/") + _PATHS[config.host_type]
        super().__init__(
            name,
            config,
            options,
            url=urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")),
            max_tokens_field=options.max_tokens_field,
            include_usage=options.include_usage,
            strict=options.strict_schema,
        )
        self._headers_env = options.headers_env

    def headers(self) -> Mapping[str, str]:
        """Those of ``headers_env``; raises ``auth`` where a variable is not set."""
        return {header: self._header(variable) for header, variable in self._headers_env.items()}

    def _header(self, variable: str) -> str:
        try:
            return read_secret(variable, None) or ""
        except ConfigError as err:
            raise BackendError(f"no header for the model {self._name}: {err.message}", code="auth") from None
