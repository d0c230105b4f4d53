"""serve: bodies, guards and replies, without a server."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from rayreward import ConfigError, ServeConfig
from rayreward.serve import check_free, check_reach
from rayreward.serve.dialects.base import NoReward
from rayreward.serve.dialects.inference import (
    AnyClassifyBody,
    ClassifyBody,
    ClassifyMessagesBody,
    EmbeddingsBody,
    SGLangBody,
)
from rayreward.serve.dialects.ours import RewardBody
from rayreward.serve.dialects.trainers import OpenRLHFBody, SlimeBody
from rayreward.serve.guard import Guard, digest
from rayreward.serve.replies import AsciiJSON, problem
from rayreward.types import (
    Conversation,
    Failure,
    Outcome,
    Reward,
    Status,
    Text,
    TokenIds,
    Verbatim,
    Version,
)

VERSION = Version(2, "m", "head", "body")
TALK = [{"role": "user", "content": "hi"}]
TOO_LONG = Failure(Status.TOO_LONG, "9 tokens are more than max_length=8", tokens=9)


def reward(value: float) -> Reward:
    return Reward(value, 3, False)


@pytest.mark.parametrize(
    ("body", "kind", "samples"),
    [
        ({"input": "a"}, ClassifyBody, [[Verbatim("a", add_special_tokens=True)]]),
        (
            {"model": "m", "input": ["a", "b"], "add_special_tokens": False},
            ClassifyBody,
            [[Verbatim("a")], [Verbatim("b")]],
        ),
        ({"input": [1, 2]}, ClassifyBody, [[TokenIds((1, 2))]]),
        ({"input": [[1, 2], [3]]}, ClassifyBody, [[TokenIds((1, 2))], [TokenIds((3,))]]),
        ({"input": []}, ClassifyBody, []),
        ({"messages": TALK}, ClassifyMessagesBody, [[Conversation(tuple(TALK))]]),
        ({"text": "a"}, SGLangBody, [[Verbatim("a", add_special_tokens=True)]]),
        ({"text": ["a"], "model": "m"}, SGLangBody, [[Verbatim("a", add_special_tokens=True)]]),
    ],
)
def test_classify_tells_dialects_apart_by_the_body(
    body: dict[str, Any], kind: type, samples: list[Any]
) -> None:
    read: Any = TypeAdapter(AnyClassifyBody).validate_python(body)
    assert type(read) is kind
    assert read.samples() == samples


@pytest.mark.parametrize(
    "body", [{"input": "a"}, {"messages": TALK}, {"text": "a"}], ids=["input", "messages", "text"]
)
def test_fields_that_would_change_the_reward_are_refused(body: dict[str, Any]) -> None:
    read: Any = TypeAdapter(AnyClassifyBody)
    read.validate_python({**body, "truncate_prompt_tokens": None, "user": "somebody"})
    for name in ("truncate_prompt_tokens", "chat_template_kwargs"):
        with pytest.raises(ValidationError, match=f"{name} is not supported"):
            read.validate_python({**body, name: 1})


def test_vllm_is_answered_with_the_sigmoid_unless_it_wants_none() -> None:
    groups = [[reward(2.0)], [reward(-800.0)]]
    plain = ClassifyBody(input=["a", "b"], use_activation=False).reply(groups, VERSION)
    assert [row["probs"] for row in plain["data"]] == [[2.0], [-800.0]]
    assert [row["index"] for row in plain["data"]] == [0, 1]
    assert plain["data"][0]["num_classes"] == 1
    assert plain["object"] == "list"
    assert plain["model"] == "m"
    assert plain["usage"]["prompt_tokens"] == 6
    activated = ClassifyBody(input=["a", "b"]).reply(groups, VERSION)
    assert activated["data"][0]["probs"] == [pytest.approx(1 / (1 + math.exp(-2)))]
    assert activated["data"][1]["probs"] == [0.0]


def test_sglang_openrlhf_and_slime_are_answered_in_their_ways() -> None:
    one, two = [[reward(1.5)]], [[reward(1.5)], [reward(2.5)]]
    assert SGLangBody(text="a").reply(one, VERSION)["embedding"] == [1.5]
    listed = SGLangBody(text=["a", "b"]).reply(two, VERSION)
    assert [row["embedding"] for row in listed] == [[1.5], [2.5]]
    assert listed[0]["meta_info"]["prompt_tokens"] == 3
    embedded = EmbeddingsBody(input="a", model="rm").reply(one, VERSION)
    assert embedded["data"] == [{"object": "embedding", "index": 0, "embedding": [1.5]}]
    assert embedded["model"] == "rm"
    encoded = EmbeddingsBody(input="a", encoding_format="base64").reply(one, VERSION)
    assert struct.unpack("<f", base64.b64decode(encoded["data"][0]["embedding"])) == (1.5,)
    asked = OpenRLHFBody(query=["a", "b"], prompts=["a", "b"], labels=["x", None])
    assert asked.samples() == [[Verbatim("a", ensure_eos=True)], [Verbatim("b", ensure_eos=True)]]
    answer = asked.reply(two, VERSION)
    assert answer == {"rewards": [1.5, 2.5], "scores": [1.5, 2.5], "extra_logs": {}}
    assert OpenRLHFBody(query=[]).reply([], VERSION)["rewards"] == []
    assert SlimeBody(prompt="a", response="b").samples() == [[Verbatim("ab", ensure_eos=True)]]
    assert SlimeBody(prompt="a", response="b", label=1).reply(one, VERSION) == 1.5


def test_our_own_dialect_has_groups_reasons_and_the_version() -> None:
    body = RewardBody.model_validate(
        {
            "items": [
                "a",
                TALK,
                {"prompt": "p", "completion": "c"},
                {"prompt": "p", "completions": ["x", "y"]},
                {"messages": TALK, "tools": None},
            ]
        }
    )
    talk = Conversation(tuple(TALK))
    groups = [[Text("", "a")], [talk], [Text("p", "c")], [Text("p", "x"), Text("p", "y")], [talk]]
    assert body.samples() == groups
    outcomes: list[list[Outcome]] = [[reward(float(n))] * len(g) for n, g in enumerate(groups)]
    outcomes[1] = [TOO_LONG]
    reply = body.reply(outcomes, VERSION).model_dump()
    assert reply["version"] == {"number": 2, "model": "m", "head": "head", "body": "body"}
    assert reply["rewards"][0]["reward"] == 0.0
    assert reply["rewards"][1] == {
        "reward": None,
        "status": "too_long",
        "detail": "9 tokens are more than max_length=8",
        "tokens": 9,
        "truncated": False,
    }
    assert [answer["reward"] for answer in reply["rewards"][3]["completions"]] == [3.0, 3.0]


@pytest.mark.parametrize(
    "items",
    [
        [{"prompt": "p"}],
        [{"prompt": "p", "completions": []}],
        [{"messages": TALK, "chat_template": "{{ 1 }}"}],
        [7],
        ["a"] * 1_025,
        None,
    ],
)
def test_our_own_dialect_refuses_what_it_does_not_know(items: Any) -> None:
    with pytest.raises(ValidationError):
        RewardBody.model_validate({"items": items})


@pytest.mark.parametrize(
    "body", [ClassifyBody(input=["a", "b"]), SGLangBody(text=["a", "b"]), OpenRLHFBody(query=["a"])]
)
def test_dialects_of_numbers_name_the_row_without_a_reward(body: Any) -> None:
    with pytest.raises(NoReward) as caught:
        body.reply([[reward(1.0)], [TOO_LONG]], VERSION)
    assert caught.value.row == 1


def test_replies_escape_what_utf8_can_not_hold() -> None:
    assert json.loads(problem(422, "half a pair: \ud800", row=3).body) == {
        "error": {"code": 422, "message": "half a pair: \ud800", "row": 3}
    }
    with pytest.raises(ValueError, match="JSON"):
        AsciiJSON({"reward": math.nan})


async def _ask(
    guard: Guard, path: str, headers: Mapping[str, str], chunks: list[bytes]
) -> tuple[int, Any]:
    """What a client sees: the status, and the body's JSON."""
    sent: list[Any] = []
    left = [
        {"type": "http.request", "body": chunk, "more_body": n < len(chunks)}
        for n, chunk in enumerate(chunks, 1)
    ]

    async def receive() -> Any:
        return left.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "method": "POST", "headers": pairs}
    await guard(scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"] or b"null")


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    read = b""
    more = True
    while more:
        message = await receive()
        read, more = read + message["body"], message["more_body"]
    await AsciiJSON(len(read))(scope, receive, send)


def test_guard_asks_for_the_token_except_for_health() -> None:
    guard = Guard(_echo, token=digest("secret"), max_bytes=10)

    def status(path: str, **headers: str) -> int:
        return asyncio.run(_ask(guard, path, headers, [b"x"]))[0]

    assert status("/reward", authorization="Bearer secret") == 200
    for wrong in ("Bearer secre", "Bearer secrets", "secret2", "", "Bearer é"):
        assert status("/reward", authorization=wrong) == 401
    assert status("/metrics") == 401
    assert status("/docs") == 401
    assert status("/health") == 200
    assert b"secret" not in repr(vars(guard)).encode()


def test_guard_refuses_bodies_that_are_too_large_whatever_they_claim() -> None:
    from starlette.exceptions import HTTPException

    guard = Guard(_echo, token=None, max_bytes=10)
    assert asyncio.run(_ask(guard, "/reward", {"content-length": "10"}, [b"0123456789"]))[1] == 10
    status, reply = asyncio.run(_ask(guard, "/reward", {"content-length": "11"}, []))
    assert status == 413
    assert "--max-body-mb" in reply["error"]["message"]
    with pytest.raises(HTTPException) as caught:  # chunks that claim nothing
        asyncio.run(_ask(guard, "/reward", {}, [b"012345", b"678901", b""]))
    assert caught.value.status_code == 413


def test_guard_waits_for_a_body_no_longer_than_it_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from starlette.exceptions import HTTPException

    from rayreward.serve import guard as module

    monkeypatch.setattr(module, "_BODY_S", 0.01)

    async def never() -> Any:
        await asyncio.Event().wait()

    async def ask() -> None:
        scope = {"type": "http", "path": "/reward", "headers": []}
        await Guard(_echo, token=None, max_bytes=10)(scope, never, None)

    with pytest.raises(HTTPException) as caught:
        asyncio.run(ask())
    assert caught.value.status_code == 408


def test_port_that_somebody_shares_is_refused() -> None:
    """Ray Serve sets SO_REUSEPORT: two servers would each answer some of the requests."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        config = ServeConfig(port=other.getsockname()[1])
        with pytest.raises(ConfigError, match="pass another --port"):
            check_free(config)
    check_free(config)


def test_server_that_others_can_reach_needs_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAYREWARD_TOKEN", raising=False)
    for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"):
        check_reach(ServeConfig(host=host))
    for host in ("0.0.0.0", "10.0.0.1", "::", "example"):
        with pytest.raises(ConfigError, match="no token.*--token-file"):
            check_reach(ServeConfig(host=host))
    file = tmp_path / "token"
    with pytest.raises(ConfigError, match="can't be read"):
        check_reach(ServeConfig(token_file=str(file)))
    file.write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        check_reach(ServeConfig(token_file=str(file)))
    file.write_text("secret\n")
    check_reach(ServeConfig(host="0.0.0.0", token_file=str(file)))
    monkeypatch.setenv("RAYREWARD_TOKEN", "secret")
    check_reach(ServeConfig(host="0.0.0.0"))
