"""Cases of eight rows, of which each has to have the bits that it has alone: small and in a published model's size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.check.attention_cases import attention_case, pair_case
from runtime.check.catalogue import Make
from runtime.check.head_cases import head_case
from runtime.check.step_cases import advance_case, linear_case, norm_case, projection_case
from runtime.model.published import PUBLISHED

ROWS = 8
# No older key, a few, around the ends of blocks of keys (of 4 to 64), and round a ring.
POSITIONS = (0, 5, 31, 32, 33, 64, 70, 95)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model's operations; `vocab` and `window` are cut where a check of all of them takes long."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    window: int


SMALL = Sizes(hidden=128, intermediate=48, heads=4, kv_heads=2, head_dim=32, vocab=301, window=40)


def published_sizes(name: str) -> Sizes:
    """Those of a published model, with 4096 tokens and a window of 64."""
    config = PUBLISHED[name]
    return Sizes(
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab=4096,
        window=64,
    )


def batch_cases(sizes: Sizes) -> dict[str, Make]:
    """By operation, a case of eight rows."""
    hidden, width = sizes.hidden, sizes.heads * sizes.head_dim
    qkv = width + 2 * sizes.kv_heads * sizes.head_dim

    def attention(dtype: torch.dtype):
        shape = sizes.heads, sizes.kv_heads, sizes.head_dim
        return attention_case(POSITIONS, *shape, sizes.window, dtype, qk_norm=True)

    return {
        "rms_norm": lambda dtype: norm_case(ROWS, hidden, dtype, with_residual=True),
        "qkv_projection": lambda dtype: projection_case("qkv_projection", ROWS, qkv, hidden, dtype, branched=True),
        "decode_attention": attention,
        "attention_and_projection": lambda dtype: pair_case(attention(dtype), hidden),
        "residual_linear": lambda dtype: linear_case(ROWS, hidden, sizes.intermediate, dtype, with_residual=True),
        "gated_mlp": lambda dtype: projection_case("gated_mlp", ROWS, sizes.intermediate, hidden, dtype, branched=True),
        "lm_head_argmax": lambda dtype: head_case(ROWS, sizes.vocab, hidden, dtype, branched=True, softcap=30.0),
        "advance": lambda dtype: advance_case(ROWS, hidden, dtype),
    }
