"""`runtime.load`, and the `Model` that it returns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

from runtime import generation, loading
from runtime.checkpoint import sources
from runtime.engine.options import BatchOptions, Options, StreamOptions
from runtime.engine.prompt import Batch, Encoded, Prompt
from runtime.engine.request import takes_options
from runtime.engine.result import GenerationResult
from runtime.engine.scheduler import check_open, close, is_closed
from runtime.engine.stream import Stream
from runtime.errors import InvalidArgument, InvalidArgumentType
from runtime.inspection import inspection
from runtime.inspection.result import Inspection
from runtime.model import model
from runtime.model.placement import Device, Dtype
from runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Model(model.Model):
    """A loaded decoder. Its methods are the functions of the package with the model in front.

    It is a context manager: leaving the `with` block closes it. Pickling gives the recipe to load it again.
    """

    tokenizer: Tokenizer | None  # None where the checkpoint has none: it takes ids only

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: Prompt, **options: Unpack[BatchOptions]
    ) -> GenerationResult: ...
    @overload
    def generate(self, prompt: Batch, **options: Unpack[BatchOptions]) -> list[GenerationResult]: ...
    @overload
    def generate(
        self, prompt: Encoded, **options: Unpack[BatchOptions]
    ) -> GenerationResult | list[GenerationResult]: ...
    @overload
    def generate(
        self, prompt: Prompt | Batch | Encoded, *, n: int, **options: Unpack[BatchOptions]
    ) -> list[GenerationResult]: ...
    @takes_options
    def generate(self, prompt: Prompt | Batch | Encoded, **options: Any) -> GenerationResult | list[GenerationResult]:
        """As `runtime.generate`."""
        return generation.generate(self, prompt, **options)

    @takes_options
    def stream(self, prompt: Prompt | Batch | Encoded, **options: Unpack[StreamOptions]) -> Stream:
        """As `runtime.stream`."""
        return generation.stream(self, prompt, **options)

    @overload
    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]) -> GenerationResult: ...
    @overload
    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, n: int, **options: Unpack[Options]
    ) -> list[GenerationResult]: ...
    @takes_options
    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> GenerationResult | list[GenerationResult]:
        """As `runtime.chat`."""
        return generation.chat(self, messages, **options)

    def inspect(
        self, prompt: Prompt | Encoded, top_k: int = 5, positions: Sequence[int] | None = None, steps: int = 0
    ) -> Inspection:
        """As `runtime.inspect`."""
        return inspection.inspect(self, prompt, top_k, positions, steps)

    def close(self) -> None:
        """Free the weights, the KV cache and the graphs, after the step under way if there is one. Every later call
        raises ModelClosed, and so does an unfinished stream, at its next piece. Closing a closed model does nothing.
        """
        close(self)

    def __enter__(self) -> Model:
        check_open(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    if not TYPE_CHECKING:  # else type checkers would accept any attribute

        def __getattr__(self, name: str) -> NoReturn:
            if name in ("weights", "rope"):  # removed by `close`
                check_open(self)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _facts(self) -> dict[str, str]:
        return {"name": repr(self.name), "closed": "True"} if is_closed(self) else super()._facts()

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_again, (self.name, asdict(self.runtime))

    def __copy__(self) -> NoReturn:
        raise InvalidArgumentType("a model is not copied: share it, since requests take turns, or load it again")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self.__copy__()


@overload
def load(
    source: str | os.PathLike[str] | None = ...,
    *,
    device: Device = ...,
    dtype: Dtype = ...,
    max_seq_len: int | None = ...,
    max_batch: int | str = ...,
    prefix_cache_tokens: int | None = ...,
    steps_per_graph: int = ...,
    eager: bool = ...,
    threads: int | str | None = ...,
    quantize: str | None = ...,
    progress: bool | None = ...,
    revision: str | None = ...,
    interface: Literal["runtime"] = ...,
) -> Model: ...
@overload
def load(
    source: str | os.PathLike[str] | None = ...,
    *,
    device: Device = ...,
    dtype: Dtype = ...,
    max_seq_len: int | None = ...,
    max_batch: int | str = ...,
    prefix_cache_tokens: int | None = ...,
    steps_per_graph: int = ...,
    eager: bool = ...,
    threads: int | str | None = ...,
    quantize: str | None = ...,
    progress: bool | None = ...,
    revision: str | None = ...,
    interface: Literal["hf"],
) -> Any: ...
def load(
    source: str | os.PathLike[str] | None = None,
    *,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_seq_len: int | None = None,
    max_batch: int | str = 1,
    prefix_cache_tokens: int | None = None,
    steps_per_graph: int = 1,
    eager: bool = False,
    threads: int | str | None = None,
    quantize: str | None = None,
    progress: bool | None = None,
    revision: str | None = None,
    interface: Literal["runtime", "hf"] = "runtime",
) -> Any:
    """Load a Gemma 1, 2 or 3 checkpoint.

    Args:
        source: a folder in Hugging Face's layout, a hub id (also as "owner/name@revision"), a `.gguf` file, or "demo".
            None means $GEMMA_RUNTIME_MODEL, or "demo" where that is not set.
        device: "cpu", "cuda", "cuda:N", the number of a CUDA device, a torch.device, or "auto" (CUDA where there is
            one).
        dtype: "float32", "bfloat16" or "float16", short ("fp32", "bf16", "fp16") or as a torch.dtype, or "auto": the
            checkpoint's own; "float32" where matrices stay integers with scales, see `quantize`.
        max_seq_len: longest prompt plus answer, in tokens, that buffers are made for; None means 4096, or the
            checkpoint's own limit where that is less.
        max_batch: most sequences that decode together, 1 to 64; or "auto": as many, up to 64, as leave everything but
            the weights within half of the memory that the weights leave free (at least 1, and 1 if the free memory is
            unknown). On a GPU a model of one row runs other kernels than one of more, which are faster for a single row
            and sum in another order: there, a request's tokens depend on this number, but never on what runs beside it.
        prefix_cache_tokens: how many tokens of earlier prompts are kept for prompts that begin alike; None for
            max_seq_len, 0 for none. The memory is allocated with the first request.
        steps_per_graph: decode steps in one launch of a CUDA graph, 1, 4 or 8: more of them leave the host less to do,
            but tokens arrive in bunches. Without effect on a CPU.
        eager: whether to decode by plain steps: without CUDA graphs, and on a CPU by Hugging Face's own operations, bit
            for bit, in place of compiled kernels.
        threads: how many threads compute on a CPU, 1 to 256; prefill and decoding alike, whatever
            torch.set_num_threads says later. None or "auto": as many as PyTorch would use, but no more than the
            process's affinity and its container's CPU quota allow. Tokens do not depend on it.
        quantize: "gguf" keeps the matrices of a GGUF file, or of the demo, in the file's own blocks: the model
            computes, on a CPU, in fp32 with exactly the values that the blocks stand for, and reads fewer bytes per
            token. Types without a kernel (F16, Q2_K, the IQ types) become fp32. "int8" and "int4" quantise any
            checkpoint's matrices, once, into the cache of converted models: to 8 bits with a scale per row, or to 4
            bits with one per 32 weights (GGUF's Q4_0; the embedding and the head to 8 bits). The model then computes
            likewise, on a GPU too, where dtype may be a 16-bit one (of activations, norms and KV cache); with any of
            these, dtype "auto" is "float32". None decides by dtype and device: on a CPU a GGUF file, or the demo, keeps
            its own blocks with dtype "auto" where compiled kernels can read them and they take fewer bytes than bf16,
            and a folder in compressed-tensors', GPTQ's or AWQ's integers keeps them with dtype "auto" or "float32";
            else they become values in the dtype, those of a GGUF file by way of bf16.
        progress: whether to draw progress bars on stderr; None draws them on a terminal only.
        revision: a branch, tag or commit of a hub repository.
        interface: "runtime" for a `Model`; "hf" for a model of transformers, as `wrap` returns it, on the same weights,
            which are then kept as values.

    Returns:
        The model, its weights packed on the device.

    Raises:
        FileNotFoundError: nothing is found under `source`.
        HubError, AccessDenied: the hub cannot be reached or refuses; the message names its status and reason.
        CheckpointError: the checkpoint is not one that can be run faithfully; the message names what is wrong.
        NotEnoughMemory: the memory plan does not fit; checked before allocating.
        ValueError, TypeError: an argument is out of range.
    """
    if interface not in ("runtime", "hf"):
        raise InvalidArgument(f'interface must be "runtime" or "hf", got {interface!r}')
    if interface == "hf" and quantize is not None:
        raise InvalidArgument(f'interface must be "runtime" with quantize={quantize!r}, got "hf", which needs values')
    resolved = loading.resolve(
        sources.pinned(source, revision),
        device=device,
        dtype=dtype,
        max_seq_len=max_seq_len,
        max_batch=max_batch,
        prefix_cache_tokens=prefix_cache_tokens,
        steps_per_graph=steps_per_graph,
        eager=eager,
        threads=threads,
        quantize=quantize,
        needs_values=interface == "hf",
        progress=progress,
    )
    model = loading.read(resolved, Model, progress)
    if interface == "runtime":
        return model
    from runtime.hugging_face.wrapping import on_model  # transformers takes a second to import

    return on_model(model, resolved.source.folder)


def wrap(
    hf_model: Any,
    *,
    max_seq_len: int | None = None,
    max_batch: int | str = 1,
    prefix_cache_tokens: int | None = None,
    steps_per_graph: int = 1,
    eager: bool = False,
    threads: int | str | None = None,
) -> Any:
    """Let a transformers model decode with this runtime: the same object for its callers, pipelines included, with
    another loop behind `generate`.

    Args:
        hf_model: transformers' GemmaForCausalLM, Gemma2ForCausalLM or Gemma3ForCausalLM, in float32, bfloat16 or
            float16 on one device, where it stays. Its parameters are moved one by one into packed memory and become
            views of it, so that the model works as before and there is one copy of the weights. Do not change the
            parameters afterwards.
        max_seq_len, max_batch, prefix_cache_tokens, steps_per_graph, eager, threads: as in `load`. Of a larger batch,
            max_batch rows decode together.

    Returns:
        A model whose class is a subclass of hf_model's, with the same modules and configs. Its `generate` takes and
        returns what transformers' does; docs/usage.md has the few things that it refuses.

    Raises:
        TypeError: it is no such model.
        CheckpointError: it has parameters or a config that this runtime cannot run faithfully.
        NotEnoughMemory: the memory plan does not fit beside the model.
        ValueError: an argument is out of range, or the model is wrapped already.
    """
    from runtime.hugging_face import wrapping  # transformers takes a second to import

    return wrapping.wrap(
        hf_model,
        Model,
        max_seq_len=max_seq_len,
        max_batch=max_batch,
        prefix_cache_tokens=prefix_cache_tokens,
        steps_per_graph=steps_per_graph,
        eager=eager,
        threads=threads,
    )


def _load_again(name: str, options: dict[str, Any]) -> Model:
    return loading.read(loading.resolve(name, progress=False, **options), Model, progress=False)
