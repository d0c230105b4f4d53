"""serve: a real Ray Serve over a real pool, asked by real clients, some of them ill-behaved."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from processes import free_port, wait_for
from tiny import make_checkpoint

from rayreward import PoolError, RewardPool, ServeConfig
from rayreward.serve import serving
from rayreward.types import Verbatim

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

RAYREWARD = str(Path(sys.executable).with_name("rayreward"))
NAME = "served"
TEXTS = [f"Answer {n}: " + "the weather is fine. " * (n % 7) for n in range(64)]
TOO_LONG = "word " * 400
MAX_BYTES = 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model") / "llama", head=True, bos=True))


@pytest.fixture(scope="module")
def pool(ray_cluster: Any, model: str) -> Iterator[RewardPool]:
    settings: Any = {"num_actors": 2, "num_cpus_per_actor": 1, "max_queued_rows": 64}
    with RewardPool(model, name=NAME, **settings) as opened:
        yield opened


@pytest.fixture(scope="module")
def url(pool: RewardPool) -> Iterator[str]:
    config = ServeConfig(port=free_port(), max_body_mb=MAX_BYTES / 2**20, drain_s=10)
    with serving(NAME, config) as found:
        yield found


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as opened:
        yield opened


def test_every_dialect_gives_the_pools_rewards_bit_for_bit(
    client: httpx.Client, pool: RewardPool
) -> None:
    plain, talk = TEXTS[3], [{"role": "user", "content": TEXTS[3]}]
    text, conversation = pool.score([plain, talk]).tolist()
    bos, eos = pool.score(
        [Verbatim(plain, add_special_tokens=True), Verbatim(plain, ensure_eos=True)]
    ).tolist()
    assert len({text, conversation, bos, eos}) == 4

    def ask(path: str, body: Any) -> Any:
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    own = ask("/reward", {"items": [plain, talk, {"prompt": "", "completions": [plain, plain]}]})
    assert [row["reward"] for row in own["rewards"][:2]] == [text, conversation]
    assert [row["reward"] for row in own["rewards"][2]["completions"]] == [text, text]
    assert own["version"]["head"] == pool.version.head
    raw = {"model": "rm", "input": plain, "use_activation": False}
    assert ask("/classify", raw)["data"][-1]["probs"][-1] == bos
    chat = {"messages": talk, "use_activation": False}
    assert ask("/classify", chat)["data"][0]["probs"] == [conversation]
    assert ask("/classify", {"model": "rm", "text": [plain]})[0]["embedding"] == [bos]
    embedded = ask("/v1/embeddings", {"model": "rm", "input": plain})
    assert embedded["data"][-1]["embedding"][-1] == bos
    asked = {"query": [plain], "prompts": ["a"], "labels": ["b"]}
    assert ask("/get_reward", asked) == {"rewards": [eos], "scores": [eos], "extra_logs": {}}
    assert ask("/get_reward", {"query": [], "prompts": [], "labels": []})["rewards"] == []
    assert ask("/slime", {"prompt": plain[:5], "response": plain[5:], "label": "b"}) == eos


def test_reward_that_could_not_be_computed_is_null_or_an_error_never_a_number(
    client: httpx.Client,
) -> None:
    asked = json.dumps({"items": ["fine", TOO_LONG, "half: \ud800"]})  # half a surrogate pair
    headers = {"content-type": "application/json"}
    own = client.post("/reward", content=asked, headers=headers).json()
    first, second, third = own["rewards"]
    assert first["status"] == "ok"
    assert (second["reward"], second["status"]) == (None, "too_long")
    assert (third["reward"], third["status"]) == (None, "malformed")
    for path, body in (
        ("/classify", {"input": ["fine", TOO_LONG]}),
        ("/classify", {"text": ["fine", TOO_LONG]}),
        ("/classify", {"input": [[5], [2**30]]}),
        ("/v1/embeddings", {"input": ["fine", TOO_LONG]}),
        ("/get_reward", {"query": ["fine", TOO_LONG]}),
    ):
        response = client.post(path, json=body)
        assert response.status_code == 422
        assert response.json()["error"]["row"] == 1
        assert "Text 1 has no reward" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "content", "status", "message"),
    [
        ("/reward", b"{", 422, "JSON"),
        ("/reward", b'{"items": 3}', 422, "body.items"),
        ("/reward", b'{"items": [{"chosen": "a"}]}', 422, "items.0.Prompted.prompt: "),
        ("/classify", b'{"inputs": "a"}', 422, "input"),
        ("/classify", b'{"input": NaN}', 422, "input"),
        ("/reward", b'{"items": ["' + b"a" * MAX_BYTES + b'"]}', 413, "--max-body-mb"),
        ("/nowhere", b"{}", 404, "Not Found"),
        ("/health", b"{}", 405, "Method Not Allowed"),
    ],
)
def test_bad_requests_are_answered_with_a_reason_as_json(
    client: httpx.Client, path: str, content: bytes, status: int, message: str
) -> None:
    headers = {"content-type": "application/json"}
    response = client.post(path, content=content, headers=headers)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == status
    assert message in error["message"]


def test_full_queue_is_answered_with_429_and_when_to_come_back(client: httpx.Client) -> None:
    items = [f"{n} " + "and so on. " * 20 for n in range(1_024)]
    response = client.post("/reward", json={"items": items})
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "1"
    assert "max_queued_rows=64" in response.json()["error"]["message"]
    # nothing of it is left over
    wait_for(lambda: client.post("/reward", json={"items": ["a"]}).is_success, "an answer")


def test_health_metrics_and_openapi(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok", "actors": 2, "version": 1}
    client.post("/reward", json={"items": ["a"]})
    told = client.get("/metrics").text
    assert 'rayreward_requests_total{path="/reward",status="200"}' in told
    assert "rayreward_pool_actors 2.0" in told
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/reward", "/classify", "/v1/embeddings", "/get_reward", "/health"} <= set(paths)
    assert client.get("/docs").status_code == 200


def raw_request(url: str, body: bytes, length: int | None = None) -> socket.socket:
    """A client that can leave at any moment."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST /reward HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)
    return connection


