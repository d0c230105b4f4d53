"""Rows in, rewards out, in one process and on one device: tokenizer, batches and model together.

An actor holds one `Scorer`; without Ray it can be used by itself. Does not know Ray or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import isfinite
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from rayreward.batching import make_batches, pack_branches, share_prefixes
from rayreward.budget import find_budget
from rayreward.checkpoint import Checkpoint, open_checkpoint
from rayreward.columns import reward_columns
from rayreward.config import ModelConfig
from rayreward.errors import ConfigError
from rayreward.fingerprint import Fingerprint, Proof, find_environment
from rayreward.hashing import hash_tensors, hash_text, hash_tokenizer, hash_weights
from rayreward.invariance import settle_invariance
from rayreward.items import to_samples
from rayreward.loading import load_model
from rayreward.meter import ModelTime
from rayreward.model import RewardModel
from rayreward.oom import Halving, Parts, read
from rayreward.preferences import RowFormat, read_samples
from rayreward.probe import encode_probe
from rayreward.tokenization import Tokenizer, load_tokenizer, padding_id
from rayreward.turns import Turns
from rayreward.types import Branch, Failure, Outcome, Reward, Sample, Status, Tokens


class Scorer:
    """A reward model with its tokenizer, on one device.

    Several threads may score: each reads and tokenizes as it likes, and the model is one thread's
    at a time.

    Attributes:
        turns: By which threads use the model.
        batches_done: Grows while it works.
    """

    def __init__(
        self,
        model: RewardModel,
        tokenizer: Tokenizer,
        checkpoint: Checkpoint,
        config: ModelConfig,
        invariance: str,
        max_batch_tokens: int,
    ) -> None:
        self._model = model
        self._rewards = Halving(model.rewards)
        self.turns = Turns()
        self.batches_done = 0
        self._tokenizer = tokenizer
        self._checkpoint = checkpoint
        self._config = config
        self._invariance = invariance
        self._max_batch_tokens = max_batch_tokens

    @classmethod
    def load(cls, config: ModelConfig, device: str = "auto") -> Scorer:
        """Loads model and tokenizer.

        Args:
            config: What decides a reward.
            device: `cpu`, `cuda:0`, or `auto`: the first GPU where there is one.

        Raises:
            ModelError: The checkpoint can't be loaded as a reward model.
            ConfigError: A setting does not fit the model, or the device is not here.
        """
        if not isinstance(config, ModelConfig):
            raise ConfigError(
                f"Expected a ModelConfig, and got a {type(config).__name__}. Pass "
                "ModelConfig(model=…, seed=…)."
            )
        if device == "auto":
            device = "cuda:0" if torch.cuda.is_available() else "cpu"
        _check_device(device)
        checkpoint = open_checkpoint(config.model, config.revision)
        hf = load_tokenizer(checkpoint.path)
        pad_id = padding_id(hf, checkpoint.pad_id, config.pad_token)
        model = load_model(checkpoint, config, pad_id, device)
        max_length = config.max_length or model.loaded.max_positions
        tokens = config.max_batch_tokens
        budget = find_budget(model) if tokens == "auto" else tokens
        invariance = settle_invariance(model, config, budget)
        tokenizer = Tokenizer(hf, max_length=max_length, truncation=config.truncation)
        return cls(model, tokenizer, checkpoint, config, invariance, budget)

    def score(self, batch: Iterable[Any]) -> list[Outcome]:
        """Scores what `RewardPool.score` takes: texts, records, conversations, samples.

        Returns:
            For each item, in order, its reward or the reason why it has none.

        Raises:
            DataError: It is one item and no batch, or an item is none of these.
            ModelError: There are conversations but the model has no chat template.
        """
        return [
            outcomes[0]
            for outcomes in self.score_groups([[sample] for sample in to_samples(batch)])
        ]

    def score_groups(
        self, groups: Sequence[Sequence[Sample]], time_spent: ModelTime | None = None
    ) -> list[list[Outcome]]:
        """Scores samples that may begin alike, such as the two sides of a pair.

        Args:
            groups: The samples of each group.
            time_spent: Where to count how long the model works.

        Returns:
            For each group the outcomes of its samples, in order.

        Raises:
            ModelError: There are conversations but the model has no chat template.
        """
        tokens = iter(self._tokenizer.encode([sample for group in groups for sample in group]))
        encoded = [list(islice(tokens, len(group))) for group in groups]
        return self._score_encoded(encoded, time_spent or ModelTime())

    def _score_encoded(
        self, encoded: Sequence[Sequence[Tokens | Failure]], time_spent: ModelTime
    ) -> list[list[Outcome]]:
        values = self._values(self._texts(encoded), time_spent, share=self._shares)
        # a text may have lost its reward to the NaN of one that it shared its start with
        beside = [
            text for text, value in values.items() if value is not None and not isfinite(value)
        ]
        if beside and self._shares:
            values |= self._values(beside, time_spent, share=False)
        return [
            [
                item if isinstance(item, Failure) else _outcome(values[self._needed(item)], item)
                for item in group
            ]
            for group in encoded
        ]

    def _values(
        self, texts: Sequence[tuple[int, ...]], time_spent: ModelTime, *, share: bool
    ) -> dict[tuple[int, ...], float | None]:
        """What the model makes of each text; null where it does not fit into memory."""
        batches = self._batches(texts, share=share)

        def run() -> list[list[float | None]]:
            with time_spent.running():
                return list(self._run(batches))

        return {
            branch.ids: value
            for batch, rewards in zip(batches, self.turns.take(run), strict=True)
            for branch, value in zip(batch, rewards, strict=True)
        }

    def _run(self, batches: Iterable[list[Branch]]) -> Iterator[list[float | None]]:
        """Scores batches one after the other.

        A batch is laid out and begun before the one before it is read: a GPU need not wait.
        """
        begun: Parts | None = None
        for batch in batches:
            parts = self._rewards(batch)
            if begun is not None:
                yield read(begun)
            begun = parts
            self.batches_done += 1
        if begun is not None:
            yield read(begun)

    def _texts(self, encoded: Sequence[Sequence[Tokens | Failure]]) -> list[tuple[int, ...]]:
        """The ids of what has tokens, each text once."""
        found = (item for members in encoded for item in members)
        return list(dict.fromkeys(self._needed(i) for i in found if isinstance(i, Tokens)))

    def _needed(self, tokens: Tokens) -> tuple[int, ...]:
        return self._model.needed(tokens.ids)

    @property
    def _shares(self) -> bool:
        return self._model.shares_prefixes and self._config.share_prefixes

    def _batches(self, texts: Sequence[tuple[int, ...]], *, share: bool) -> list[list[Branch]]:
        model, tokens = self._model, self._max_batch_tokens
        apart = [Branch(text) for text in texts]
        if model.layout == "flat":
            branches = share_prefixes(sorted(texts), model.worth_sharing) if share else apart
            return pack_branches(branches, tokens)
        batches = make_batches(list(map(len, texts)), tokens)
        return [[apart[index] for index in batch] for batch in batches]

    def score_table(
        self,
        table: pa.Table,
        row_format: RowFormat,
        time_spent: ModelTime | None = None,
        lost: Mapping[int, Failure] = MappingProxyType({}),
    ) -> pa.Table:
        """Scores the rows of a table.

        Args:
            table: The rows.
            row_format: From `check_schema`.
            time_spent: Where to count how long the model works.
            lost: Rows that are not to be scored, by their number, and why.

        Returns:
            The columns to add (`rayreward.columns`), row by row in the table's order.
        """
        rows = read_samples(table, row_format, lost)
        groups = [row for row in rows if not isinstance(row, Failure)]
        scored = iter(self.score_groups(groups, time_spent))
        outcomes = [row if isinstance(row, Failure) else next(scored) for row in rows]
        return reward_columns(row_format.kind, outcomes)

    def prove(self) -> Proof:
        """Scores the probe and hashes the live weights."""
        return self.turns.take(self._prove)

    def _prove(self) -> Proof:
        probe = self._probe()  # first: a long text may leave rotary frequencies in a buffer
        head = self._model.head.tensors
        return Proof(
            head=hash_tensors(head.items()),
            body=hash_weights((n, t) for n, t in self._model.tensors() if n not in head),
            derived=hash_weights(self._model.derived()),
            probe=probe,
        )

    def fingerprint(self) -> Fingerprint:
        """What this scorer holds and computes now, from the live weights."""
        loaded, hf, proof = self._model.loaded, self._tokenizer.hf, self.prove()
        return Fingerprint(
            head=proof.head,
            body=proof.body,
            tokenizer=hash_tokenizer(hf),
            chat_template=hash_text(str(hf.chat_template)) if hf.chat_template else None,
            head_origin=loaded.head_origin,
            revision=self._checkpoint.revision,
            architecture=self._model.architecture,
            dtype=loaded.dtype,
            max_length=self._tokenizer.max_length,
            truncation=self._config.truncation,
            pad_id=self._model.pad_id,
            share_prefixes=self._config.share_prefixes,
            max_batch_tokens=self._max_batch_tokens,
            attention=self._model.attention,
            layout=self._model.layout,
            compiled=self._model.fused is not None,
            batch_invariant=self._invariance,
            derived=proof.derived,
            probe=proof.probe,
            environment=find_environment(self._model.device),
        )

    def head_state(self) -> dict[str, NDArray[np.float32]]:
        """The head's weights by name, as copies on the host."""
        tensors = self._model.head.tensors.items()
        return {name: tensor.cpu().numpy().copy() for name, tensor in tensors}

    def take_head(self, head: Mapping[str, NDArray[np.float32]]) -> None:
        """Overwrites the head with another one of the same shape, bit for bit."""
        for name, tensor in self._model.head.tensors.items():
            tensor.copy_(torch.from_numpy(head[name].copy()))

    def _probe(self) -> tuple[float | None, ...]:
        encoded = encode_probe(self._tokenizer.hf, self._tokenizer.max_length)
        outcomes = self._score_encoded([[tokens] for tokens in encoded], ModelTime())
        return tuple(o.value if isinstance(o, Reward) else None for [o] in outcomes)


def _check_device(device: str) -> None:
    here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if device not in here:
        raise ConfigError(
            f"device={device!r} is not here. Pass 'auto', or one of {', '.join(here)}."
        )


def _outcome(value: float | None, tokens: Tokens) -> Outcome:
    if value is None:
        detail = f"{len(tokens.ids)} tokens do not fit into the device's memory"
        return Failure(Status.OUT_OF_MEMORY, detail, tokens=len(tokens.ids))
    if isfinite(value):
        return Reward(value, len(tokens.ids), tokens.truncated)
    return Failure(Status.NOT_FINITE, f"the model answered {value}", tokens=len(tokens.ids))
