"""G3, no neighbours: a row has the same bits in every way in, among any others."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayreward import ModelConfig, RewardPool, Scorer
from rayreward.preferences import check_schema
from rayreward.types import Reward, Text

pytestmark = pytest.mark.ray

BUDGETS = (100, 2_048)
"""Tokens in a batch: less than most groups of the test take, and more."""


@pytest.fixture(
    scope="module", params=["llama-float32", "llama-bfloat16", "gemma2-float32", "bert-float32"]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint and its dtype."""
    from tiny import make_checkpoint

    architecture, dtype = request.param.split("-")
    path = make_checkpoint(tmp_path_factory.mktemp("models") / architecture, architecture)
    return str(path), dtype


@pytest.fixture(scope="module")
def opened(ray_cluster: Any) -> Iterator[dict[str, list[RewardPool]]]:
    """The pools of each dtype: starting actors takes longer than exchanging what they hold."""
    pools: dict[str, list[RewardPool]] = {}
    yield pools
    for pool in itertools.chain(*pools.values()):
        pool.close()


@pytest.fixture(scope="module")
def pools(opened: dict[str, list[RewardPool]], model: Any) -> list[RewardPool]:
    """A pool for each budget: two actors with a thread each, and one with two threads."""
    path, dtype = model
    if dtype in opened:
        for pool in opened[dtype]:
            pool.update(path)
    else:
        opened[dtype] = [
            RewardPool(
                path,
                seed=42,
                dtype=dtype,
                max_batch_tokens=budget,
                num_actors=3 - threads,
                num_cpus_per_actor=threads,
            )
            for threads, budget in enumerate(BUDGETS, start=1)
        ]
    return opened[dtype]


@pytest.fixture(scope="module")
def alone(model: Any) -> Scorer:
    """Scores without Ray, nothing shared, a batch for each text."""
    path, dtype = model
    return Scorer.load(ModelConfig(model=path, seed=42, dtype=dtype, share_prefixes=False))


words = st.sampled_from(["", "yes ", "no ", "the answer ", "is 42. ", "weather ", "質問 "])
texts = st.builds(
    lambda word, times, end: word * times + end,
    words,
    st.integers(0, 25),
    st.sampled_from(["a", "Yes.", "fine day"]),
)
corpora = st.lists(
    st.tuples(texts, st.lists(texts, min_size=1, max_size=17)), min_size=1, max_size=5
)


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(corpus=corpora, data=st.data())
def test_g3_random_rows_have_the_same_bits_in_every_way_in(
    pools: list[RewardPool],
    alone: Scorer,
    tmp_path_factory: pytest.TempPathFactory,
    corpus: list[tuple[str, list[str]]],
    data: st.DataObject,
) -> None:
    """G3, bitwise: each of 1 to 85 rows, its prompt shared by 0 to 16 others or not at all."""
    rows = [(prompt, completion) for prompt, group in corpus for completion in group]
    outcomes = [alone.score([Text(*row)])[0] for row in rows]
    expected = [outcome.value for outcome in outcomes if isinstance(outcome, Reward)]
    assert len(expected) == len(rows)
    order = data.draw(st.permutations(range(len(rows))))
    records = [{"prompt": rows[n][0], "completion": rows[n][1]} for n in order]
    shuffled = [expected[n] for n in order]
    prompts, completions = [p for p, _ in corpus], [group for _, group in corpus]
    for pool in pools:
        assert pool.score(records).tolist() == shuffled
        grouped = pool.score_completions(prompts, completions)
        assert np.concatenate(grouped).tolist() == expected
        table = pa.table({"prompt": prompts, "completions": completions})
        in_table = pool.score_table(table)["rewards"].to_pylist()
        assert list(itertools.chain(*in_table)) == expected
        scratch = tmp_path_factory.mktemp("job")
        pq.write_table(table, scratch / "rows.parquet")
        shard = data.draw(st.integers(1, 3))
        pool.score_dataset(scratch / "rows.parquet", scratch / "out", rows_per_shard=shard)
        in_files = pq.read_table(scratch / "out")["rewards"].to_pylist()
        assert list(itertools.chain(*in_files)) == expected
        at_once = data.draw(st.integers(1, len(rows)))
        assert asyncio.run(in_micro_batches(pool, records, at_once)) == shuffled


async def in_micro_batches(pool: RewardPool, records: list[Any], at_once: int) -> list[float]:
    """The rewards of records that come in a few at a time, all at once."""
    parts = [records[start : start + at_once] for start in range(0, len(records), at_once)]
    rewards = await asyncio.gather(*(pool.score_async(part) for part in parts))
    return [value for part in rewards for value in part.tolist()]


def test_g3_both_sides_of_a_pair_have_the_same_bits_in_every_way_in(
    pools: list[RewardPool], model: Any, tmp_path: Path
) -> None:
    """G3, bitwise: score, score_completions, score_table and score_dataset, shared or not."""
    pool, (path, dtype) = pools[0], model
    source = tmp_path / "pairs.parquet"
    texts = {
        "chosen": [f"good {n} " * (n % 9 + 1) for n in range(200)],
        "rejected": [f"good {n} " * (n % 5) + "bad" for n in range(200)],
    }
    pq.write_table(pa.table(texts), source, row_group_size=60)
    pool.score_dataset(str(source), str(tmp_path / "out"), rows_per_shard=7)
    result = pq.read_table(tmp_path / "out")
    table = pq.read_table(source)
    chosen, rejected = (table[side].to_pylist() for side in ("chosen", "rejected"))
    expected = [result[f"reward_{side}"].to_pylist() for side in ("chosen", "rejected")]
    assert pool.score(chosen).tolist() == expected[0]
    assert pool.score(rejected[::-1]).tolist()[::-1] == expected[1]
    groups = pool.score_completions(
        [""] * 200, [list(p) for p in zip(chosen, rejected, strict=True)]
    )
    assert [group.tolist() for group in groups] == [list(p) for p in zip(*expected, strict=True)]
    scored = pool.score_table(table.slice(50, 100))
    assert scored["reward_chosen"].to_pylist() == expected[0][50:150]
    alone = Scorer.load(ModelConfig(model=path, seed=42, dtype=dtype, share_prefixes=False))
    for row in (0, 77, 199):
        columns = alone.score_table(table.slice(row, 1), check_schema(table.schema))
        assert columns["reward_chosen"].to_pylist() == [expected[0][row]]
        assert columns["reward_rejected"].to_pylist() == [expected[1][row]]