def test_client_that_leaves_takes_its_work_with_it(
    client: httpx.Client, url: str, pool: RewardPool, ray_cluster: Any
) -> None:
    pids = ray_cluster.get([actor.__ray_call__.remote(_pid) for actor in pool.actors])
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        body = json.dumps({"items": TEXTS[:8]}).encode()
        leaving = raw_request(url, body)
        wait_for(lambda: pool.status.requests > 0, "the request")
        leaving.close()
        wait_for(lambda: pool.status.requests == 0, "the request being dropped", 8)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert 'path="/reward",status="gone"' in client.get("/metrics").text
    assert client.post("/reward", json={"items": ["a"]}).is_success


def _pid(_actor: Any) -> int:
    return os.getpid()


def test_clients_that_stall_cost_the_others_nothing(client: httpx.Client, url: str) -> None:
    stalled = [raw_request(url, b'{"items": [', length=1_000) for _ in range(32)]
    try:
        answers = [client.post("/reward", json={"items": [text]}) for text in TEXTS[:8]]
        assert all(answer.is_success for answer in answers)
    finally:
        for connection in stalled:
            connection.close()


def test_actor_killed_under_load_loses_no_request(
    url: str, pool: RewardPool, ray_cluster: Any
) -> None:
    expected = pool.score(TEXTS).tolist()
    under_way = threading.Event()

    def ask(n: int) -> float:
        with httpx.Client(base_url=url, timeout=120) as client:
            response = client.post("/reward", json={"items": [TEXTS[n % 64]]})
        if n == 64:
            under_way.set()
        reward: float = response.raise_for_status().json()["rewards"][0]["reward"]
        return reward

    with ThreadPoolExecutor(16) as clients:
        answers = [clients.submit(ask, n) for n in range(256)]
        assert under_way.wait(60)
        ray_cluster.kill(pool.actors[0])
        assert [answer.result() for answer in answers] == expected * 4


@pytest.mark.timeout(300)
def test_fuzzed_bodies_never_break_the_service(url: str, client: httpx.Client) -> None:
    """Bodies from our own OpenAPI page, right and wrong ones."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    tried = 0

    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()

        @settings(
            max_examples=25,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy)
        def fuzz(case: Any) -> None:
            nonlocal tried
            tried += 1
            response = case.call(timeout=60)
            assert response.status_code < 500, (case.body, response.text)

        fuzz()
    assert tried > 100
    assert client.get("/health").is_success


def test_second_server_in_a_cluster_is_refused(url: str) -> None:
    with (
        pytest.raises(PoolError, match="Ray Serve runs in this cluster already"),
        serving(NAME, ServeConfig(port=free_port())),
    ):
        pass


def children(pid: int) -> list[psutil.Process]:
    found = psutil.Process(pid).children(recursive=True)
    return [process for process in found if process.cmdline()]


def test_command_serves_with_a_token_and_drains_when_told_to_end(
    model: str, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("the-token-of-this-test\n")
    port = free_port()
    command = [RAYREWARD, "serve", model, "--port", str(port), "--token-file", str(token)]
    command += ["--num-actors", "1", "--num-cpus-per-actor", "1"]
    log, actors = tmp_path / "log", []
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "\nserving " in f"\n{log.read_text()}" or server.poll(), "start", 150)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            assert client.get("/health").status_code == 200
            assert client.post("/reward", json={"items": ["a"]}).status_code == 401
            client.headers["Authorization"] = "Bearer the-token-of-this-test"
            assert client.post("/reward", json={"items": ["a"]}).status_code == 200
            items = [f"{n} " + "and so on. " * 20 for n in range(1_000)]
            actors += [p for p in children(server.pid) if "ray::RewardActor" in p.cmdline()[0]]
            [actor] = actors
            actor.suspend()
            with ThreadPoolExecutor(1) as thread:
                asked = thread.submit(client.post, "/reward", json={"items": items})
                wait_for(
                    lambda: "rayreward_requests_under_way 2.0" in client.get("/metrics").text,
                    "the request",
                )
                server.send_signal(signal.SIGTERM)
                wait_for(lambda: client.get("/health").status_code == 503, "draining")
                late = client.post("/reward", json={"items": ["a"]})
                actor.resume()
                answer = asked.result()
        assert (late.status_code, late.headers["Retry-After"]) == (503, "5")
        assert "This server is ending" in late.json()["error"]["message"]
        assert answer.status_code == 200
        assert len(answer.json()["rewards"]) == 1_000
        assert server.wait(60) == 0
    finally:
        for actor in actors:
            if actor.is_running():
                actor.resume()
        server.kill()
        server.wait()
    said = log.read_text()
    assert "the-token-of-this-test" not in said
    assert "Traceback" not in said


def test_command_refuses_to_serve_others_without_a_token(model: str) -> None:
    command = [RAYREWARD, "serve", model, "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "no token" in done.stderr
