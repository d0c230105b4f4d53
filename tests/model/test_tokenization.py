"""Samples to token ids: as TRL and the model's own template would, and never a text half lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_tokenizer

from rayreward import ModelError
from rayreward.tokenization import Tokenizer, load_tokenizer, padding_id, truncate
from rayreward.types import Conversation, Failure, Status, Text, TokenIds, Tokens


def tokenizer(max_length: int | None = None, truncation: str = "error-row", **how: bool) -> Any:
    return Tokenizer(make_tokenizer(**how), max_length=max_length, truncation=truncation)


def ids(outcome: Tokens | Failure) -> list[int]:
    assert isinstance(outcome, Tokens)
    return list(outcome.ids)


def test_plain_text_gets_eos_where_absent() -> None:
    ours = tokenizer()
    with_eos, without = ours.encode([Text("a ", "b</s>"), Text("a ", "b")])
    assert ids(with_eos) == ids(without) == ours.hf("a b</s>")["input_ids"]


def test_plain_text_gets_the_tokenizers_special_tokens() -> None:
    ours = tokenizer(bos=True)
    assert ids(ours.encode([Text("", "hello")])[0])[0] == ours.hf.bos_token_id


def test_conversation_goes_through_the_models_template() -> None:
    ours = tokenizer(bos=True)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    expected = ours.hf.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ids(ours.encode([Conversation(messages)])[0]) == expected


WRITES = "{% for m in messages %}<{{ m.role }}>%s{% endfor %}"
TEXT_ALONE = {
    "as it is": "{{ m.content }}",
    "trimmed": "{{ m.content | trim }}",
    "left out": "{% if m.content is string %}{{ m.content }}{% endif %}",
    "added": "{{ '' + m.content }}",
}
"""What templates that know text alone do with a content, and so with a list of parts."""

PARTS = [{"type": "text", "text": " It's"}, {"type": "text", "text": "one.\n"}]
TALK = Conversation([{"role": "user", "content": PARTS}, {"role": "assistant", "content": "a"}])


@pytest.mark.parametrize("content", TEXT_ALONE.values(), ids=TEXT_ALONE)
def test_parts_are_one_text_for_a_template_that_knows_text_alone(content: str) -> None:
    ours = tokenizer()
    ours.hf.chat_template = WRITES.replace("%s", content)
    first, second = TALK.messages
    joined = Conversation([{**first, "content": " It's\none.\n"}, second])
    assert ids(ours.encode([TALK])[0]) == ids(ours.encode([joined])[0])


def test_parts_are_left_to_a_template_that_knows_them() -> None:
    ours = tokenizer()
    part = "{% for p in m.content %}[{{ p.text | trim }}]{% endfor %}"
    content = "{% if m.content is string %}{{ m.content }}{% else %}" + part + "{% endif %}"
    ours.hf.chat_template = WRITES.replace("%s", content)
    expected = ours.hf("<user>[It's][one.]<assistant>a")["input_ids"]
    assert ids(ours.encode([TALK])[0]) == expected


@pytest.mark.parametrize("part", [{"type": "thinking", "thinking": "well"}, "a text", None])
def test_parts_that_a_template_does_not_know_are_malformed(part: Any) -> None:
    [failure] = tokenizer().encode([Conversation([{"role": "user", "content": [part]}])])
    assert failure == Failure(Status.MALFORMED, "the chat template leaves out parts of a content")


@pytest.mark.parametrize("token", [-1, 10**9, 2.5, "2", None])
def test_ids_that_are_none_of_the_tokenizers_are_malformed(token: Any) -> None:
    fine, failure = tokenizer().encode([TokenIds((5, np.int64(7))), TokenIds((5, token))])
    assert ids(fine) == [5, 7]
    assert isinstance(failure, Failure)
    assert failure.status is Status.MALFORMED
    assert f"token {token} is none of the tokenizer's" in failure.detail


def test_samples_are_encoded_alone_as_in_a_crowd() -> None:
    samples = [
        Text("", "one"),
        Conversation([{"role": "user", "content": "two"}]),
        Text("three ", "four"),
        Failure(Status.MALFORMED, "five"),
    ]
    ours = tokenizer()
    assert ours.encode(samples) == [ours.encode([sample])[0] for sample in samples]


def test_exact_duplicates_are_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tokenizer()
    expected = ours.encode([Text("", "a")]) + ours.encode([Text("", "b")])
    given: list[str] = []
    tokenize = type(ours.hf).__call__

    def counted(hf: Any, texts: list[str], **how: Any) -> Any:
        given.extend(texts)
        return tokenize(hf, texts, **how)

    monkeypatch.setattr(type(ours.hf), "__call__", counted)
    assert (
        ours.encode([Text("", "a"), Text("", "b"), Text("", "a</s>")] * 5)
        == [
            *expected,
            expected[0],
        ]
        * 5
    )
    assert given == ["a</s>", "b</s>"]


def test_a_text_that_reads_like_a_conversation_is_none() -> None:
    """The tokenizer's special tokens are put around the one and not around the other."""
    ours = tokenizer(bos=True)
    talk = Conversation([{"role": "user", "content": "hi"}])
    text = Text("", ours.hf.apply_chat_template(list(talk.messages), tokenize=False) + "</s>")
    ours.hf.chat_template += "</s>"
    as_text, as_talk = ours.encode([text, talk])
    assert ids(as_text) == [ours.hf.bos_token_id, *ids(as_talk)]


