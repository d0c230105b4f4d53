"""Samples to token ids: chat template, EOS, truncation, and an audit of each.

Plain text gets the EOS token where it is absent and the tokenizer's special tokens, as TRL's
RewardTrainer does. Conversations go through the model's own chat template, which writes its
special tokens itself. What is verbatim gets only what it asks for. Does not know models or Ray.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayreward.errors import ModelError
from rayreward.parts import as_text, knows_parts
from rayreward.types import Conversation, Failure, Sample, Status, Text, TokenIds, Tokens, Verbatim


class Tokenizer:
    """Turns samples into token ids, deterministically and independently of one another.

    Attributes:
        hf: The Hugging Face tokenizer.
        max_length: Longest text in tokens, or null for no limit.
    """

    def __init__(self, hf: Any, *, max_length: int | None, truncation: str) -> None:
        self.hf = hf
        self.max_length = max_length
        self._truncation = truncation
        self._eos = hf.eos_token or ""
        self._turn = threading.Lock()  # its settings are changed and changed back by each call

    def encode(self, samples: Sequence[Sample]) -> list[Tokens | Failure]:
        """Tokenizes samples, what is there more than once only once.

        Returns:
            For each sample its tokens, or why there are none.

        Raises:
            ModelError: There are conversations but the model has no chat template.
        """
        rendered = [(_special(sample), self._render(sample)) for sample in samples]
        encoded: dict[tuple[bool, str], Tokens | Failure] = {}
        for special in (True, False):
            texts = dict.fromkeys(
                text for added, text in rendered if added is special and isinstance(text, str)
            )
            encoded.update(
                ((special, text), tokens)
                for text, tokens in zip(texts, self._tokenize(list(texts), special), strict=True)
            )
        return [
            encoded[special, text] if isinstance(text, str) else text for special, text in rendered
        ]

    def _tokenize(self, texts: list[str], special: bool) -> list[Tokens | Failure]:
        if not texts:
            return []
        with self._turn:
            ids = self.hf(
                texts,
                add_special_tokens=special,
                return_special_tokens_mask=True,
                return_attention_mask=False,
                verbose=False,
            )
        return list(map(self._fit, ids["input_ids"], ids["special_tokens_mask"]))

    def _render(self, sample: Sample) -> str | Tokens | Failure:
        """The text to tokenize, if there is something to."""
        match sample:
            case Failure():
                return sample
            case TokenIds(ids):
                return self._take(ids)
        try:
            match sample:
                case Text(prompt, completion):
                    # as TRL 1.16 does, RewardTrainer._prepare_dataset, add_eos
                    text = prompt + self._with_eos(completion)
                case Verbatim(text, ensure_eos=True):
                    text = self._with_eos(text)
                case Verbatim(text):
                    pass
                case Conversation():
                    text = self._template(sample)
            text.encode()
        except UnicodeEncodeError as error:
            return Failure(Status.MALFORMED, f"the text can't be written as UTF-8: {error}")
        except _TemplateRefused as error:
            return Failure(Status.MALFORMED, str(error))
        return text

    def _with_eos(self, text: str) -> str:
        return text if text.endswith(self._eos) else text + self._eos

    def _take(self, ids: tuple[int, ...]) -> Tokens | Failure:
        """Token ids as they came."""
        known = range(len(self.hf))
        unknown = [token for token in ids if token not in known]
        if unknown:
            return Failure(
                Status.MALFORMED,
                f"token {unknown[0]} is none of the tokenizer's, which are 0 to {len(self.hf) - 1}",
            )
        return self._fit(list(map(int, ids)), [0] * len(ids))

    def _template(self, sample: Conversation) -> str:
        if not self.hf.chat_template:
            raise ModelError(
                "The rows are conversations, but the model's tokenizer has no chat template. Set "
                "tokenizer.chat_template and save it with the checkpoint, or pass plain text."
            )
        with contextlib.suppress(_TemplateRefused):  # as where a list is added to a text
            text = self._write(sample, sample.messages)
            if knows_parts(sample.messages, text):
                return text
        messages = as_text(sample.messages)
        text = self._write(sample, messages)
        if not knows_parts(messages, text):
            raise _TemplateRefused("the chat template leaves out parts of a content")
        return text

    def _write(self, sample: Conversation, messages: Sequence[Any]) -> str:
        try:
            text = self.hf.apply_chat_template(
                list(messages), tools=sample.tools, tokenize=False, **sample.template_kwargs
            )
        except Exception as error:  # templates raise whatever they like about a conversation
            raise _TemplateRefused(
                f"the chat template refused the conversation: {error}"
            ) from error
        return str(text)

    def _fit(self, ids: list[int], special: list[int]) -> Tokens | Failure:
        """Applies `max_length` to one text."""
        if not any(not mask for mask in special):
            return Failure(Status.EMPTY, "the text has no tokens")
        if self.max_length is None or len(ids) <= self.max_length:
            return Tokens(tuple(ids), len(ids))
        if self._truncation == "error-row":
            detail = f"{len(ids)} tokens are more than max_length={self.max_length}"
            return Failure(Status.TOO_LONG, detail, tokens=len(ids))
        return Tokens(tuple(truncate(ids, special, self.max_length, self._truncation)), len(ids))


def _special(sample: Sample) -> bool:
    """Whether the tokenizer adds its special tokens."""
    return isinstance(sample, Text) or (isinstance(sample, Verbatim) and sample.add_special_tokens)


class _TemplateRefused(ValueError):
    """The chat template raised an error."""


def truncate(ids: list[int], special: list[int], max_length: int, side: str) -> list[int]:
    """Cuts a text to `max_length` and keeps the special tokens that the tokenizer put around it.

    Args:
        ids: Token ids.
        special: 1 where the tokenizer added a token, 0 for the text's own.
        max_length: Tokens to keep.
        side: "left" drops the start of the text, "right" its end.
    """
    lead = next((at for at, mask in enumerate(special) if not mask), len(ids))
    tail = next((at for at, mask in enumerate(reversed(special)) if not mask), 0)
    room = max(max_length - lead - tail, 0)
    text = ids[lead : len(ids) - tail]
    kept = text[:room] if side == "right" else text[len(text) - room :]
    return [*ids[:lead], *kept, *ids[len(ids) - tail :]][:max_length]


def load_tokenizer(path: Path) -> Any:
    """Loads a checkpoint's tokenizer.

    Raises:
        ModelError: The directory holds none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # each tokenizer class fails in its own way
        raise ModelError(
            f"The tokenizer in {path} can't be loaded ({error}). Save it into the checkpoint's "
            "directory with tokenizer.save_pretrained."
        ) from error


def padding_id(hf: Any, configured: int | None, pad_token: str | None) -> int:
    """Settles which token is padding, and so which token a reward is read at.

    The caller's choice comes first, then the model's config, then the tokenizer.

    Args:
        hf: The tokenizer.
        configured: `pad_token_id` of the model's config.
        pad_token: The caller's choice.

    Raises:
        ModelError: There is none, or it is not in the vocabulary.
    """
    if pad_token is not None:
        if pad_token not in hf.get_vocab():
            raise ModelError(f"pad_token={pad_token!r} is not in the tokenizer's vocabulary.")
        return int(hf.convert_tokens_to_ids(pad_token))
    if configured is not None and configured >= 0:
        return configured
    if hf.pad_token_id is not None:
        return int(hf.pad_token_id)
    hint = f" TRL would take the EOS token: {hf.eos_token!r}." if hf.eos_token else ""
    raise ModelError(
        "The checkpoint names no padding token, which decides where a reward is read. Set "
        "tokenizer.pad_token and config.pad_token_id and save both, or pass pad_token=… "
        f"(--pad-token).{hint}"
    )
