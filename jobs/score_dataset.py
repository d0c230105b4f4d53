"""Scores a dataset with a reward model. A thin door to `rayreward score`, with the same flags.

python jobs/score_dataset.py --model … --dataset … --output … --seed 42
ray job submit --working-dir . -- python jobs/score_dataset.py --model … (absolute paths)
"""

import sys

from rayreward.cli import score

if __name__ == "__main__":
    sys.exit(score())
