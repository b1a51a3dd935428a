"""One chunk of a prompt in prefill: the operations that all families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from runtime.families.kv_cache import KVCache
from runtime.kernels.attention import attention_torch, folded_mask
from runtime.kernels.linear import has_products, linear_in_fp32, linear_torch
from runtime.kernels.quantized import Matrix
from runtime.kernels.rms_norm import rms_norm_torch
from runtime.kernels.rotary import rotary_torch
from runtime.kernels.scaled_matrix import ScaledMatrix
from runtime.model.layer_config import LayerConfig
from runtime.model.model import Model
from runtime.model.weights import LayerWeights


class BaseChunk(ABC):
    """The operations of every family's layers on `seq` tokens; subclasses say how these use the cache."""

    model: Model
    cache: KVCache
    seq: int
    residual_wanted: bool = True  # whether the last layer's is read, as after a prompt's last chunk

    def only_caches(self, index: int) -> bool:
        """Whether layer `index` is run only for its keys and values."""
        return not self.residual_wanted and index == len(self.model.config.layers) - 1

    def norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Gemma's RMSNorm of x [1, seq, hidden]."""
        assert weight is not None
        return rms_norm_torch(x, weight, self.model.config.rms_norm_eps)

    def attention(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Layer `index`'s attention on the normalised residual x [1, seq, hidden], caching keys and values.

        Returns:
            [1, seq, hidden].
        """
        config, layer = self.model.config, self.model.weights.layers[index]
        keys, values, mask = self.cache_keys(index, x)
        q = self.queries(index, x).unflatten(2, (keys.shape[0], -1))[0].transpose(0, 1)
        attended = attention_torch(
            q, keys, values, scale=config.attention_scale, mask=mask, softcap=config.attention_softcap
        )
        return self.linear(attended.flatten(0, 1)[None], layer.output)

    def queries(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Layer `index`'s queries [1, heads, seq, head_dim] of the normalised residual x [1, seq, hidden], after rotary
        embedding."""
        layer = self.model.weights.layers[index]
        q = self._heads(index, x, layer.qkv.split(self.model.config.layers[index].qkv_widths)[0])
        if layer.q_norm is not None:
            q = self.norm(q, layer.q_norm)
        return rotary_torch(q, *self._angles(index))

    def cache_keys(self, index: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Caches layer `index`'s keys and values of the normalised residual x [1, seq, hidden].

        Returns:
            As `_extend`.
        """
        layer = self.model.weights.layers[index]
        _, k_weight, v_weight = layer.qkv.split(self.model.config.layers[index].qkv_widths)
        k, v = self._heads(index, x, k_weight), self._heads(index, x, v_weight)
        if layer.k_norm is not None:
            k = self.norm(k, layer.k_norm)
        return self._extend(index, rotary_torch(k, *self._angles(index)), v)

    def _heads(self, index: int, x: torch.Tensor, weight: Matrix) -> torch.Tensor:
        """The heads [1, any, seq, head_dim] that a part of layer `index`'s packed projection makes of x."""
        head_dim = self.model.config.layers[index].head_dim
        return self.linear(x, weight).view(1, self.seq, -1, head_dim).transpose(1, 2)

    def mlp(self, layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        """A layer's MLP on the normalised residual x [1, seq, hidden]; returns [1, seq, hidden]."""
        gate_weight, up_weight = layer.gate_up.split(len(layer.gate_up) // 2)
        gate = F.gelu(self.linear(x, gate_weight), approximate="tanh")
        return self.linear(gate * self.linear(x, up_weight), layer.down)

    def linear(self, x: torch.Tensor, weight: Matrix) -> torch.Tensor:
        """x [1, seq, columns] times the rows of weight: Hugging Face's own operation; or, unless the model is eager,
        one that rounds alike where that operation is slow or the matrix is in blocks."""
        if self.model.runtime.eager or not x.is_cpu or isinstance(weight, ScaledMatrix):
            return linear_torch(x, weight)
        has_library = isinstance(weight, torch.Tensor) and has_products(x.dtype)
        return linear_torch(x, weight) if has_library else linear_in_fp32(x, weight)

    @abstractmethod
    def _angles(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary cos and sin [seq, head_dim / 2] of the tokens in layer `index`."""

    @abstractmethod
    def _extend(
        self, index: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Caches k and v [1, kv_heads, seq, head_dim] in layer `index`.

        Returns:
            All keys and values [blocks, kv_heads, any, head_dim] that the tokens, split into as many blocks, may attend
            to, and the mask as `attention_torch` takes it, the same for each block.
        """


# PyTorch's attention on a CPU takes queries in blocks of this many where there are at least 768, each on one thread.
QUERY_BLOCK, LEAST_QUERIES = 256, 768
# Past a sliding window a chunk's tokens attend in blocks of this many, each to the keys of its own windows.
SLIDING_BLOCK = 64


@dataclass(repr=False)
class Chunk(BaseChunk):
    """The positions [start, start + seq) of the sequence in one row of the cache, as Hugging Face runs them."""

    model: Model
    cache: KVCache
    row: int
    start: int
    seq: int
    residual_wanted: bool = True
    _masks: dict[tuple[int, int | None, int], torch.Tensor] = field(default_factory=dict)

    def _angles(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.model.rope.for_layer(index)
        return cos[self.start : self.start + self.seq], sin[self.start : self.start + self.seq]

    def _extend(
        self, index: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        keys, values = self.cache.extend(index, self.row, self.start, k, v)
        layer = self.model.config.layers[index]
        blocks = self._blocks(layer, keys.shape[2])
        if blocks > 1:
            step = self.seq // blocks
            size = keys.shape[2] - self.seq + step
            keys, values = (x.unfold(2, size, step)[0].permute(1, 0, 3, 2) for x in (keys, values))  # views
        return keys, values, self._mask(layer, keys.shape[2], blocks)

    def _blocks(self, layer: LayerConfig, keys: int) -> int:
        """How many blocks the tokens attend in: one, unless the keys before the chunk fill a window, so that all blocks
        have the same number of keys, fewer than all."""
        fills = layer.window is not None and keys - self.seq >= layer.window - 1
        takes_blocks = self._on_cpu and not self.model.runtime.eager and self.seq % SLIDING_BLOCK == 0
        return self.seq // SLIDING_BLOCK if fills and takes_blocks else 1

    def _mask(self, layer: LayerConfig, keys: int, blocks: int = 1) -> torch.Tensor | None:
        """A layer's mask over the last `keys` positions up to the end of the chunk's first block, as `attention_torch`
        takes it; None where Hugging Face passes none."""
        slides = layer.window is not None and keys >= layer.window
        explicit = self.seq > 1 and (keys != self.seq or self.model.config.attention_softcap is not None)
        if not slides and not explicit:
            return None
        groups = layer.heads // layer.kv_heads if self._folds(layer, blocks) else 1
        key = keys, layer.window, groups
        if key not in self._masks:
            mask = self._visible(keys, layer.window, self.seq // blocks)[None, None]
            self._masks[key] = folded_mask(mask, groups, self.model.dtype) if groups > 1 else mask
        return self._masks[key]

    def _folds(self, layer: LayerConfig, blocks: int) -> bool:
        """Whether the query heads that share a key head run as queries of one head, which is faster as long as the
        larger blocks of queries leave no thread idle. The sums are the same."""
        queries = layer.heads // layer.kv_heads * self.seq
        shares = layer.heads * self.seq % (QUERY_BLOCK * self.model.runtime.threads) == 0
        is_faster = blocks > 1 or (queries >= LEAST_QUERIES and shares)
        return is_faster and self._on_cpu

    @property
    def _on_cpu(self) -> bool:
        """Whether it runs PyTorch's fused attention on a CPU."""
        return self.model.config.attention_softcap is None and self.model.device.type == "cpu"

    def _visible(self, keys: int, window: int | None, queries: int) -> torch.Tensor:
        """Which of the last `keys` positions each of the first `queries` tokens sees, [queries, keys] bool."""
        end, device = self.start + queries, self.model.device
        query = torch.arange(self.start, end, device=device)[:, None]
        key = torch.arange(end - keys, end, device=device)
        visible = key <= query
        if window is not None:
            visible &= key > query - window
        return visible
