"""vLLM as an engine, its step loop driven in this process so that each token is seen as soon as it exists."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # else a separate engine process hides the steps

import vllm


class Engine:
    version = f"vllm {vllm.__version__}"

    def load(self, options: dict[str, Any]) -> None:
        self.engine = vllm.LLM(
            options["folder"],
            dtype=options["dtype"],
            max_model_len=options["max_seq_len"],
            max_num_seqs=1,
            enable_prefix_caching=False,  # every run is given the same prompt
            gpu_memory_utilization=0.4,  # also of a CPU's memory, which the other engines share
        ).llm_engine
        self.requests = 0

    def run(self, prompt: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        self.requests += 1
        self.engine.add_request(str(self.requests), {"prompt_token_ids": prompt}, sampling)
        seen = 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                tokens = output.outputs[0].token_ids
                for token in tokens[seen:]:
                    emit(int(token))
                seen = len(tokens)

    def peak_memory_mb(self) -> None:
        """Not known: vLLM takes a share of the device up front."""
