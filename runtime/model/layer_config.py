"""One layer's sizes and attention, and how a Hugging Face config lists them."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.model.config_fields import MAX_LAYERS, Fields, refuse
from runtime.model.rope_config import LAYER_TYPES, RopeConfig, read_ropes


@dataclass(frozen=True)
class LayerConfig:
    """One layer of a decoder; layers may differ.

    Args:
        window: sliding window in keys, the query's own included; None where the layer attends to everything.
        rope: rotary embedding.
        heads, kv_heads: query heads; key/value heads, which divide them.
        head_dim: elements of one head, even.

    Raises:
        CheckpointError: a size is out of range.
    """

    window: int | None
    rope: RopeConfig
    heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        sizes = Fields(vars(self), {})
        heads, kv_heads, head_dim = map(sizes.integer, ("heads", "kv_heads", "head_dim"))
        if self.window is not None:
            sizes.integer("window")
        if heads % kv_heads:
            refuse("heads", f"a multiple of the {kv_heads} key/value heads", heads)
        if head_dim % 2:
            refuse("head_dim", "even for the rotary embedding", head_dim)

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        """How many outputs of the packed QKV projection are queries, keys and values."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    def slots(self, max_seq_len: int) -> int:
        """How many positions of a sequence of up to `max_seq_len` tokens the layer's KV cache holds at once."""
        return min(self.window or max_seq_len, max_seq_len)


def read_layers(family: str, fields: Fields) -> tuple[LayerConfig, ...]:
    """The layers of a Hugging Face config.

    Raises:
        CheckpointError: a field is missing, out of range or not supported; it is named.
    """
    types, ropes = _layer_types(family, fields), read_ropes(family, fields)
    heads, kv_heads, head_dim = map(fields.integer, ("num_attention_heads", "num_key_value_heads", "head_dim"))
    window = fields.integer("sliding_window", minimum=2) if "sliding_attention" in types else None
    return tuple(
        LayerConfig(window if layer_type == "sliding_attention" else None, ropes[layer_type], heads, kv_heads, head_dim)
        for layer_type in types
    )


def _layer_types(family: str, fields: Fields) -> list[str]:
    layers, types = fields.integer("num_hidden_layers", maximum=MAX_LAYERS), fields["layer_types"]
    if types is None:
        if family == "gemma":
            return ["full_attention"] * layers
        every = 2 if family == "gemma2" else fields.integer("sliding_window_pattern")
        return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    allowed = LAYER_TYPES[:1] if family == "gemma" else LAYER_TYPES
    if not isinstance(types, list) or len(types) != layers or any(given not in allowed for given in types):
        refuse("layer_types", f"a list of {layers}, each {' or '.join(allowed)}", types)
    return types
