"""GRPO on the rewards of a pool: TRL trains a small policy, RayReward scores what it says.

    python examples/grpo_with_pool.py [--steps 8]

The policy is SmolLM2-135M-Instruct; so is the reward model, with a head drawn from seed 42: what it
likes means nothing, but the policy learns to please it. Takes minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset
from smollm2 import checkpoint_directory
from trl import GRPOConfig, GRPOTrainer

from rayreward import RewardPool
from rayreward.integrations.trl import PoolReward

PROMPTS = Path(__file__).parent / "preferences.parquet"


def main() -> None:
    """Trains, and prints how the mean reward goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--policy", default=None, help="null: SmolLM2-135M-Instruct")
    parser.add_argument("--reward-model", default=None, help="null: SmolLM2-135M-Instruct")
    arguments = parser.parse_args()
    policy = arguments.policy or str(checkpoint_directory())
    reward_model = arguments.reward_model or str(checkpoint_directory())
    prompts = pq.read_table(PROMPTS, columns=["prompt"]).to_pylist()
    with (
        RewardPool(reward_model, seed=42, name="rm", num_actors=1, num_cpus_per_actor=1),
        tempfile.TemporaryDirectory() as scratch,
    ):
        trainer = GRPOTrainer(
            model=policy,
            reward_funcs=PoolReward("rm"),
            train_dataset=Dataset.from_list(prompts),
            args=GRPOConfig(
                output_dir=scratch,
                max_steps=arguments.steps,
                per_device_train_batch_size=8,
                num_generations=4,
                max_completion_length=32,
                learning_rate=1e-5,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                disable_tqdm=True,
            ),
        )
        trainer.train()
    for step in trainer.state.log_history:
        if "rewards/pool_reward/mean" in step:
            print(f"step {step['step']}: mean reward {step['rewards/pool_reward/mean']:.4f}")


if __name__ == "__main__":
    main()
