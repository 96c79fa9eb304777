"""A conversation as one message, for programs that take a single prompt.

Earlier turns stand in a ``<conversation>`` block, each begun with its speaker's name; the last message follows as it
is. A request of one message is that message and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from promptmill.contract import ImagePart, JobRequest, Message

BEGIN: Final = "<conversation>\n"
END: Final = "</conversation>\n\n"
_CLOSING: Final = re.compile(r"</(?=\s*conversation)", re.IGNORECASE)


def transcript(request: JobRequest, *, user_name: str, agent_name: str) -> list[str | ImagePart]:
    """The request's messages as text and pictures in their order; no two texts stand side by side."""
    *earlier, last = request.messages
    pieces: list[str | ImagePart] = []
    if earlier:
        pieces.append(BEGIN)
        for message in earlier:
            pieces.append(f"{user_name if message.role == 'user' else agent_name}: ")
            pieces += map(_without_end, _content(message))
            pieces.append("\n\n")
        pieces.append(END)
    return _merged([*pieces, *_content(last)])


def _without_end(piece: str | ImagePart) -> str | ImagePart:
    """An earlier turn that quotes the closing tag would end the block and speak as the last message."""
    return _CLOSING.sub(r"<\\/", piece) if isinstance(piece, str) else piece


def not_a_command(text: str) -> str:
    """``text`` with a line break in front where it begins with ``/``: the programs take that for one of their commands.

    Their answer would then be the command's, and no model would be asked.
    """
    return "\n" + text if text.startswith("/") else text


def _content(message: Message) -> Iterable[str | ImagePart]:
    return (part if isinstance(part, ImagePart) else part.text for part in message.parts)


def _merged(pieces: Iterable[str | ImagePart]) -> list[str | ImagePart]:
    merged: list[str | ImagePart] = []
    texts: list[str] = []
    for piece in pieces:
        if isinstance(piece, str):
            texts.append(piece)
            continue
        if text := "".join(texts):
            merged.append(text)
        texts = []
        merged.append(piece)
    if text := "".join(texts):
        merged.append(text)
    return merged
