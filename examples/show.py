"""Prints the widest margins of a scored directory of pairs.

python examples/show.py DIRECTORY
"""

from __future__ import annotations

import sys

import pyarrow.parquet as pq


def main(directory: str) -> None:
    """Prints the three pairs with the widest margin either way."""
    columns = ["topic", "reward_chosen", "reward_rejected", "reward_margin"]
    table = pq.read_table(directory, columns=columns).sort_by("reward_margin")
    print(f"\n{'topic':<24} {'chosen':>10} {'rejected':>10} {'margin':>10}")
    for row in [*table.slice(0, 3).to_pylist(), *table.slice(len(table) - 3).to_pylist()]:
        rewards = [f"{row[name]:>10.4f}" for name in columns[1:]]
        print(f"{row['topic']:<24} {' '.join(rewards)}")
    print(f"\nRead it yourself: pyarrow.parquet.read_table({directory!r})")


if __name__ == "__main__":
    main(sys.argv[1])
