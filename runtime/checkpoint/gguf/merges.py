"""The merges of a SentencePiece BPE, from its vocabulary alone: every split of a token into two tokens is one, ranked
by the id of what it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runtime.checkpoint.gguf.header import shown
from runtime.errors import CheckpointError

_MAX_LENGTHS = 1024  # different lengths of tokens; Gemma 3's vocabulary has 31
_MERGE_WORK = 1 << 31  # characters looked at and splits tried, of which Gemma 3's vocabulary needs a twenty-fifth


def merges(
    tokens: Sequence[str], ids: Mapping[str, int], scores: Sequence[float | None] | None = None
) -> list[str] | list[list[str]]:
    """List the merges of a vocabulary, for `tokenizer.json`.

    Args:
        tokens: the vocabulary in order.
        ids: the place of each token in it.
        scores: by which SentencePiece ranks its merges, None for a token that it does not merge to; None for all where
            the order of the vocabulary is all that is known.

    Returns:
        Each merge as its two parts joined by a space or, where tokens hold spaces, as a list of two.

    Raises:
        CheckpointError: the scores rank merges in another order than ids do, or the vocabulary's size is absurd.
    """
    lengths = {len(token) for token in tokens}
    if len(lengths) > _MAX_LENGTHS:
        raise CheckpointError(f"the GGUF file's tokens have {len(lengths)} different lengths, no vocabulary of Gemma's")
    # A giant token costs nothing: splits are tried only where tokens of both lengths exist.
    cuts = {length: sorted((cut for cut in lengths if length - cut in lengths), reverse=True) for length in lengths}
    if sum(len(cuts[len(token)]) * (len(token) + 64) for token in tokens) > _MERGE_WORK:
        raise CheckpointError("the GGUF file has too many long tokens to be a vocabulary of Gemma's")
    pairs: list[list[str]] = []
    last = None
    for index, token in enumerate(tokens):
        splits = [[token[:cut], token[cut:]] for cut in cuts[len(token)]]
        splits = [[left, right] for left, right in splits if left in ids and right in ids]
        pairs += splits
        score = scores[index] if scores is not None and splits else None
        if score is None:
            continue
        if last is not None and not last[0] > score:
            raise CheckpointError(
                f"tokenizer.ggml.scores must fall from merge to merge, as Gemma's do, got {last[0]} for "
                f"{shown(tokens[last[1]])} ({last[1]}) and {score} for {shown(token)} ({index})"
            )
        last = score, index
    if any(" " in token for token in tokens):
        return pairs
    return [" ".join(pair) for pair in pairs]  # loads a third faster, but is ambiguous if a token holds a space
