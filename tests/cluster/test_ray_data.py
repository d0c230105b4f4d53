"""`RewardScorer` in real Ray Data pipelines: the columns and the bits of a job, and one model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayreward import ConfigError, DataError, DeterminismError, ModelConfig, RewardPool, Scorer
from rayreward.integrations.ray_data import RewardScorer, find_fingerprint
from rayreward.preferences import check_schema

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data"),
]

ROWS = 60
QUESTION = [{"role": "user", "content": "Is it fine?"}]
FORMATS: dict[str, Callable[[int], dict[str, Any]]] = {
    "pairs": lambda n: {
        "prompt": f"Is {n} fine? ",
        "chosen": "good " * (n % 9 + 1),
        "rejected": f"bad {n} " * (n % 5),
    },
    "completions": lambda n: {
        "prompt": f"Is {n} fine? ",
        "completions": [f"yes {k} " * (k + 1) for k in range(n % 4)],
    },
    "conversations": lambda n: {
        "messages": [*QUESTION, {"role": "assistant", "content": f"yes {n} " * (n % 7 + 1)}]
    },
}


def scored(dataset: Any, *, workers: int = 1, batch_size: int | None = 7, **settings: Any) -> Any:
    """The dataset through `map_batches`, as somebody would write it."""
    import ray

    return dataset.map_batches(
        RewardScorer,
        fn_constructor_kwargs=settings,
        batch_format="pyarrow",
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
    )


def read_items(rows: list[dict[str, Any]]) -> Any:
    import ray

    return ray.data.from_items(rows)


def as_table(dataset: Any) -> pa.Table:
    import ray

    return pa.concat_tables(ray.get(dataset.to_arrow_refs()))


@pytest.mark.parametrize(
    ("rows", "workers"),
    [("pairs", 3), ("completions", 1), ("conversations", 1)],
)
def test_g1_g3_pipeline_gives_the_columns_and_the_bits_of_a_job(
    pool: RewardPool, tiny_model: str, tmp_path: Path, rows: str, workers: int
) -> None:
    """G1 and G3, bitwise: however the rows are cut, and however many workers there are.

    What is expected of the workers is the pool's fingerprint, by way of JSON.
    """
    import ray

    table = pa.Table.from_pylist([{"id": n, **FORMATS[rows](n)} for n in range(ROWS)])
    dataset = ray.data.from_arrow([table.slice(start, 11) for start in range(0, ROWS, 11)])
    expect = json.loads(json.dumps(pool.fingerprint.to_dict()))
    settings = {"model": tiny_model, "seed": 42, "expect": expect}
    found = as_table(scored(dataset, workers=workers, **settings)).sort_by("id")
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=9)
    pool.score_dataset(tmp_path / "in.parquet", tmp_path / "out", rows_per_shard=13)
    job = pq.read_table(tmp_path / "out").sort_by("id")
    assert found.schema.equals(job.schema)
    assert found.equals(job)
    scorer = Scorer.load(ModelConfig(model=tiny_model, seed=42, share_prefixes=False))
    alone = [scorer.score_table(table.slice(n, 1), check_schema(table.schema)) for n in range(9)]
    assert found.slice(0, 9).select(alone[0].column_names).equals(pa.concat_tables(alone))


def test_rows_without_a_reward_have_null_and_a_reason(pool: RewardPool, tiny_model: str) -> None:
    """Every row is a block of its own, and some blocks hold nothing that would have a type."""
    texts = ["fine", None, "", "x" * 5000]
    rows = [{"id": n, "text": text} for n, text in enumerate(texts)]
    found = scored(read_items(rows), model=tiny_model, seed=42).take_all()
    by_id = sorted(found, key=lambda row: row["id"])
    assert [row["reward_status"] for row in by_id] == ["ok", "malformed", "empty", "too_long"]
    assert [row["reward"] for row in by_id] == [pool.score(["fine"])[0], None, None, None]
    assert all(row["reward_detail"] for row in by_id[1:])


@pytest.mark.parametrize(
    ("row", "status", "rewards"),
    [
        ({"prompt": "a", "completions": None}, "malformed", {"rewards": None}),
        ({"prompt": "a", "completions": []}, "ok", {"rewards": []}),
        ({"messages": None}, "malformed", {"reward": None}),
        ({"messages": []}, "empty", {"reward": None}),
        ({"chosen": None, "rejected": []}, "malformed", {"reward_margin": None}),
    ],
)
def test_blocks_that_hold_nothing_are_scored_as_what_they_would_hold(
    ray_cluster: Any, tiny_model: str, row: dict[str, Any], status: str, rewards: dict[str, Any]
) -> None:
    batch = pa.Table.from_pylist([row])
    found = in_worker(lambda: RewardScorer(tiny_model, seed=42)(batch).to_pylist()[0])
    assert {**row, **rewards, "reward_status": status}.items() <= found.items()


def test_columns_that_are_there_already_end_the_execution(
    ray_cluster: Any, tiny_model: str
) -> None:
    from ray.exceptions import RayTaskError

    told = "already has the columns reward, which scoring would add"
    with pytest.raises(RayTaskError, match=told):
        scored(read_items([{"text": "a", "reward": 0.5}]), model=tiny_model, seed=42).take_all()


def test_columns_of_no_known_row_format_are_an_error(ray_cluster: Any, tiny_model: str) -> None:
    with pytest.raises(DataError, match="No known row format in the columns question"):
        in_worker(lambda: RewardScorer(tiny_model, seed=42)(pa.table({"question": ["a"]})))


def test_batches_that_are_no_arrow_tables_are_an_error(ray_cluster: Any, tiny_model: str) -> None:
    """As `map_batches` gives them where no `batch_format` is said."""
    batch: Any = {"text": np.array(["a"])}
    with pytest.raises(DataError, match=r'got a dict. Say batch_format="pyarrow"'):
        in_worker(lambda: RewardScorer(tiny_model, seed=42)(batch))


def test_g1_fingerprint_to_expect_is_the_pools(pool: RewardPool, tiny_model: str) -> None:
    """G1: what a task of its own finds, with the settings and the CPUs of the pool's actors."""
    assert find_fingerprint(tiny_model, seed=42, num_cpus=1) == pool.fingerprint


