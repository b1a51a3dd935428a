"""transformers' `generate` with this runtime in place of its decoding loop.

Everything around the loop is transformers' own: it merges configs and arguments, validates them, computes lengths, and
makes logits processors and stopping criteria. Only the loop is rewritten here, and gets the next token of each row from
one of our requests.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from runtime.errors import InvalidArgument
from runtime.hugging_face.rows import Batch, Row, RowProcessor
from runtime.model.generation_config import MAX_STOP_IDS
from runtime.model.model import Model

_NO = (None, False)
# Features of transformers that are not supported here, as arguments and as config fields with the values that turn them
# off.
_ARGUMENTS = (
    "assistant_model",
    "custom_generate",
    "inputs_embeds",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "past_key_values",
    "synced_gpus",
)
_FIELDS: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("is_assistant", "output_attentions", "output_hidden_states", "token_healing"), _NO
) | {"guidance_scale": (None, 1)}
# Fields of sampling that our requests have too, and those that only transformers' warpers know.
_OURS = ("temperature", "top_k", "top_p", "min_p")
_THEIRS: dict[str, tuple[Any, ...]] = {
    "top_h": (None,),
    "typical_p": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "watermarking_config": (None,),
    "renormalize_logits": _NO,
}
_SEED_BITS = 63


class RuntimeGeneration:
    """A base class put before one of transformers' causal LM classes, so that its `generate` decodes with this runtime.

    Attributes:
        gemma_runtime: the model that decodes, on the same weights.
    """

    gemma_runtime: Model
    _supported_generation_modes = ("greedy_search", "sample")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `GenerationMixin.generate`, which checks the arguments and calls back.

        Returns:
            Prompts and answers [batch * num_return_sequences, seq] int64, or a GenerateDecoderOnlyOutput without a
            cache. Scores and logits of a row that has ended are 0.

        Raises:
            ValueError: as transformers; or something is asked for that this runtime does not do, or the attention mask
                has zeros after a one, or prompt and answer do not fit max_seq_len.
        """
        theirs = super().generate  # type: ignore[misc]
        given = inspect.signature(theirs).bind(*args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        for name in _ARGUMENTS:
            value = given.get(name)
            if not (value is None or value is False):
                raise InvalidArgument(f"{name} must be None, got {type(value).__name__}: not supported here")
        if given.get("cache_implementation") == "paged":
            raise InvalidArgument("cache_implementation must not be 'paged': requests are batched here as they come")
        return theirs(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `to`, `cuda`, `half` and the like call: refused if it would move or convert the weights, which are ours.

        Raises:
            ValueError: it would move or convert them.
        """
        weight = self.get_input_embeddings().weight.detach()  # type: ignore[attr-defined]
        changed = fn(weight[:0])
        if (changed.device, changed.dtype) != (weight.device, weight.dtype):
            raise InvalidArgument(
                f"the model stays on {weight.device} in {weight.dtype}, got {changed.device} and {changed.dtype}: "
                "move or convert it before it is wrapped"
            )
        return self

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)  # type: ignore[misc]
        for name, neutral in _FIELDS.items():
            if (value := getattr(config, name, None)) not in neutral:
                raise InvalidArgument(f"{name} must be one of {neutral}, got {value!r}: not supported here")
        return config, model_kwargs

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Prepares nothing: the KV cache is ours."""

    def _get_logits_processor(self, **kwargs: Any) -> Any:
        """Returns the arguments for making processors, not the processors, since those differ from row to row."""
        return kwargs

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: dict[str, Any],
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """As transformers' `GenerationMixin._sample`: greedy or not."""
        config = generation_config
        mask = _left_padded(input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"))
        # As in transformers: rows that have ended are padded if a token can end rows; otherwise they go on.
        stops = {
            stop for one in stopping_criteria if type(one) is EosTokenCriteria for stop in one.eos_token_id.tolist()
        }
        ends_rows = any(hasattr(one, "eos_token_id") for one in stopping_criteria)
        lengths = [one.max_length for one in stopping_criteria if isinstance(one, MaxLengthCriteria)]
        most = max(1, min(lengths, default=config.max_length) - input_ids.shape[1])
        others = StoppingCriteriaList(
            one for one in stopping_criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria)
        )
        records = config.return_dict_in_generate and (config.output_scores or config.output_logits)
        told = sorted(stop for stop in stops if 0 <= stop < self.gemma_runtime.config.vocab)[:MAX_STOP_IDS]
        options = {"max_new_tokens": most, "ignore_eos": True, "stop_token_ids": told}
        seeds = torch.randint(2**_SEED_BITS - 1, (len(mask),)).tolist() if config.do_sample else [None] * len(mask)
        padding_token = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)

        batch = Batch(stops if ends_rows else None, padding_token)
        logits: list[torch.Tensor] = []
        scores: list[torch.Tensor] = []
        try:
            for index, prompt in enumerate(input_ids):
                processor, numbers = self._processor_of(index, prompt, mask[index], logits_processor, records)
                numbers |= {"seed": seeds[index]}
                batch.add(Row(self.gemma_runtime, prompt[mask[index]], processor, options | numbers))
            ids = torch.cat([input_ids, input_ids.new_zeros(len(mask), most)], dim=1)
            end = input_ids.shape[1]
            while not batch.is_over and end < ids.shape[1]:
                tokens = torch.tensor(batch.step(), device=ids.device)
                if records:
                    step = end - input_ids.shape[1]
                    logits.append(batch.recorded(lambda record: record.logits, step))
                    scores.append(batch.recorded(lambda record: record.scores, step))
                ids[:, end], end = tokens, end + 1
                if others:
                    shown = tuple(scores) if records and config.output_scores else None
                    batch.end(others(ids[:, :end].clone(), shown).tolist())
                if streamer is not None:
                    streamer.put(tokens.cpu())
        finally:
            batch.close()
        if streamer is not None:
            streamer.end()
        if not config.return_dict_in_generate:
            return ids[:, :end].clone()
        kept: dict[str, Any] = {
            "sequences": ids[:, :end].clone(),
            "scores": tuple(scores) if config.output_scores else None,
            "logits": tuple(logits) if config.output_logits else None,
        }
        return GenerateDecoderOnlyOutput(**kept)

    def _processor_of(
        self, index: int, ids: torch.Tensor, mask: torch.Tensor, made_of: dict[str, Any], records: bool
    ) -> tuple[RowProcessor | None, dict[str, Any]]:
        """The processor of a row's logits, if it needs one, and the options with which our request draws from the
        result.

        Args:
            index: the row's.
            ids: its prompt's, with padding [seq].
            mask: where the prompt is [seq], bool.
            made_of: transformers' arguments of `_get_logits_processor`, for the batch.
            records: whether logits and scores are kept.
        """
        make = super()._get_logits_processor  # type: ignore[misc]
        config = made_of["generation_config"]
        row = {**made_of, "encoder_input_ids": ids[None]}
        if "model_kwargs" in made_of:
            row["model_kwargs"] = {"attention_mask": mask[None].long()}
        if (allowed := made_of.get("prefix_allowed_tokens_fn")) is not None:
            row["prefix_allowed_tokens_fn"] = lambda _, sequence: allowed(index, sequence)
        warpers: Any = LogitsProcessorList()
        if not config.do_sample:
            processors, numbers = make(**row), {"temperature": 0.0}
        elif any(getattr(config, name, None) not in neutral for name, neutral in _THEIRS.items()):
            processors, numbers = make(**row), {"temperature": 1.0}
        else:
            numbers = {name: value for name in _OURS if (value := getattr(config, name)) is not None}
            warpers = make(GenerationConfig(do_sample=True, **dict.fromkeys(_OURS) | numbers))
            numbers = {"temperature": 1.0} | numbers
            processors = make(**{**row, "generation_config": _without_sampling(config)})
        if not (processors or records):
            return None, numbers
        prompt_tokens = int(mask.sum())
        return RowProcessor(ids[~mask], processors, warpers if records else None, prompt_tokens), numbers


def _without_sampling(config: GenerationConfig) -> GenerationConfig:
    """A copy that makes no warpers; shallow, since some fields are tensors or other shared objects."""
    greedy = type(config).__new__(type(config))
    vars(greedy).update(vars(config), do_sample=False)
    return greedy


def _left_padded(ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
    """Where the prompts' tokens are in a batch: [batch, seq] bool.

    Raises:
        ValueError: the mask has another shape, has zeros after or within a prompt, or masks a whole prompt; or
            positions are not those that follow from it.
    """
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise InvalidArgument(
            f"attention_mask must have the shape of input_ids {list(ids.shape)}, got {list(mask.shape)}"
        )
    mask = mask != 0
    if not bool(mask[:, -1].all()) or not bool((mask[:, 1:] >= mask[:, :-1]).all()):
        raise InvalidArgument(
            "attention_mask must have zeros to the left of a prompt alone (padding_side='left'), got zeros elsewhere"
        )
    expected = mask.long().cumsum(1) - 1
    if positions is not None and not torch.equal(positions[mask], expected[mask]):
        raise InvalidArgument("position_ids must count each prompt's tokens from 0, got others")
    return mask
