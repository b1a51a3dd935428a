"""The merges of a SentencePiece BPE, derived from its vocabulary: every split of a token into two tokens, ordered by
the merged token's id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runtime.errors import CheckpointError
from runtime.model.config_fields import shown

_MAX_LENGTHS = 1024  # distinct lengths of tokens; Gemma 3's vocabulary has 31
_MAX_WORK = 1 << 31  # characters read and splits tried; Gemma 3's vocabulary needs 4 % of that


def merges(
    tokens: Sequence[str], ids: Mapping[str, int], scores: Sequence[float | None] | None = None
) -> list[str] | list[list[str]]:
    """List the merges of a vocabulary, for `tokenizer.json`.

    Args:
        tokens: the vocabulary in order.
        ids: the index of each token in it.
        scores: SentencePiece's ranks, None for a token that no merge produces; None instead of a list if the file has
            none.

    Returns:
        Each merge as its two tokens separated by a space or, if any token contains a space, as a list of two.

    Raises:
        CheckpointError: the scores order merges differently than the ids, or the vocabulary is implausibly large.
    """
    lengths = {len(token) for token in tokens}
    if len(lengths) > _MAX_LENGTHS:
        raise CheckpointError(f"the GGUF file's tokens have {len(lengths)} different lengths: not a Gemma vocabulary")
    # Only splits into lengths that exist are tried, so a giant token costs nothing.
    lefts = {length: sorted((left for left in lengths if length - left in lengths), reverse=True) for length in lengths}
    if sum(len(lefts[len(token)]) * (len(token) + 64) for token in tokens) > _MAX_WORK:
        raise CheckpointError("the GGUF file has too many long tokens: not a Gemma vocabulary")
    pairs: list[list[str]] = []
    last = None
    for index, token in enumerate(tokens):
        splits = [[token[:left], token[left:]] for left in lefts[len(token)]]
        splits = [[left, right] for left, right in splits if left in ids and right in ids]
        pairs += splits
        score = scores[index] if scores is not None and splits else None
        if score is None:
            continue
        if last is not None and not last[0] > score:
            raise CheckpointError(
                f"tokenizer.ggml.scores must fall with each merge, as Gemma's do, got {last[0]} for "
                f"{shown(tokens[last[1]])} ({last[1]}) and {score} for {shown(token)} ({index})"
            )
        last = score, index
    if any(" " in token for token in tokens):
        return pairs
    return [" ".join(pair) for pair in pairs]  # loads a third faster, but ambiguous if a token contains a space