def test_g1_worker_that_holds_another_model_ends_the_execution(
    pool: RewardPool, tiny_model: str
) -> None:
    """G1: what differs is named, and nothing comes out."""
    from ray.exceptions import ActorDiedError

    other = scored(
        read_items([{"text": "a"}] * 20),
        model=tiny_model,
        seed=43,
        expect=pool.fingerprint,
    )
    head = pool.fingerprint.head[:12]
    with pytest.raises(ActorDiedError, match=f"another model.*: head .{{12}} instead of {head}"):
        other.take_all()


def in_worker(function: Callable[[], Any], **reserved: float) -> Any:
    """Calls a function as Ray Data calls a constructor: in a worker that reserves something."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(ray.remote(function).options(**reserved).remote())
    except RayTaskError as error:
        raise error.cause from None


def test_g1_error_carries_what_is_held_and_what_is_expected(
    pool: RewardPool, tiny_model: str
) -> None:
    expect = pool.fingerprint
    with pytest.raises(DeterminismError, match="Check that the settings") as caught:
        in_worker(lambda: RewardScorer(tiny_model, seed=43, expect=expect))
    (difference,) = caught.value.report.differences
    assert set(difference.model) == {"head"}


def test_g1_worker_that_computes_other_bits_is_refused_or_accepted(
    pool: RewardPool, tiny_model: str
) -> None:
    """G1: the probe tells hardware from model."""
    here = pool.fingerprint
    first, *others = here.probe
    assert first is not None
    expect = replace(here, probe=(first + 1e-3, *others))
    with pytest.raises(DeterminismError, match=r"computes other bits.*1 of \d+ rewards differ"):
        in_worker(lambda: RewardScorer(tiny_model, seed=42, expect=expect))

    def accept() -> float:
        scorer = RewardScorer(tiny_model, seed=42, expect=expect, mixed_hardware="accept")
        return scorer(pa.table({"text": ["a"]}))["reward"][0].as_py()

    assert in_worker(accept) == pool.score(["a"])[0]


def test_worker_computes_with_what_it_reserved(ray_cluster: Any, tiny_model: str) -> None:
    def look() -> tuple[str | None, int]:
        import torch

        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # where an earlier test had this process
        torch.set_num_threads(1)
        RewardScorer(tiny_model, seed=42)
        return os.environ.get("CUDA_VISIBLE_DEVICES"), torch.get_num_threads()

    assert in_worker(look, num_cpus=2) == ("", 2)


def test_settings_and_checkpoints_that_are_wrong_say_so(ray_cluster: Any, tiny_model: str) -> None:
    with pytest.raises(ConfigError, match=r"is no fingerprint \(KeyError\('environment'\)\)"):
        in_worker(lambda: RewardScorer(tiny_model, seed=42, expect={"head": "0" * 64}))
    with pytest.raises(ConfigError, match="mixed_hardware='alike' must be"):
        in_worker(lambda: RewardScorer(tiny_model, seed=42, mixed_hardware="alike"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no head. Pass seed"):
        find_fingerprint(tiny_model)
