"""config: bad settings are refused with a message that says what to do; good ones are frozen."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayreward.config import MAX_SEED, JobConfig, ModelConfig, PoolConfig
from rayreward.errors import ConfigError

CONFIGS: tuple[Any, ...] = (
    ModelConfig(model="m"),
    PoolConfig(),
    JobConfig(dataset="d", output="o"),
)
REQUIRED: dict[type, dict[str, str]] = {
    ModelConfig: {"model": "m"},
    PoolConfig: {},
    JobConfig: {"dataset": "d", "output": "o"},
}
AT_LEAST: list[tuple[type, str, int]] = [
    (ModelConfig, "seed", 0),
    (ModelConfig, "max_length", 1),
    (ModelConfig, "max_batch_tokens", 1),
    (PoolConfig, "num_actors", 1),
    (PoolConfig, "tasks_per_actor", 1),
    (PoolConfig, "max_attempts", 1),
    (JobConfig, "rows_per_shard", 1),
    (JobConfig, "max_failed_rows", 0),
]
CHOICES: list[tuple[type, str, tuple[str, ...]]] = [
    (ModelConfig, "head", ("auto", "trained", "seeded")),
    (ModelConfig, "dtype", ("auto", "float32", "bfloat16", "float16")),
    (ModelConfig, "truncation", ("error-row", "left", "right")),
    (JobConfig, "progress", ("auto", "bar", "lines", "none")),
]


def _refused(config: type, **settings: Any) -> str:
    """The message with which the settings are refused."""
    with pytest.raises(ConfigError) as caught:
        config(**(REQUIRED[config] | settings))
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "name", "remedy"),
    [
        (ModelConfig, "model", "pass a checkpoint directory or a hub id"),
        (
            JobConfig,
            "dataset",
            "pass a file, a directory or a glob; score_table takes rows in memory",
        ),
        (JobConfig, "output", "pass a directory for the result"),
    ],
)
def test_config_takes_paths_and_refuses_what_is_none(config: type, name: str, remedy: str) -> None:
    assert getattr(config(**(REQUIRED[config] | {name: Path("a")})), name) == "a"
    assert _refused(config, **{name: ""}) == f"{name} is '' and no path: {remedy}."
    assert _refused(config, **{name: None}).startswith(f"{name} is None and no path")
    assert _refused(config, **{name: ["a"]}).startswith(f"{name} is a list and no path")


@pytest.mark.parametrize(("config", "name", "least"), AT_LEAST)
def test_config_refuses_numbers_that_are_too_small(config: type, name: str, least: int) -> None:
    message = _refused(config, **{name: least - 1})
    assert message.startswith(f"{name}={least - 1} must be a whole number of at least {least}")
    assert getattr(config(**(REQUIRED[config] | {name: least})), name) == least


@pytest.mark.parametrize(("config", "name", "least"), AT_LEAST)
@pytest.mark.parametrize("value", [2.0, True, "2"])
def test_config_refuses_what_is_not_a_whole_number(
    config: type, name: str, least: int, value: object
) -> None:
    assert _refused(config, **{name: value}).startswith(f"{name}={value!r} must be a whole number")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (ModelConfig, "max_batch_tokens"),
        (PoolConfig, "num_actors"),
        (JobConfig, "rows_per_shard"),
    ],
)
def test_config_names_auto_where_it_is_a_choice(config: type, name: str) -> None:
    assert getattr(config(**REQUIRED[config]), name) == "auto"
    assert "'auto'" in _refused(config, **{name: "many"})


@pytest.mark.parametrize(("config", "name", "choices"), CHOICES)
def test_config_lists_the_choices(config: type, name: str, choices: tuple[str, ...]) -> None:
    listed = ", ".join(repr(choice) for choice in choices)
    assert _refused(config, **{name: "other"}) == f"{name}='other' must be one of {listed}."
    for choice in choices:
        assert getattr(config(**(REQUIRED[config] | {name: choice})), name) == choice


@pytest.mark.parametrize("value", [None, ["auto"], 0])
def test_config_refuses_choices_of_another_type(value: object) -> None:
    assert "must be one of 'auto', " in _refused(ModelConfig, dtype=value)


def test_config_takes_the_seeds_that_numpy_takes() -> None:
    assert ModelConfig(model="m", seed=MAX_SEED).seed == MAX_SEED
    np.random.RandomState(MAX_SEED)
    message = _refused(ModelConfig, seed=MAX_SEED + 1)
    assert message.endswith(f"at least 0 and at most {MAX_SEED}.")
    with pytest.raises(ValueError, match="Seed must be between"):
        np.random.RandomState(MAX_SEED + 1)


def test_config_refuses_texts_that_fit_no_batch() -> None:
    message = _refused(ModelConfig, max_length=513, max_batch_tokens=512)
    assert "max_length=513 does not fit into max_batch_tokens=512" in message
    assert message.endswith("Raise max_batch_tokens or lower max_length.")
    assert ModelConfig(model="m", max_length=512, max_batch_tokens=512).max_length == 512
    assert ModelConfig(model="m", max_length=10**6).max_batch_tokens == "auto"


@pytest.mark.parametrize("value", [-0.25, 1.5, 2, float("nan")])
def test_config_refuses_gpus_that_no_actor_can_have(value: float) -> None:
    message = _refused(PoolConfig, num_gpus_per_actor=value)
    assert message.startswith(f"num_gpus_per_actor={value} is not between 0 and 1")
    assert "one GPU or on a share of it" in message


@pytest.mark.parametrize("value", [0, 0.25, 1])
def test_config_takes_a_share_of_a_gpu(value: float) -> None:
    assert PoolConfig(num_gpus_per_actor=value).num_gpus_per_actor == value


@pytest.mark.parametrize("name", ["num_cpus_per_actor", "placement_timeout_s"])
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_config_refuses_amounts_that_are_not_above_zero(name: str, value: float) -> None:
    assert _refused(PoolConfig, **{name: value}) == f"{name}={value!r} must be a number above 0."


@pytest.mark.parametrize(
    "name", ["num_gpus_per_actor", "num_cpus_per_actor", "placement_timeout_s"]
)
def test_config_refuses_amounts_that_are_no_numbers(name: str) -> None:
    assert name in _refused(PoolConfig, **{name: "1"})


@pytest.mark.parametrize("config", CONFIGS)
def test_config_is_frozen(config: Any) -> None:
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))


@pytest.mark.parametrize("config", [ModelConfig, PoolConfig, JobConfig])
def test_config_takes_keywords_only(config: Any) -> None:
    with pytest.raises(TypeError, match="takes 1 positional argument but 2"):
        config(1)


def test_config_checks_a_changed_copy() -> None:
    with pytest.raises(ConfigError, match="max_attempts=0"):
        dataclasses.replace(PoolConfig(), max_attempts=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_config_travels_to_actors(config: Any) -> None:
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("name", ["batch_invariant", "torch_compile"])
def test_config_takes_yes_no_or_auto(name: str) -> None:
    assert _refused(ModelConfig, **{name: "yes"}) == f"{name}='yes' must be True, False or 'auto'."
    for choice in (True, False, "auto"):
        assert getattr(ModelConfig(model="m", **{name: choice}), name) == choice


@pytest.mark.parametrize(
    ("config", "name"), [(ModelConfig, "share_prefixes"), (JobConfig, "restart")]
)
def test_config_takes_no_text_for_yes_or_no(config: Any, name: str) -> None:
    """Of which any would be true, "false" included: restart throws an output away."""
    assert _refused(config, **{name: "false"}) == f"{name}='false' must be True or False."
