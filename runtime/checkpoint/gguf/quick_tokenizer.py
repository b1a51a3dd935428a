"""A tokenizer.json that the `tokenizers` library reads in half the time: the same tokenizer, written for its parser.

A SentencePiece vocabulary has a merge for every split of a token into two others, twice as many merges as tokens. Of
the merges that give a token, only one is ever made. Take a text in which a token's characters are merged into it from
`left` and `right`. No earlier merge crossed the ends of these characters, so the merges within them came in the order
in which the token's text is merged on its own, which is the same in every text. So merging that text alone tells which
merge it is, and the token's other merges are dropped. But a character without a token starts as the tokens of its
bytes, or as the unknown one: a token whose text contains the text of such a token may be made from it as well as from
the text's own characters, and keeps all its merges.

The library parses the vocabulary into a B-tree of texts, where a text that sorts before all others is inserted with one
comparison a level: hence the descending order here.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

MOST_CHARACTERS = 64  # of a token whose merges are tried, in time quadratic in them; longer ones keep all

_BYTE = "<0x[0-9A-Fa-f]{2}>"  # the text of a byte's token

Merge = tuple[str, str]


def quick_json(tokenizer: Mapping[str, Any]) -> str:
    """The text of a tokenizer.json with the same ids for every text.

    Args:
        tokenizer: its contents, with a BPE that drops no merges at random.
    """
    model = tokenizer["model"]
    merges = made(pairs_of(model["merges"]), model["unk_token"])
    has_spaces = any(" " in text for merge in merges for text in merge)
    quick = model | {
        "vocab": dict(sorted(model["vocab"].items(), reverse=True)),
        "merges": [list(merge) if has_spaces else " ".join(merge) for merge in merges],
    }
    return json.dumps({**tokenizer, "model": quick}, ensure_ascii=False, separators=(",", ":"))


def pairs_of(merges: Sequence[str | Sequence[str]]) -> list[Merge]:
    """The merges of a tokenizer.json, in either of its forms."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def made(merges: Sequence[Merge], unknown: str | None = None) -> list[Merge]:
    """Those of a BPE's merges that are made in some text, in order; the others change no text's ids.

    Args:
        merges: all.
        unknown: the token for characters that have none of their own.
    """
    no_characters = re.compile(f"{_BYTE}|{re.escape(unknown)}" if unknown else _BYTE)
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    splits: dict[str, list[Merge]] = {}
    for merge in ranks:
        splits.setdefault("".join(merge), []).append(merge)
    kept: list[Merge] = []
    for token, its in splits.items():
        is_open = 1 < len(its) and len(token) <= MOST_CHARACTERS and not no_characters.search(token)
        last = _last_merge(token, ranks) if is_open else None
        kept += its if last is None else [last]
    return sorted(kept, key=ranks.__getitem__)


def _last_merge(token: str, ranks: Mapping[Merge, int]) -> Merge | None:
    """The last merge when a token's characters are merged, always the first in rank, then in place; None if they never
    become one token."""
    parts, never = list(token), len(ranks)
    found = [ranks.get(pair, never) for pair in itertools.pairwise(parts)]
    while (first := min(found)) < never:
        place = found.index(first)
        merge = parts[place], parts[place + 1]
        if len(parts) == 2:
            return merge
        parts[place : place + 2] = ["".join(merge)]
        del found[place]
        if place > 0:
            found[place - 1] = ranks.get((parts[place - 1], parts[place]), never)
        if place < len(found):
            found[place] = ranks.get((parts[place], parts[place + 1]), never)
    return None
