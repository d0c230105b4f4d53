"""A finished output directory is one dataset to what people read Parquet with, as it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from rayreward import RewardPool

pytestmark = pytest.mark.ray

README = Path(__file__).parents[2] / "README.md"
ROWS = 40
PAIRS = pa.table(
    {
        "prompt": [f"Is {n} fine? " for n in range(ROWS)],
        "chosen": [f"good {n} " * (n % 9 + 1) for n in range(ROWS - 1)] + ["x" * 5000],
        "rejected": [f"bad {n} " * (n % 5 + 1) for n in range(ROWS)],
    }
)
"""The last row is too long: it has nulls, and columns that are all null in the other parts."""
ANSWERS = [[f"yes {k} " * (k + 1) for k in range(n % 4)] for n in range(9)] + [["x" * 5000]]
LISTS = pa.table({"prompt": [f"Is {n} fine? " for n in range(10)], "completions": ANSWERS})
SINGLES = pa.table(
    [
        pa.array([f"Is {n} fine? " for n, answers in enumerate(ANSWERS) for _ in answers]),
        pa.array([answer for answers in ANSWERS for answer in answers]),
    ],
    names=["prompt", "completion"],
)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with a head, and rewards as far apart as a trained one's."""
    from tiny import make_checkpoint

    path = make_checkpoint(tmp_path_factory.mktemp("models") / "llama", head=True)
    weights = load_file(path / "model.safetensors")
    weights["score.weight"] *= 50
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return str(path)


@pytest.fixture(scope="module")
def outputs(
    ray_cluster: Any, wide_model: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Three finished jobs, each of several parts, in directories called `scored`."""
    made = {}
    with RewardPool(wide_model, num_actors=1, num_cpus_per_actor=1) as pool:
        for name, table in (("pairs", PAIRS), ("lists", LISTS), ("singles", SINGLES)):
            made[name] = tmp_path_factory.mktemp(name) / "scored"
            pq.write_table(table, made[name].parent / "in.parquet")
            pool.score_dataset(made[name].parent / "in.parquet", made[name], rows_per_shard=4)
            assert len(list(made[name].glob("part-*.parquet"))) > 2
    return made


def read_with_pyarrow(directory: Path) -> pa.Table:
    import pyarrow.dataset as ds

    return ds.dataset(directory).to_table()


def read_with_pandas(directory: Path) -> pa.Table:
    import pandas as pd

    schema = pq.read_schema(next(directory.glob("*.parquet")))
    return pa.Table.from_pandas(pd.read_parquet(directory), schema, preserve_index=False)


def read_with_polars(directory: Path) -> pa.Table:
    import polars as pl

    return pl.read_parquet(f"{directory}/*.parquet").to_arrow()


def scan_with_polars(directory: Path) -> pa.Table:
    import polars as pl

    return pl.scan_parquet(f"{directory}/*.parquet").collect().to_arrow()


def read_with_duckdb(directory: Path) -> pa.Table:
    import duckdb

    return duckdb.sql(f"SELECT * FROM '{directory}/*.parquet'").to_arrow_table()


def load_with_datasets(directory: Path) -> Any:
    import datasets

    return datasets.load_dataset(
        "parquet",
        data_files=f"{directory}/*.parquet",
        split="train",
        cache_dir=str(directory.parent / "cache"),
    )


def read_with_datasets(directory: Path) -> pa.Table:
    return load_with_datasets(directory).with_format("arrow")[:]


def read_with_datasets_by_directory(directory: Path) -> pa.Table:
    import datasets

    data = datasets.load_dataset(
        "parquet",
        data_dir=str(directory),
        data_files="*.parquet",
        split="train",
        cache_dir=str(directory.parent / "cache"),
    )
    return data.with_format("arrow")[:]


@pytest.mark.parametrize(
    "read",
    [
        read_with_pyarrow,
        read_with_pandas,
        read_with_polars,
        scan_with_polars,
        read_with_duckdb,
        read_with_datasets,
        read_with_datasets_by_directory,
    ],
)
def test_output_reads_as_one_dataset(
    outputs: dict[str, Path], read: Callable[[Path], pa.Table]
) -> None:
    """Every row in the input's order, every column, nulls where a reward is missing."""
    parts = sorted(outputs["pairs"].glob("part-*.parquet"))
    expected = pa.concat_tables([pq.read_table(part) for part in parts])
    assert expected.select(PAIRS.column_names).equals(PAIRS)
    assert expected["reward_margin"].null_count == 1
    found = read(outputs["pairs"])
    assert found.column_names == expected.column_names
    assert found.cast(expected.schema).equals(expected)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["Reward", "DPO"])
def test_trl_trains_on_an_output_as_it_is(
    outputs: dict[str, Path], tiny_model: str, tmp_path: Path, method: str
) -> None:
    """The added columns are not in the way: the losses are those without them."""
    import trl

    def losses(data: Any) -> list[float]:
        arguments = getattr(trl, f"{method}Config")(
            output_dir=str(tmp_path),
            seed=42,
            use_cpu=True,
            report_to=[],
            bf16=False,
            max_steps=2,
            logging_steps=1,
            disable_tqdm=True,
            per_device_train_batch_size=2,
            save_strategy="no",
        )
        trainer_class = getattr(trl, f"{method}Trainer")
        trainer = trainer_class(model=tiny_model, args=arguments, train_dataset=data)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    data = load_with_datasets(outputs["pairs"])
    found = losses(data)
    assert len(found) == 2
    assert found == losses(data.select_columns(PAIRS.column_names))


def queries() -> list[str]:
    """The README's, line by line as they stand there."""
    (block,) = re.findall(r"```sql\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return [query for query in block.split(";") if query.strip()]


def test_readme_query_filters_by_margin(
    outputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import duckdb

    monkeypatch.chdir(outputs["pairs"].parent)
    found = duckdb.sql(queries()[0]).fetchall()
    rows = pq.read_table("scored").to_pylist()
    wide = [row for row in rows if row["reward_status"] == "ok" and row["reward_margin"] > 0.5]
    assert found == [tuple(row[name] for name in PAIRS.column_names) for row in wide]
    assert 0 < len(wide) < ROWS - 1


@pytest.mark.parametrize(("query", "output"), [(1, "singles"), (2, "lists")])
def test_readme_queries_choose_the_best_of_n(
    outputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, query: int, output: str
) -> None:
    """A completion without a reward is never the best."""
    import duckdb

    monkeypatch.chdir(outputs[output].parent)
    found = duckdb.sql(queries()[query]).fetchall()
    expected = best_of(pq.read_table("scored"))
    assert sorted(found) == sorted(expected.items())
    assert len(expected) < len(LISTS)


def best_of(table: pa.Table) -> dict[str, str]:
    """Each prompt's completion with the highest reward, where one has a reward."""
    groups: dict[str, list[tuple[float, str]]] = {}
    for row in table.to_pylist():
        rewards = row["rewards"] if "rewards" in row else [row["reward"]]
        completions = row["completions"] if "completions" in row else [row["completion"]]
        for reward, completion in zip(rewards, completions, strict=True):
            if reward is not None:
                groups.setdefault(row["prompt"], []).append((reward, completion))
    return {prompt: max(scored)[1] for prompt, scored in groups.items()}
