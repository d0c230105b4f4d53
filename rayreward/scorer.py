"""Rows in, rewards out, in one process and on one device: tokenizer, batches and model together.

An actor holds one `Scorer`; without Ray it can be used by itself. Does not know Ray or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import pyarrow as pa

from rayreward.batching import make_batches
from rayreward.checkpoint import Checkpoint, open_checkpoint
from rayreward.columns import reward_columns
from rayreward.config import ModelConfig
from rayreward.fingerprint import (
    Fingerprint,
    find_environment,
    hash_tensors,
    hash_text,
    hash_tokenizer,
)
from rayreward.model import RewardModel, load_model
from rayreward.preferences import RowFormat
from rayreward.tokenization import Tokenizer, load_tokenizer, padding_id
from rayreward.types import Failure, Outcome, Reward, Sample, Status, Tokens

_AUTO_BATCH_TOKENS = {"cpu": 2_048, "cuda": 16_384}
"""On a CPU the caches are the limit; measured best on two cores with a 135M model."""


class Scorer:
    """A reward model with its tokenizer, on one device."""

    def __init__(
        self, model: RewardModel, tokenizer: Tokenizer, checkpoint: Checkpoint, config: ModelConfig
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._checkpoint = checkpoint
        self._config = config
        budget = config.max_batch_tokens
        self._max_batch_tokens = (
            _AUTO_BATCH_TOKENS[model.device.type] if budget == "auto" else budget
        )

    @classmethod
    def load(cls, config: ModelConfig, device: str = "cpu") -> Scorer:
        """Loads model and tokenizer.

        Args:
            config: What decides a reward.
            device: `cpu` or `cuda:0`.

        Raises:
            ModelError: The checkpoint can't be loaded as a reward model.
            ConfigError: A setting does not fit the model.
        """
        checkpoint = open_checkpoint(config.model, config.revision)
        hf = load_tokenizer(checkpoint.path)
        pad_id = padding_id(hf, checkpoint.pad_id, config.pad_token)
        model = load_model(checkpoint, config, pad_id, device)
        max_length = config.max_length or model.loaded.max_positions
        tokenizer = Tokenizer(hf, max_length=max_length, truncation=config.truncation)
        return cls(model, tokenizer, checkpoint, config)

    def score(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Scores samples, whatever mix of text and conversations.

        Returns:
            For each sample, in order, its reward or the reason why it has none.

        Raises:
            ModelError: There are conversations but the model has no chat template.
        """
        encoded = self._tokenizer.encode(samples)
        outcomes: list[Outcome | None] = [
            item if isinstance(item, Failure) else None for item in encoded
        ]
        sequences = [
            (index, item) for index, item in enumerate(encoded) if isinstance(item, Tokens)
        ]
        for batch in make_batches([len(t.ids) for _, t in sequences], self._max_batch_tokens):
            members = [sequences[position] for position in batch]
            values = self._model.rewards([tokens.ids for _, tokens in members])
            for (index, tokens), value in zip(members, values.tolist(), strict=True):
                outcomes[index] = _outcome(value, tokens)
        return [outcome for outcome in outcomes if outcome is not None]

    def score_table(self, table: pa.Table, row_format: RowFormat) -> pa.Table:
        """Scores the rows of a table.

        Returns:
            The columns to add (`rayreward.columns`), row by row in the table's order.
        """
        rows = [
            row if isinstance(row, Failure) else row_format.samples(row)
            for row in read_rows(table, row_format.read)
        ]
        samples = [sample for row in rows if not isinstance(row, Failure) for sample in row]
        flat = iter(self.score(samples))
        outcomes = [
            row if isinstance(row, Failure) else tuple(islice(flat, len(row))) for row in rows
        ]
        return reward_columns(row_format.kind, outcomes)

    def fingerprint(self) -> Fingerprint:
        """Hashes what this scorer holds now, from the live weights."""
        loaded, hf, head = self._model.loaded, self._tokenizer.hf, self._model.head.tensors
        return Fingerprint(
            head=hash_tensors(head.items()),
            body=hash_tensors((n, t) for n, t in self._model.tensors() if n not in head),
            tokenizer=hash_tokenizer(hf),
            chat_template=hash_text(str(hf.chat_template)) if hf.chat_template else None,
            head_origin=loaded.head_origin,
            revision=self._checkpoint.revision,
            architecture=self._model.architecture,
            dtype=loaded.dtype,
            max_length=self._tokenizer.max_length,
            truncation=self._config.truncation,
            pad_id=self._model.pad_id,
            max_batch_tokens=self._max_batch_tokens,
            attention=loaded.attention,
            environment=find_environment(self._model.device),
        )


def read_rows(table: pa.Table, columns: Sequence[str]) -> Iterator[dict[str, object] | Failure]:
    """Yields the rows of some columns as Python values, a failure where one is not UTF-8."""
    chosen = table.select(list(columns))
    try:
        yield from chosen.to_pylist()
    except UnicodeDecodeError:
        for index in range(chosen.num_rows):
            try:
                yield chosen.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield Failure(Status.MALFORMED, f"the row is not valid UTF-8: {error}")


def _outcome(value: float, tokens: Tokens) -> Outcome:
    if math.isfinite(value):
        return Reward(value, len(tokens.ids), tokens.truncated)
    return Failure(Status.NOT_FINITE, f"the model answered {value}", tokens=len(tokens.ids))
