"""integrations: each framework is given the rewards of one shared pool, in the way it asks."""

from __future__ import annotations

import asyncio
import importlib.util
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import make_checkpoint

from rayreward import ConfigError, DataError, NoRewardError, PoolError, RewardPool
from rayreward.integrations import nemo_rl, pools, slime, trl, verl
from rayreward.types import Verbatim

pytestmark = pytest.mark.ray

POOL = "adapters"
PROMPTS = ["Is it fine? ", "And now? "] * 2
ANSWERS = ["It is.", "Who knows, " * 5, "No.", "Yes."]
TOO_LONG = "word " * 400
ASKED = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
SAID = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
TALKS = [prompt + answer for prompt, answer in zip(ASKED, SAID, strict=True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a head, as a reward model that somebody trained has."""
    return str(make_checkpoint(tmp_path_factory.mktemp("model") / "llama", head=True, bos=True))


@pytest.fixture(scope="module")
def pool(ray_cluster: Any, model: str) -> Iterator[RewardPool]:
    with RewardPool(model, name=POOL, num_actors=1, num_cpus_per_actor=1, max_length=200) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _named_in_the_environment(pool: RewardPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYREWARD_POOL", POOL)


# TRL 1.16.0, by its own trainers


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
@pytest.mark.parametrize("conversational", [False, True], ids=["standard", "conversational"])
def test_trl_trains_on_the_rewards_that_it_would_compute_itself(
    kind: str, conversational: bool, model: str, pool: RewardPool, tmp_path: Path
) -> None:
    import trl as framework
    from datasets import Dataset

    seen: list[torch.Tensor] = []

    class Trainer(getattr(framework, f"{kind}Trainer")):  # type: ignore[misc]
        def _calculate_rewards(self, *args: Any) -> torch.Tensor:
            seen.append(super()._calculate_rewards(*args))
            return seen[-1]

    trainer = Trainer(
        model=str(make_checkpoint(tmp_path / "policy", weights_seed=2)),
        # the checkpoint itself, then the pool twice
        reward_funcs=[model, trl.PoolReward(pool), trl.AsyncPoolReward(POOL, name="in_time")],
        train_dataset=Dataset.from_list(
            [{"prompt": prompt} for prompt in (ASKED if conversational else PROMPTS)]
        ),
        args=getattr(framework, f"{kind}Config")(
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=12,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
    )
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert len(seen) == 2
    for rewards in seen:
        own, from_pool, in_time = rewards.T
        assert torch.equal(from_pool, in_time)
        torch.testing.assert_close(from_pool, own, rtol=0, atol=1e-5)
        assert len(set(own.tolist())) > 1
    logged = trainer.state.log_history[0]
    assert logged["rewards/pool_reward/mean"] == pytest.approx(float(seen[0][:, 1].mean()))
    assert "rewards/in_time/mean" in logged
    trained = trainer.model.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))


def test_trl_is_told_none_where_there_is_no_reward() -> None:
    ask = trl.PoolReward(POOL)
    rewards = ask(prompts=["Is it? "] * 2, completions=["Yes.", TOO_LONG], trainer_state=None)
    assert rewards[0] is not None
    assert rewards[1] is None
    talks = ask(prompts=ASKED[:2], completions=[SAID[0], [{"role": "assistant", "content": None}]])
    assert talks[1] is None


@pytest.mark.peers
def test_example_trains_with_a_pool_of_its_own(model: str, examples: Path, tmp_path: Path) -> None:
    policy = str(make_checkpoint(tmp_path / "policy", shape={"max_position_embeddings": 1_024}))
    command = [sys.executable, str(examples / "grpo_with_pool.py"), "--steps", "1"]
    command += ["--policy", policy, "--reward-model", policy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "step 1: mean reward " in done.stdout


# OpenRLHF 0.11.2, openrlhf/utils/agent.py: SingleTurnAgentExecutor loads a path, calls in threads


def test_openrlhf_loads_the_file_and_calls_it_from_threads(pool: RewardPool) -> None:
    command = [sys.executable, "-m", "rayreward.integrations.openrlhf"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert path.endswith(".py")
    spec = importlib.util.spec_from_file_location("reward_func", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def ask(query: str) -> Any:
        return module.reward_func([query], ["<s>Is it?"], ["label"])

    # decoded with special tokens: nothing is put around what is there, EOS only where it lacks
    queries = [f"<s>Is it?{answer}</s>" for answer in ANSWERS]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(ask, queries))
    expected = pool.score([Verbatim(query) for query in queries])
    for answer, reward in zip(answers, expected, strict=True):
        assert set(answer) == {"rewards", "scores", "extra_logs"}
        assert answer["rewards"].shape == (1,)
        assert answer["rewards"].item() == answer["scores"].item() == reward
    unfinished = ask(queries[0].removesuffix("</s>"))
    assert unfinished["rewards"].item() == expected[0]
    with pytest.raises(NoRewardError, match="Text 0 has no reward: .*max_length=200.*too_long"):
        ask(TOO_LONG)


# verl 0.9.1, reward_loop/reward_manager/naive.py: awaits compute_score for each response


def row(prompt: Any, answer: str) -> dict[str, Any]:
    info = {"index": 1, "prompt": prompt, "num_turns": None, "rollout_reward_scores": {}}
    return {"data_source": "d", "solution_str": answer, "ground_truth": "g", "extra_info": info}


def test_verl_awaits_a_score_for_each_response(pool: RewardPool) -> None:
    async def ask_all() -> list[dict[str, float]]:
        rows = zip(ASKED, ANSWERS, strict=True)
        return await asyncio.gather(*(verl.compute_score(**row(*each), pool=POOL) for each in rows))

    found = asyncio.run(ask_all())
    assert found == [{"score": reward} for reward in pool.score(TALKS)]
    plain = asyncio.run(verl.compute_score(**row(PROMPTS[0], ANSWERS[0])))
    assert plain == {"score": pool.score([PROMPTS[0] + ANSWERS[0]])[0]}


def test_verl_is_told_that_a_prompt_or_a_reward_is_missing() -> None:
    asked = row("Is it? ", "Yes.")
    asked["extra_info"] = {"index": 1}
    with pytest.raises(DataError, match="A row of 'd' has no prompt in extra_info, .*'index'"):
        asyncio.run(verl.compute_score(**asked))
    with pytest.raises(DataError, match="add it to the dataset there as 'q'"):
        asyncio.run(verl.compute_score(**row("Is it? ", "Yes."), prompt_key="q"))
    with pytest.raises(NoRewardError, match="too_long"):
        asyncio.run(verl.compute_score(**row("Is it? ", TOO_LONG)))


# slime, slime/rollout/rm_hub/__init__.py: custom_rm_path(args, sample or samples)


def test_slime_awaits_one_reward_or_a_list(pool: RewardPool) -> None:
    plain = types.SimpleNamespace(prompt=PROMPTS[0], response=ANSWERS[0], label=None)
    talk = types.SimpleNamespace(prompt=ASKED[1], response=ANSWERS[1], label=None)
    text = Verbatim(PROMPTS[0] + ANSWERS[0] + "</s>")
    expected = [*pool.score([text]), *pool.score([TALKS[1]])]
    assert asyncio.run(slime.reward(None, [plain, talk], evaluation=False)) == expected
    one = asyncio.run(slime.reward(None, talk))
    assert one == expected[1]
    talk.response = TOO_LONG
    with pytest.raises(NoRewardError, match="Text 1 "):
        asyncio.run(slime.reward(None, [plain, talk]))


# NeMo-RL, nemo_rl/environments/interfaces.py


class EnvironmentReturn(NamedTuple):
    """As recorded from NeMo-RL, which no registry has."""

    observations: list[dict[str, str]]
    metadata: list[Any]
    next_stop_strings: list[Any]
    rewards: torch.Tensor
    terminateds: torch.Tensor
    answers: list[str | None] | None = None


def test_nemo_rl_steps_and_ends(pool: RewardPool, monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces: Any = types.ModuleType("nemo_rl.environments.interfaces")
    interfaces.EnvironmentReturn = EnvironmentReturn
    for name in ("nemo_rl", "nemo_rl.environments"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interfaces.__name__, interfaces)
    environment = nemo_rl.PoolEnvironment({"pool": POOL})
    logs = [[{**turn, "token_ids": torch.arange(3)} for turn in talk] for talk in TALKS]
    found = environment.step(logs, [{"row": n} for n in range(4)])
    assert found.rewards.tolist() == pool.score(TALKS).tolist()
    assert found.rewards.dtype is torch.float32
    assert found.terminateds.tolist() == [True] * 4
    assert found.metadata == [{"row": n} for n in range(4)]
    assert found.answers == ANSWERS
    assert len(found.observations) == len(found.next_stop_strings) == 4
    _, metrics = environment.global_post_process_and_metrics({"total_reward": found.rewards})
    assert metrics == {"mean_reward": pytest.approx(float(found.rewards.mean()))}
    with pytest.raises(NoRewardError):
        environment.step([[*ASKED[0], {"role": "assistant", "content": TOO_LONG}]], [None])


# SkyRL, by its own skyrl-gym


def test_skyrl_gym_makes_an_environment_that_asks_the_pool(pool: RewardPool) -> None:
    import skyrl_gym
    from skyrl_gym.envs.registration import deregister

    skyrl_gym.register(id="pool", entry_point="rayreward.integrations.skyrl:PoolEnv")
    try:
        for asked, answer, talk in zip(ASKED, ANSWERS, TALKS, strict=True):
            env = skyrl_gym.make("pool", env_config={"pool": POOL}, extras={"reward_spec": {}})
            assert env.init(asked) == (asked, {})
            step = env.step(answer)
            assert step["reward"] == pool.score([talk])[0]
            assert step["done"]
            assert step["observations"] == []
            env.close()
        env = skyrl_gym.make("pool")  # the environment variable names the pool
        env.init(ASKED[0])
        with pytest.raises(NoRewardError):
            env.step(TOO_LONG)
    finally:
        deregister("pool")


# what all of them do


def test_adapters_say_what_to_do_where_there_is_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PoolError, match="nobody"):
        trl.PoolReward("nobody")(["a"], ["b"])
    monkeypatch.delenv("RAYREWARD_POOL")
    with pytest.raises(ConfigError, match="set RAYREWARD_POOL to the name"):
        trl.PoolReward()(["a"], ["b"])


def test_adapters_travel_by_name(pool: RewardPool) -> None:
    ask = trl.PoolReward(POOL, name="rm")
    first = ask(PROMPTS, ANSWERS)
    copy = pickle.loads(pickle.dumps(ask))
    assert copy.__name__ == "rm"
    assert copy(PROMPTS, ANSWERS) == first


def test_messages_lose_what_only_the_framework_reads() -> None:
    message = {"role": "user", "content": "a", "token_ids": [1], "tool_calls": [{}]}
    assert pools.turns([message]) == [{"role": "user", "content": "a", "tool_calls": [{}]}]
