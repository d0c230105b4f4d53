"""G3, no neighbours: finds out whether a loaded model's rewards keep their bits in other company.

Promised by construction for the flat stream and for texts run one at a time, but kernels differ
between processors and versions: so it is tried, on the hardware at hand, whenever a model is
loaded. Knows batches of token ids; does not know text.
"""

from __future__ import annotations

from rayreward.config import ModelConfig
from rayreward.errors import ModelError
from rayreward.model import RewardModel, trial_groups
from rayreward.types import Group

_CROWD = 6
"""Times as many texts, of one token each: more than what numbers of texts are filled up to."""


def settle_invariance(model: RewardModel, config: ModelConfig, max_batch_tokens: int) -> str:
    """Tries G3, and takes what keeps it where the settings insist on it.

    That is a flat stream that always has the same number of tokens, so that no kernel ever sees
    another shape, or else one text at a time.

    Returns:
        The verdict, in words.

    Raises:
        ModelError: `batch_invariant=True`, and even one text at a time does not keep its bits.
    """
    if config.batch_invariant is False:
        return "not tried"
    moved_by = find_dependence(model)
    if moved_by and config.batch_invariant is True and model.layout == "flat":
        model.stream_multiple = max_batch_tokens
        moved_by = find_dependence(model)
    if moved_by and config.batch_invariant is True:
        model.layout = "single"
        moved_by = find_dependence(model)
        if moved_by:
            raise ModelError(
                f"Rewards of {config.model!r} change on this hardware {' and '.join(moved_by)}, "
                "even one text at a time, and batch_invariant=True insists that they don't. Leave "
                "it at 'auto' to score all the same."
            )
    return f"does not hold {', nor '.join(moved_by)}" if moved_by else "holds"


def find_dependence(model: RewardModel) -> tuple[str, ...]:
    """Compares rewards bitwise: alone, behind a crowd in the other order, with prefixes shared.

    Padded batches are not tried: some texts keep their bits there by luck, and others do not.

    Returns:
        The changes of company that moved a bit; none where G3 holds.
    """
    if model.layout == "padded":
        return ("in padded batches",)
    groups = trial_groups(model)
    singles = [Group((), (text,)) for group in groups for text in group.texts]
    crowd = [Group((), (text[:1],)) for group in singles for text in group.texts] * _CROWD
    expected = [reward for single in singles for reward in _rewards(model, [single])]
    behind = _rewards(model, crowd + singles[::-1])[len(crowd) :]
    trials = {"in other company": behind[::-1]}
    if model.layout == "flat":
        trials["with a shared prefix"] = _rewards(model, groups)
    return tuple(change for change, rewards in trials.items() if rewards != expected)


def _rewards(model: RewardModel, groups: list[Group]) -> list[float]:
    """All at once, if the layout lets them be."""
    batches = [[group] for group in groups] if model.layout == "single" else [groups]
    return [reward for batch in batches for reward in model.rewards(batch).tolist()]
