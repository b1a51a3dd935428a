"""One chunk of a prompt in prefill: the operations that all families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from runtime.families.kv_cache import KVCache
from runtime.kernels.attention import attention_torch
from runtime.kernels.linear import linear_torch
from runtime.kernels.rms_norm import rms_norm_torch
from runtime.kernels.rotary import rotary_torch
from runtime.model.model import Model
from runtime.model.weights import LayerWeights


class BaseChunk(ABC):
    """The operations of every family's layers on `seq` tokens; subclasses say how these use the cache."""

    model: Model
    cache: KVCache
    seq: int
    is_last: bool = True  # of its prompt; nothing reads what the last layer makes of another one

    def only_caches(self, index: int) -> bool:
        """Whether layer `index` is there for its keys and values alone."""
        return not self.is_last and index == len(self.model.config.layers) - 1

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
        q = self._heads(index, x, layer.qkv.split(config.layers[index].qkv_widths)[0])
        if layer.q_norm is not None:
            q = self.norm(q, layer.q_norm)
        attended = attention_torch(
            rotary_torch(q, *self._angles(index)),
            keys,
            values,
            scale=config.attention_scale,
            mask=mask,
            softcap=config.attention_softcap,
        )
        return linear_torch(attended, layer.output)

    def cache_keys(self, index: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Caches layer `index`'s keys and values of the normalised residual x [1, seq, hidden].

        Returns:
            All keys and values that the tokens may attend to, and their mask, as `attention_torch` takes them.
        """
        layer = self.model.weights.layers[index]
        _, k_weight, v_weight = layer.qkv.split(self.model.config.layers[index].qkv_widths)
        k, v = self._heads(index, x, k_weight), self._heads(index, x, v_weight)
        if layer.k_norm is not None:
            k = self.norm(k, layer.k_norm)
        return self._extend(index, rotary_torch(k, *self._angles(index)), v)

    def _heads(self, index: int, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The heads [1, any, seq, head_dim] that a part of layer `index`'s packed projection makes of x."""
        head_dim = self.model.config.layers[index].head_dim
        return linear_torch(x, weight).view(1, self.seq, -1, head_dim).transpose(1, 2)

    def mlp(self, layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        """A layer's MLP on the normalised residual x [1, seq, hidden]; returns [1, seq, hidden]."""
        gate_weight, up_weight = layer.gate_up.chunk(2)
        gate = F.gelu(linear_torch(x, gate_weight), approximate="tanh")
        return linear_torch(gate * linear_torch(x, up_weight), layer.down)

    @abstractmethod
    def _angles(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary cos and sin [seq, head_dim / 2] of the tokens in layer `index`."""

    @abstractmethod
    def _extend(
        self, index: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Caches k and v [1, kv_heads, seq, head_dim] in layer `index`; returns all keys and values that the tokens may
        attend to, and their mask, as `attention_torch` takes it."""


@dataclass(repr=False)
class Chunk(BaseChunk):
    """The positions [start, start + seq) of the sequence in one row of the cache, as Hugging Face runs them."""

    model: Model
    cache: KVCache
    row: int
    start: int
    seq: int
    is_last: bool = True
    _masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    def _angles(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.model.rope.for_layer(index)
        return cos[self.start : self.start + self.seq], sin[self.start : self.start + self.seq]

    def _extend(
        self, index: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        keys, values = self.cache.extend(index, self.row, self.start, k, v)
        return keys, values, self._mask(keys.shape[2], self.model.config.layers[index].window, keys.device)

    def _mask(self, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """The mask [1, 1, seq, keys] of the last `keys` positions, or None where Hugging Face passes none."""
        slides = window is not None and keys >= window
        explicit = self.seq > 1 and (keys != self.seq or self.model.config.attention_softcap is not None)
        if not slides and not explicit:
            return None
        if (keys, window) not in self._masks:
            end = self.start + self.seq
            query = torch.arange(self.start, end, device=device)[:, None]
            key = torch.arange(end - keys, end, device=device)
            mask = key <= query
            if window is not None:
                mask &= key > query - window
            self._masks[keys, window] = mask[None, None]
        return self._masks[keys, window]