def test_conversation_without_a_template_is_an_error() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        tokenizer(chat=False).encode([Conversation([{"role": "user", "content": "hi"}])])


def test_conversation_that_the_template_refuses_is_malformed() -> None:
    [outcome] = tokenizer().encode([Conversation([{"role": "wizard", "content": "hi"}])])
    assert isinstance(outcome, Failure)
    assert outcome.status is Status.MALFORMED
    assert "unknown role wizard" in outcome.detail


def test_text_that_is_not_unicode_is_malformed() -> None:
    [outcome] = tokenizer().encode([Text("", "\ud800")])
    assert isinstance(outcome, Failure)
    assert outcome.status is Status.MALFORMED


def test_longer_text_fails_with_its_length() -> None:
    [outcome] = tokenizer(max_length=3).encode([Text("", "a long text about the weather")])
    assert isinstance(outcome, Failure)
    assert outcome.status is Status.TOO_LONG
    assert outcome.tokens is not None
    assert outcome.tokens > 3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [True, False])
def test_truncation_equals_the_tokenizers_own(side: str, bos: bool) -> None:
    ours = tokenizer(max_length=6, truncation=side, bos=bos)
    text = "What is the best answer to a question about the weather?</s>"
    [outcome] = ours.encode([Text("", text)])
    ours.hf.truncation_side = side
    assert ids(outcome) == ours.hf(text, truncation=True, max_length=6)["input_ids"]
    assert isinstance(outcome, Tokens)
    assert outcome.truncated


def test_truncate_keeps_special_tokens_on_both_ends() -> None:
    ids, special = [101, 1, 2, 3, 4, 102], [1, 0, 0, 0, 0, 1]
    assert truncate(ids, special, 4, "right") == [101, 1, 2, 102]
    assert truncate(ids, special, 4, "left") == [101, 3, 4, 102]


def test_padding_id_prefers_the_callers_then_the_configs_then_the_tokenizers() -> None:
    hf = make_tokenizer()
    assert padding_id(hf, 5, "</s>") == 2
    assert padding_id(hf, 5, None) == 5
    assert padding_id(hf, None, None) == 0
    assert padding_id(hf, -1, None) == 0


def test_padding_id_missing_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ModelError, match=r"--pad-token.*'</s>'"):
        padding_id(make_tokenizer(pad=False), None, None)


def test_padding_id_out_of_the_vocabulary_is_an_error() -> None:
    with pytest.raises(ModelError, match="not in the tokenizer's vocabulary"):
        padding_id(make_tokenizer(), None, "<nonesuch>")


def test_load_tokenizer_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer in .* can't be loaded"):
        load_tokenizer(tmp_path)
