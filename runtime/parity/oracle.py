"""The oracle: a model's logits with every operation in fp64, on the weights that the model runs.

Hugging Face in `.double()` cannot serve, since its norms and rotary embedding cast to fp32. Weights are converted to
fp64 one layer, and one slice of the vocabulary, at a time, so that no second copy of the model is needed.

What defines the model keeps the rounding of its dtype: the weights, and the embedding's scale, sqrt(hidden) rounded to
that dtype. Everything else that an implementation rounds is its error: the frequencies and angles of the rotary
embedding, which Hugging Face computes in fp32, are fp64 here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.errors import InvalidArgument
from runtime.model.config import ModelConfig
from runtime.model.rope_config import RopeConfig
from runtime.model.weights import LayerWeights, Matrix, ModelWeights

QUERIES = 256  # attended at a time
VOCAB_SLICE = 16384  # rows of the head at a time


@dataclass(frozen=True, repr=False)
class Oracle:
    """The fp64 model on whole texts, without a KV cache."""

    config: ModelConfig
    weights: ModelWeights

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], last: int) -> torch.Tensor:
        """The logits after each of the last positions of a text.

        Args:
            ids: the text, from its first token.
            last: how many positions, 1 to len(ids).

        Returns:
            [last, vocab] fp64 on the model's device.

        Raises:
            ValueError: last is out of range.
        """
        if not 1 <= last <= len(ids):
            raise InvalidArgument(f"last: expected 1 to {len(ids)} (the text), got {last}")
        config, table = self.config, self.weights.embedding
        scale = torch.tensor(config.hidden**0.5, dtype=self.weights.final_norm.dtype).double().item()
        rows = torch.tensor(ids, device=table.device)
        x = (F.embedding(rows, table) if isinstance(table, torch.Tensor) else table.rows(rows)).double() * scale
        for index, layer in enumerate(self.weights.layers):
            branch = self._attention(index, layer, self._norm(x, layer.attention_norm))
            x = x + self._branch_norm(branch, layer.post_attention_norm)
            branch = _mlp(layer, self._norm(x, layer.mlp_norm))
            x = x + self._branch_norm(branch, layer.post_mlp_norm)
        x = self._norm(x[-last:], self.weights.final_norm)
        logits = torch.cat([F.linear(x, _double(rows)) for rows in self.weights.head.split(VOCAB_SLICE)], dim=1)
        return logits if config.final_softcap is None else _softcap(logits, config.final_softcap)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        mean_square = x.pow(2).mean(-1, keepdim=True)
        return x / (mean_square + self.config.rms_norm_eps).sqrt() * (1.0 + weight.double())

    def _branch_norm(self, branch: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        return branch if norm is None else self._norm(branch, norm)

    def _attention(self, index: int, layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        config, sizes, seq = self.config, self.config.layers[index], len(x)
        q, k, v = (
            F.linear(x, _double(weight)).view(seq, -1, sizes.head_dim).transpose(0, 1)
            for weight in layer.qkv.split(sizes.qkv_widths)
        )  # [heads, seq, head_dim]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        cos, sin = _angles(sizes.rope, seq, sizes.head_dim, x.device)
        groups = sizes.heads // sizes.kv_heads
        q = _rotated(q, cos, sin) * config.attention_scale
        k, v = (heads.repeat_interleave(groups, dim=0) for heads in (_rotated(k, cos, sin), v))
        position, window, attended = torch.arange(seq, device=x.device), sizes.window, []
        for query in position.split(QUERIES):
            first = 0 if window is None else max(0, int(query[0]) - window + 1)
            key = position[first : int(query[-1]) + 1]
            scores = q[:, query] @ k[:, key].transpose(1, 2)
            if config.attention_softcap is not None:
                scores = _softcap(scores, config.attention_softcap)
            visible = key <= query[:, None]
            if window is not None:
                visible &= key > query[:, None] - window
            attended.append(scores.masked_fill_(~visible, -torch.inf).softmax(dim=-1) @ v[:, key])
        return F.linear(torch.cat(attended, dim=1).transpose(0, 1).reshape(seq, -1), _double(layer.output))


def oracle_bytes(config: ModelConfig, text: int, last: int) -> int:
    """Bytes that `Oracle.logits` takes at most, for a text of `text` tokens and `last` positions."""
    widest = max(3 * config.intermediate, *(sum(layer.qkv_widths) for layer in config.layers))
    layer = 2 * config.intermediate * config.hidden
    attention = max(layer.heads * (QUERIES * text * 3 + 3 * text * layer.head_dim) for layer in config.layers)
    head = VOCAB_SLICE * config.hidden + 2 * last * config.vocab
    return 8 * (max(layer + text * widest, attention, head) + 4 * text * config.hidden)


def _mlp(layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    gate_weight, up_weight = layer.gate_up.split(len(layer.gate_up) // 2)
    gate = F.gelu(F.linear(x, _double(gate_weight)), approximate="tanh")
    return F.linear(gate * F.linear(x, _double(up_weight)), _double(layer.down))


def _double(weight: Matrix) -> torch.Tensor:
    return (weight if isinstance(weight, torch.Tensor) else weight.dequantized()).double()


def _softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    return torch.tanh(x / cap) * cap


def _angles(rope: RopeConfig, seq: int, head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [seq, head_dim / 2] of every position."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    angle = torch.arange(seq, dtype=torch.float64, device=device)[:, None] / (rope.theta**exponent * rope.factor)
    return angle.cos(), angle.sin()


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
