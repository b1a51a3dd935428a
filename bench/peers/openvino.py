"""OpenVINO as an engine: the checkpoint exported by optimum-intel, run by openvino-genai."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import openvino_genai
from optimum.exporters.openvino import main_export

PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class Streamer(openvino_genai.StreamerBase):
    """Emits each token."""

    def __init__(self, emit: Callable[[int], None]) -> None:
        super().__init__()
        self._emit = emit

    def write(self, token: int | list[int]) -> openvino_genai.StreamingStatus:
        for each in [token] if isinstance(token, int) else token:
            self._emit(each)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


class Engine:
    version = f"openvino-genai {openvino_genai.__version__}"

    def export(self, folder: str, target: str, dtype: str) -> None:
        """Exports a checkpoint to OpenVINO's format in the given dtype; the export's default is the checkpoint's."""
        main_export(
            folder,
            target,
            task="text-generation-with-past",
            library_name="transformers",
            model_loading_kwargs={"torch_dtype": dtype},
        )

    def load(self, options: dict[str, Any]) -> None:
        if options["device"] != "cpu":
            raise ImportError("OpenVINO is compared on a CPU only")
        precision = PRECISION[options["dtype"]]
        self.pipeline = openvino_genai.LLMPipeline(
            options["exported"],
            "CPU",
            INFERENCE_PRECISION_HINT=precision,
            KV_CACHE_PRECISION=precision,
            INFERENCE_NUM_THREADS=options["threads"],
        )
        self.config = openvino_genai.GenerationConfig()
        self.config.do_sample = False
        self.config.ignore_eos = True

    def run(self, prompt: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        self.config.max_new_tokens = self.config.min_new_tokens = new_tokens
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        mask = openvino.Tensor(np.ones((1, len(prompt)), dtype=np.int64))
        self.pipeline.generate(openvino_genai.TokenizedInputs(ids, mask), self.config, Streamer(emit))
