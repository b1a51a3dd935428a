"""Small random checkpoints, written by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TINY = {
    "vocab_size": 99,
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 256,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """A function that writes a random model of a family and returns Hugging Face's model and its folder."""

    def make(family: str = "gemma3", dtype: torch.dtype = torch.float32, shard: str = "1GB", **overrides: Any):
        import transformers

        name = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3": "Gemma3"}[family]
        config_class = getattr(transformers, f"{name}TextConfig" if family == "gemma3" else f"{name}Config")
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config_class(**TINY | overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.5)
        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        return model, folder

    return make
