"""transformers' models on our weights, in classes whose `generate` is ours."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from runtime import loading
from runtime.checkpoint.files import is_file
from runtime.checkpoint.weights import find_stored, is_tied, read_weights
from runtime.errors import InvalidArgument, InvalidArgumentType
from runtime.hugging_face.generation import RuntimeGeneration
from runtime.hugging_face.parameters import Parameters
from runtime.hugging_face.shared_weights import hugging_face
from runtime.model import memory_plan
from runtime.model.config import ModelConfig
from runtime.model.model import Model
from runtime.model.rope import RopeTables
from runtime.model.threads import let_children_compute

FAMILIES = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")


def wrap(
    hf_model: Any,
    kind: type[Model],
    *,
    max_seq_len: int | None = None,
    max_batch: int | str = 1,
    threads: int | str | None = None,
    **limits: Any,
) -> Any:
    """A model of transformers in memory, with our `generate`.

    Args:
        hf_model: of one of FAMILIES; its parameters become views of ours.
        kind: what to make of ours: Model or a subclass.
        max_seq_len, max_batch, threads, limits: as `loading.resolve`.

    Raises:
        as `runtime.wrap`.
    """
    classes: Any = tuple(getattr(transformers, name) for name in FAMILIES)
    if not isinstance(hf_model, classes):
        raise InvalidArgumentType(f"expected one of transformers' {', '.join(FAMILIES)}, got {type(hf_model).__name__}")
    if isinstance(hf_model, RuntimeGeneration):
        raise InvalidArgument("this model is wrapped already")
    parameters = Parameters(hf_model)
    requested = loading.requested(parameters.device, parameters.dtype, max_seq_len, max_batch, threads, **limits)
    # The config as config.json would hold it. The generation config is applied by transformers in each call.
    fields = json.loads(hf_model.config.to_json_string())
    config = ModelConfig.from_hf(fields, {"eos_token_id": hf_model.generation_config.eos_token_id})
    loading.check_max_seq_len(config, max_seq_len)
    stored, dtype = find_stored(parameters, config), getattr(torch, parameters.dtype)
    config = dataclasses.replace(config, tied=is_tied(stored, dtype))
    runtime = loading.fitted(requested, config, max_seq_len, max_batch)
    plan, device = memory_plan.plan(config, runtime), torch.device(runtime.device)
    memory_plan.check_fits(plan, device)
    let_children_compute()
    rope = RopeTables(config, runtime)
    weights = read_weights(stored, config, device, dtype)
    return _wrapped(hf_model, kind(config, runtime, weights, rope, None, hf_model.config.name_or_path or "", plan))


def on_model(model: Model, folder: Path) -> Any:
    """A transformers model that decodes with a model of ours and shares its weights.

    Args:
        model: as loaded; it needs no tokenizer, since transformers' callers have one.
        folder: its checkpoint, for transformers' configs.
    """
    hf_config = transformers.AutoConfig.from_pretrained(folder).get_text_config()
    has_own = is_file(folder / "generation_config.json")
    generation = transformers.GenerationConfig.from_pretrained(folder) if has_own else None
    hf_model = hugging_face(hf_config.to_dict(), model, generation)
    model.config = dataclasses.replace(model.config, processors={})  # transformers applies them
    return _wrapped(hf_model, model)


def _wrapped(hf_model: Any, model: Model) -> Any:
    wrapped = copy.copy(hf_model)
    wrapped.__class__ = _class_of(type(hf_model))  # type: ignore[arg-type]
    wrapped.gemma_runtime = model
    return wrapped


@functools.cache
def _class_of(base: type) -> type:
    """A transformers class with our `generate`; it keeps the name, by which pipelines know what they can run."""
    return type(base.__name__, (RuntimeGeneration, base), {"__module__": __name__, "__doc__": base.__doc__})
