"""Contents of messages that are lists of parts, which some chat templates know and some don't.

A template that knows text alone does not refuse a list. It writes it down as Python shows it, or
leaves it out, and the reward would be that of something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_MEDIA = re.compile(r"(input_)?(image|video|audio|file)")
"""How the types of parts begin that are no text, with transformers and OpenAI."""


def is_media(part: Any) -> bool:
    """Whether a part is an image, a video, sound or a file."""
    return bool(_MEDIA.match(str(part.get("type", ""))))


def knows_parts(messages: Iterable[Any], written: str) -> bool:
    """Whether a template knows the contents of messages, by what it has written of them."""
    contents = [message.get("content", "") for message in messages]
    listed = [content for content in contents if not isinstance(content, str)]
    texts = [part["text"] for content in listed for part in content if _is_text(part)]
    return not any(str(content) in written for content in listed) and all(
        text.strip() in written for text in texts
    )


def as_text(messages: Iterable[Any]) -> list[Any]:
    """Messages with contents of text parts put together as one text each."""
    return [
        {**message, "content": joined(message["content"])} if "content" in message else message
        for message in messages
    ]


def joined(content: Any) -> Any:
    """Text parts as one text, a line each; anything else as it is.

    Source: vLLM's chat_utils, where a template knows text alone.
    """
    if isinstance(content, str) or not all(_is_text(part) for part in content):
        return content
    return "\n".join(part["text"] for part in content)


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)
