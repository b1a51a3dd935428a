"""llama.cpp as an engine, through llama-cpp-python, on a GGUF file of the same weights in the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llama_cpp


class Engine:
    version = f"llama-cpp-python {llama_cpp.__version__}"

    def load(self, options: dict[str, Any]) -> None:
        # Its default cache is fp16, which is smaller than ours in fp32.
        kind = llama_cpp.GGML_TYPE_F32 if options["dtype"] == "float32" else llama_cpp.GGML_TYPE_F16
        self.on_gpu = options["device"] != "cpu"
        if self.on_gpu and not llama_cpp.llama_supports_gpu_offload():
            raise ImportError("this llama-cpp-python was built without a GPU")
        self.model = llama_cpp.Llama(
            options["gguf"],
            n_ctx=options["max_seq_len"],
            n_threads=options["threads"],
            n_threads_batch=options["threads"],
            n_gpu_layers=-1 if self.on_gpu else 0,
            # Read into its own memory: a mapped file's pages were read at half the speed after some hours in the page
            # cache.
            use_mmap=False,
            type_k=kind,
            type_v=kind,
            verbose=False,
        )

    def run(self, prompt: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        self.model.reset()  # else it would reuse the last run's prompt from its cache
        for count, token in enumerate(self.model.generate(prompt, temp=0.0, repeat_penalty=1.0), 1):
            emit(int(token))
            if count == new_tokens:
                break

    if llama_cpp.llama_supports_gpu_offload():

        def peak_memory_mb(self) -> None:
            """Not known: llama.cpp's memory on a GPU is not the process's."""
