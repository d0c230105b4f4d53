"""Rows in, rewards out, in one process and on one device: tokenizer, batches and model together.

An actor holds one `Scorer`; without Ray it can be used by itself. Does not know Ray or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from rayreward.batching import make_batches, pack_groups, share_prefix
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
from rayreward.invariance import settle_invariance
from rayreward.loading import load_model
from rayreward.model import RewardModel
from rayreward.preferences import RowFormat
from rayreward.tokenization import Tokenizer, load_tokenizer, padding_id
from rayreward.types import Failure, Group, Outcome, Reward, Sample, Status, Tokens

_AUTO_BATCH_TOKENS = {"cpu": 2_048, "cuda": 16_384}
"""On a CPU the caches are the limit; measured best on two cores with a 135M model."""


class Scorer:
    """A reward model with its tokenizer, on one device."""

    def __init__(
        self,
        model: RewardModel,
        tokenizer: Tokenizer,
        checkpoint: Checkpoint,
        config: ModelConfig,
        invariance: str,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._checkpoint = checkpoint
        self._config = config
        self._invariance = invariance
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
        invariance = settle_invariance(model, config)
        tokenizer = Tokenizer(hf, max_length=max_length, truncation=config.truncation)
        return cls(model, tokenizer, checkpoint, config, invariance)

    def score(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Scores samples, whatever mix of text and conversations.

        Returns:
            For each sample, in order, its reward or the reason why it has none.

        Raises:
            ModelError: There are conversations but the model has no chat template.
        """
        return [outcomes[0] for outcomes in self.score_groups([[sample] for sample in samples])]

    def score_groups(self, groups: Sequence[Sequence[Sample]]) -> list[list[Outcome]]:
        """Scores samples that may begin alike, such as the two sides of a pair.

        Returns:
            For each group the outcomes of its samples, in order.

        Raises:
            ModelError: There are conversations but the model has no chat template.
        """
        tokens = iter(self._tokenizer.encode([sample for group in groups for sample in group]))
        encoded = [list(islice(tokens, len(group))) for group in groups]
        outcomes: list[list[Any]] = [list(group) for group in encoded]
        for batch in self._batches(encoded):
            places = [place for placed in batch for place in placed.places]
            values = self._model.rewards([placed.group for placed in batch])
            for (row, column), value in zip(places, values.tolist(), strict=True):
                outcomes[row][column] = _outcome(value, outcomes[row][column])
        return outcomes

    def _batches(self, encoded: Sequence[Sequence[Tokens | Failure]]) -> Iterator[list[_Placed]]:
        flat = self._model.layout == "flat"
        placed = list(_place(encoded, share=flat and self._config.share_prefixes))
        if flat:
            sizes = [(len(p.group.prefix), [len(b) for b in p.group.branches]) for p in placed]
            for batch in pack_groups(sizes, self._max_batch_tokens):
                yield [placed[index].only(chosen) for index, chosen in batch]
        else:
            lengths = [len(p.group.branches[0]) for p in placed]
            budget = 1 if self._model.layout == "single" else self._max_batch_tokens
            for members in make_batches(lengths, budget):
                yield [placed[index] for index in members]

    def score_table(self, table: pa.Table, row_format: RowFormat) -> pa.Table:
        """Scores the rows of a table.

        Returns:
            The columns to add (`rayreward.columns`), row by row in the table's order.
        """
        rows = [
            row if isinstance(row, Failure) else row_format.samples(row)
            for row in read_rows(table, row_format.read)
        ]
        scored = iter(self.score_groups([row for row in rows if not isinstance(row, Failure)]))
        outcomes = [row if isinstance(row, Failure) else next(scored) for row in rows]
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
            layout=self._model.layout,
            share_prefixes=self._config.share_prefixes,
            batch_invariant=self._invariance,
            environment=find_environment(self._model.device),
        )


@dataclass(frozen=True, slots=True)
class _Placed:
    """A group to score, and for each of its texts where the reward goes: (row, column)."""

    group: Group
    places: tuple[tuple[int, int], ...]

    def only(self, chosen: range) -> _Placed:
        """The same with some of its texts."""
        branches = self.group.branches[chosen.start : chosen.stop]
        return _Placed(Group(self.group.prefix, branches), self.places[chosen.start : chosen.stop])


def _place(encoded: Sequence[Sequence[Tokens | Failure]], *, share: bool) -> Iterator[_Placed]:
    """Makes groups of what has tokens: a group a row, or one a text where nothing is shared."""
    for row, members in enumerate(encoded):
        texts = {(row, n): t.ids for n, t in enumerate(members) if isinstance(t, Tokens)}
        if share and texts:
            yield _Placed(share_prefix(list(texts.values())), tuple(texts))
        else:
            for place, ids in texts.items():
                yield _Placed(Group((), (ids,)), (place,))


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
