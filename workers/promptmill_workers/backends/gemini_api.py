"""Google's Gemini API, through its endpoint for OpenAI's chat completions.

Protocol: https://ai.google.dev/gemini-api/docs/openai. What differs from OpenAI's:

- Errors are Google's, often as a list: ``[{"error": {"code", "message", "status", "details"}}]``. The wait after a 429
  stands in the details (``RetryInfo``), a wrong key is a 400 with the reason ``API_KEY_INVALID``.
- The tokens of a model's thinking are in ``total_tokens`` and nowhere else; they are billed as output, so they count as
  output here.
- An answer that a filter held back ends with ``content_filter`` or ``content_filter: REASON``.
- There is no header with a request's id; the ``id`` in the stream is it.
- Images travel in the request (``data:`` addresses); Google fetches none from elsewhere.
"""

from __future__ import annotations

from typing import Final

from promptmill.contract import ImagePart, JobRequest
from promptmill.errors import BackendError, ConfigError
from promptmill.settings import ModelConfig
from promptmill_workers.backends.chat import ChatCompletions, ChatOptions
from promptmill_workers.backends.options import parse_options, with_default_key

DEFAULT_URL: Final = "https://generativelanguage.googleapis.com/v1beta/openai"
DEFAULT_KEY_ENV: Final = "GEMINI_API_KEY"
_MEDIA_TYPES: Final = ("image/png", "image/jpeg", "image/webp")
"""Of those that a request may have: https://ai.google.dev/gemini-api/docs/image-understanding."""


class GeminiOptions(ChatOptions):
    """``options`` of a ``gemini_api`` model."""


class GeminiApi(ChatCompletions):
    """See the module.

    The key is read at each call. Where none is configured it is ``GEMINI_API_KEY`` for Google's own address, and none
    for another ``api_url``.
    """

    def __init__(self, name: str, config: ModelConfig) -> None:
        options = parse_options(GeminiOptions, name, config)
        if not config.model_name:
            raise ConfigError(f"models.{name}: gemini_api needs model_name", field=f"models.{name}.model_name")
        super().__init__(
            name,
            with_default_key(config, DEFAULT_URL, DEFAULT_KEY_ENV),
            options,
            url=(config.api_url or DEFAULT_URL) + "/chat/completions",
            thinking_in_total=True,
        )

    def check(self, request: JobRequest) -> None:
        """Refuse images that Google would refuse, with what to do about it."""
        for at, message in enumerate(request.messages):
            for part in message.parts:
                if isinstance(part, ImagePart):
                    _check_image(part, f"messages.{at}.content")


def _check_image(image: ImagePart, field: str) -> None:
    if image.url:
        reason = "the Gemini API fetches no image by url: send it as data with its media_type"
    elif image.media_type not in _MEDIA_TYPES:
        reason = f"the Gemini API takes no {image.media_type}: send one of {', '.join(_MEDIA_TYPES)}"
    else:
        return
    raise BackendError(f"{field}: {reason}", code="bad_request", field=field)
