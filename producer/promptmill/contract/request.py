"""What a producer asks for."""

from __future__ import annotations

import base64
import binascii
import json
import math
from typing import Annotated, Any, Final, Literal, Self, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from promptmill.contract.limits import Limits
from promptmill.errors import BadRequest
from promptmill.text import clean_text

Priority = Literal["interactive", "batch"]

METADATA_DEPTH: Final = 64
"""How deep ``metadata`` may be nested, itself counted."""


def _clean(value: Any) -> Any:
    return clean_text(value) if isinstance(value, str) else value


def _storable(value: Any, depth: int = 1) -> Any:
    """JSON with every string cleaned, keys too: one lone surrogate would make the record unwritable.

    So would an integer beyond 64 bits. Deep nesting would exhaust the stack of whoever walks it, and NaN would silently
    become null. All three are refused.
    """
    if isinstance(value, dict | list) and depth > METADATA_DEPTH:
        raise ValueError(f"nested more than {METADATA_DEPTH} levels deep")
    if isinstance(value, dict):
        return {_clean(k): _storable(v, depth + 1) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list):
        return [_storable(v, depth + 1) for v in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("an integer beyond 64 bits, signed")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return _clean(value)


Text = Annotated[str, BeforeValidator(_clean)]
"""Text without lone surrogates: they are joined or replaced when the request is read."""

Name = Annotated[str, BeforeValidator(_clean), Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
"""A short name without control characters."""

Seconds = Annotated[float, Field(gt=0, le=30 * 24 * 3600, allow_inf_nan=False)]


class _Strict(BaseModel):
    # A misspelt field is an error: silently ignoring `max_token` would cost money.
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Part(_Strict):
    @model_serializer(mode="wrap")
    def _with_type(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Readers tell parts apart by their type; without defaults, as a request is stored, it would be left out.
        return {"type": type(self).model_fields["type"].default, **write(self)}


class TextPart(_Part):
    """A piece of text in a message."""

    type: Literal["text"] = "text"
    text: Text


class ImagePart(_Part):
    """A picture: ``data`` (base64, with its ``media_type``) or ``url``, exactly one of them."""

    type: Literal["image"] = "image"
    media_type: Literal["image/png", "image/jpeg", "image/gif", "image/webp"] | None = None
    data: str | None = None
    url: Annotated[str, Field(pattern=r"^https?://\S+$", max_length=4096)] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.data is None) == (self.url is None):
            raise ValueError("an image needs either data or url")
        if self.data is not None:
            if self.media_type is None:
                raise ValueError("an image with data needs its media_type")
            try:
                base64.b64decode(self.data, validate=True)
            except (binascii.Error, ValueError) as err:
                raise ValueError("image data is not base64") from err
        return self

    @property
    def size_bytes(self) -> int:
        """The decoded picture's size; 0 for a picture named by URL."""
        return len(self.data) * 3 // 4 if self.data else 0


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = str | list[Part]


class Message(_Strict):
    """One turn of the conversation."""

    role: Literal["user", "assistant"]
    content: Annotated[
        Annotated[Text, Field(min_length=1), Tag("text")] | Annotated[list[Part], Field(min_length=1), Tag("parts")],
        # Chosen by form, so that an error names one branch and not all of them.
        Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
    ]

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content as parts, whichever form it came in."""
        return [TextPart(text=self.content)] if isinstance(self.content, str) else list(self.content)

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(p.text for p in self.parts if isinstance(p, TextPart))


class Timeouts(_Strict):
    """Bounds in seconds, each with its own error code; None leaves it to the model's configuration.

    ``queue_s``: expires unstarted (``expired``); ``connect_s``, ``first_token_s``, ``idle_s`` (between tokens) and
    ``total_s`` (one attempt) end an attempt as ``timeout_connect`` … ``timeout_total``.
    """

    queue_s: Seconds | None = None
    connect_s: Seconds | None = None
    first_token_s: Seconds | None = None
    idle_s: Seconds | None = None
    total_s: Seconds | None = None

    def over(self, defaults: Timeouts) -> Timeouts:
        """These bounds, with ``defaults`` where one is not set."""
        if not self.model_fields_set:
            return defaults
        return Timeouts(**{**defaults.model_dump(exclude_none=True), **self.model_dump(exclude_none=True)})


class ResponseFormat(_Strict):
    """What form the answer must have: any JSON object, or JSON that a schema describes.

    ``json_schema`` is a JSON Schema (draft 2020-12). OpenAI's form, with ``{"name": …, "schema": {…}}`` there, is
    understood too. The worker hands it to the provider and checks the answer against it.
    """

    type: Literal["json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "answer"
    json_schema: Annotated[dict[str, JsonValue], BeforeValidator(_storable)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _openai_form(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = cast("dict[str, Any]", data)
        given = fields.get("json_schema")
        if not isinstance(given, dict):
            return fields
        named = cast("dict[str, Any]", given)
        if not isinstance(named.get("schema"), dict) or named.keys() - {"name", "schema", "strict", "description"}:
            return fields  # a schema, perhaps of something that has a "schema" itself
        return {**fields, "name": named.get("name", "answer"), "json_schema": named["schema"]}

    @model_validator(mode="after")
    def _schema_where_needed(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given with the type json_schema, and only with it")
        return self


class JobRequest(_Strict):
    """A completion to run. Give ``prompt`` or ``messages``; ``prompt`` becomes one user message.

    ``model`` names an entry of the registry; ``role`` (with an optional ``slot``) lets the configuration choose; with
    neither the default model answers. A leading message of role ``system`` becomes ``system``.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    system: Text | None = None
    model: Name | None = None
    role: Name | None = None
    slot: Name | None = None
    exclude: list[Name] | None = None
    """Models, or types of backends, that must not answer."""
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    stop: list[Annotated[Text, Field(min_length=1, max_length=1000)]] | None = None
    response_format: ResponseFormat | None = None
    user: Name = "default"
    metadata: Annotated[dict[Name, JsonValue], BeforeValidator(_storable)] = Field(default_factory=dict)
    priority: Priority = "interactive"
    timeouts: Timeouts = Timeouts()
    idempotency_key: Name | None = None
    cache: bool = False
    """Take the answer that is kept of the same request of the same user to the same model, and keep this one's."""
    cancel_on_disconnect: bool = False
    """Cancel it where its last reader over a gateway leaves and nobody comes back within ``disconnect_grace_s``."""

    @model_validator(mode="before")
    @classmethod
    def _one_form(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        prompt = data.pop("prompt", None)
        messages = data.get("messages")
        if prompt is not None:
            if messages is not None:
                raise ValueError("give prompt or messages, not both")
            data["messages"] = [{"role": "user", "content": prompt}]
        elif messages is None:
            raise ValueError("give prompt or messages")
        elif isinstance(messages, list) and messages:
            first: Any = messages[0]  # pyright: ignore[reportUnknownVariableType]
            if isinstance(first, dict) and first.get("role") == "system":  # pyright: ignore[reportUnknownMemberType]
                if data.get("system") is not None:
                    raise ValueError("give system once: as a field or as the first message")
                data["system"], data["messages"] = first.get("content"), messages[1:]  # pyright: ignore[reportUnknownMemberType]
        return data  # pyright: ignore[reportUnknownVariableType]

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model and self.slot:
            raise ValueError("give model or slot, not both: a slot belongs to a role")
        if self.model and self.role and self.model != "local":
            raise ValueError("give model or role, not both: a role chooses its own model")
        if self.slot and not self.role:
            raise ValueError("slot needs role")
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        if not any(m.text.strip() or any(isinstance(p, ImagePart) for p in m.parts) for m in self.messages):
            raise ValueError("the prompt is empty")
        return self

    def check_limits(self, limits: Limits) -> None:
        """Raise ``too_large``, naming field and limit, where the request is out of bounds."""
        parts = [p for m in self.messages for p in m.parts]
        images = [p for p in parts if isinstance(p, ImagePart)]
        text_bytes = sum(len(p.text.encode()) for p in parts if isinstance(p, TextPart))
        text_bytes += len((self.system or "").encode())
        for field, size, limit in (
            ("messages", len(self.messages), limits.messages),
            ("messages.text", text_bytes, limits.text_bytes),
            ("messages.images", len(images), limits.images),
            ("messages.image", max((p.size_bytes for p in images), default=0), limits.image_bytes),
            ("metadata", len(json.dumps(self.metadata).encode()), limits.metadata_bytes),
            ("max_tokens", self.max_tokens or 0, limits.max_tokens),
            ("stop", len(self.stop or ()), limits.stop_sequences),
            (
                "response_format",
                len(self.response_format.model_dump_json().encode()) if self.response_format else 0,
                limits.response_format_bytes,
            ),
        ):
            if size > limit:
                raise BadRequest(f"{field} is {size}, the limit is {limit}", code="too_large", field=field, limit=limit)

    def to_json(self) -> bytes:
        """The canonical form that is stored and whose digest guards an idempotency key."""
        return self.model_dump_json(exclude_none=True, exclude_defaults=True).encode()


def parse_request(data: bytes | str | dict[str, Any] | JobRequest, limits: Limits | None = None) -> JobRequest:
    """A checked request from JSON, from a dict, or from a request built by hand.

    Raises
    ------
    BadRequest
        ``bad_request`` with ``field`` where the data is malformed (not UTF-8, not JSON, an unknown or wrong field), or
        ``too_large`` with ``field`` and ``limit``.
    """
    limits = limits or Limits()
    if isinstance(data, bytes | str):
        size = len(data) if isinstance(data, bytes) else len(data.encode("utf-8", "surrogatepass"))
        if size > limits.request_bytes:
            raise BadRequest(
                f"the request is {size} bytes, the limit is {limits.request_bytes}",
                code="too_large",
                field="request",
                limit=limits.request_bytes,
            )
        data = _decode(data)
    try:
        request = data if isinstance(data, JobRequest) else JobRequest.model_validate(data)
    except ValidationError as err:
        raise _bad_request(err) from None
    request.check_limits(limits)
    return request


def _decode(data: bytes | str) -> Any:
    try:
        # The standard library's parser keeps escaped lone surrogates, which are then cleaned; stricter ones refuse.
        value = json.loads(data.decode() if isinstance(data, bytes) else data)
    except UnicodeDecodeError as err:
        raise BadRequest(f"the request is not UTF-8 (byte {err.start})", field="request") from None
    except (ValueError, RecursionError) as err:
        raise BadRequest(f"the request is not JSON: {err}", field="request") from None
    if not isinstance(value, dict):
        raise BadRequest("the request must be a JSON object", field="request")
    return value  # pyright: ignore[reportUnknownVariableType]


def _bad_request(err: ValidationError) -> BadRequest:
    first = err.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "request"
    reason = "no such field" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    more = err.error_count() - 1
    message = f"{field}: {reason}" + (f" (and {more} more)" if more else "")
    return BadRequest(message, field=field)
