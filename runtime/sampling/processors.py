"""What is done to the logits of one answer before a token is picked or drawn: transformers' own processors, in their
order there, and those that it lacks.

Each takes all token ids so far [1, seq] int64 and logits [1, vocab] fp32 and returns logits, as transformers' do.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from runtime.errors import CheckpointError, InvalidArgument, InvalidArgumentType
from runtime.model.model import Model
from runtime.sampling.params import SamplingParams

M = TypeVar("M", bound=Model)
T = TypeVar("T")
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Ends:
    """Where an answer begins and ends."""

    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: Collection[int]


def processors_of(
    params: SamplingParams, checkpoint: Mapping[str, Any], ends: Ends, custom: Sequence[Processor], device: torch.device
) -> list[Processor]:
    """The processors of an answer, in the order in which they run.

    Args:
        params: what the request says.
        checkpoint: fields of transformers' GenerationConfig, by name, that apply where the request says nothing;
            without those that change nothing.
        ends: of the answer.
        custom: the request's own, which come last.
        device: of the logits.

    Source: transformers' generation/utils.py (`GenerationMixin._get_logits_processor`); the penalties of OpenAI's API.
    """
    fields = dict(checkpoint)
    for name, value, neutral in (
        ("repetition_penalty", params.repetition_penalty, 1.0),
        ("min_new_tokens", params.min_new_tokens, 0),
    ):
        if value == neutral:
            fields.pop(name, None)
        elif value is not None:
            fields[name] = value
    found: list[Processor] = []
    if params.logit_bias:
        found.append(LogitBias(params.logit_bias, device))
    if fields:
        found += _transformers_processors(fields, ends, device)
    if params.presence_penalty or params.frequency_penalty:
        found.append(AnswerPenalty(len(ends.prompt), params.presence_penalty, params.frequency_penalty))
    return [*found, *(CheckedProcessor(index, processor) for index, processor in enumerate(custom))]


def _transformers_processors(fields: Mapping[str, Any], ends: Ends, device: torch.device) -> list[Processor]:
    # Imported here: it takes a second, which few requests need. Any: its types are narrower than what it takes.
    from transformers.generation import logits_process

    theirs: Any = logits_process

    length, stops = len(ends.prompt), sorted(ends.stop_ids)
    prompt = torch.tensor([list(ends.prompt)], device=device)
    eos = torch.tensor(stops, device=device)
    makers: dict[str, Callable[[Any], Processor]] = {
        "sequence_bias": lambda pairs: theirs.SequenceBiasLogitsProcessor([[ids, float(bias)] for ids, bias in pairs]),
        "encoder_repetition_penalty": lambda penalty: theirs.EncoderRepetitionPenaltyLogitsProcessor(
            float(penalty), prompt
        ),
        "repetition_penalty": lambda penalty: theirs.RepetitionPenaltyLogitsProcessor(float(penalty)),
        "no_repeat_ngram_size": theirs.NoRepeatNGramLogitsProcessor,
        # It makes a list for each length up to the size; n-grams of one token more than the prompt do not occur either.
        "encoder_no_repeat_ngram_size": lambda size: theirs.EncoderNoRepeatNGramLogitsProcessor(
            min(size, length + 1), prompt
        ),
        "bad_words_ids": lambda words: theirs.NoBadWordsLogitsProcessor(words, eos if stops else None),
        "min_length": lambda least: theirs.MinLengthLogitsProcessor(least, eos, device=device),
        "min_new_tokens": lambda least: theirs.MinNewTokensLengthLogitsProcessor(length, least, eos, device=device),
        "forced_bos_token_id": theirs.ForcedBOSTokenLogitsProcessor,
        "forced_eos_token_id": lambda ids: theirs.ForcedEOSTokenLogitsProcessor(
            length + ends.max_new_tokens, ids, device=device
        ),
        "exponential_decay_length_penalty": lambda decay: theirs.ExponentialDecayLengthPenalty(
            tuple(decay), eos, length
        ),
        "suppress_tokens": lambda ids: theirs.SuppressTokensLogitsProcessor(ids, device=device),
        "begin_suppress_tokens": lambda ids: theirs.SuppressTokensAtBeginLogitsProcessor(
            ids,
            length if length > 1 or fields.get("forced_bos_token_id") is None else length + 1,
            device=device,
        ),
        "renormalize_logits": lambda _: theirs.LogitNormalization(),
    }
    of_stops = () if stops else ("min_length", "min_new_tokens", "exponential_decay_length_penalty")
    return [
        NamedProcessor(name, make, fields[name])
        for name, make in makers.items()
        if name in fields and name not in of_stops
    ]


class NamedProcessor:
    """A processor of transformers. If it fails, that is an error of the checkpoint, which names the field: a token id
    beyond the vocabulary, a factor whose power overflows."""

    def __init__(self, name: str, make: Callable[[Any], Processor], value: Any) -> None:
        self._name = name
        self._processor = self._try(make, value)

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return self._try(self._processor, ids, logits)

    def _try(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return call(*args)
        except Exception as error:
            reason = textwrap.shorten(str(error), 300) or type(error).__name__
            raise CheckpointError(f"{self._name} cannot be applied: {reason}") from error


class LogitBias:
    """Adds to the logits of some tokens: ids and what is added to each."""

    def __init__(self, biases: Mapping[int, float], device: torch.device) -> None:
        self._ids = torch.tensor([int(token) for token in biases], device=device)
        self._biases = torch.tensor([float(bias) for bias in biases.values()], device=device)

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_add(1, self._ids, self._biases[None])


class AnswerPenalty:
    """Lowers the logits of tokens that occur in the answer: by `presence` once, and by `frequency` per occurrence.

    Source: the definition in OpenAI's API reference; only the answer counts, not its prompt.
    """

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self._prompt_tokens, self._presence, self._frequency = prompt_tokens, presence, frequency

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        tokens, counts = ids[0, self._prompt_tokens :].unique(return_counts=True)
        return logits.index_add(1, tokens, -(self._presence + self._frequency * counts)[None].to(logits.dtype))


class CheckedProcessor:
    """A processor of the caller, whose result is checked."""

    def __init__(self, index: int, processor: Processor) -> None:
        self._name, self._processor = f"logits_processors[{index}]", processor

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        result = self._processor(ids, logits)
        if not isinstance(result, torch.Tensor):
            raise InvalidArgumentType(f"{self._name} must return a tensor of logits, got {type(result).__name__}")
        if result.shape != logits.shape or not result.is_floating_point():
            raise InvalidArgument(
                f"{self._name} must return logits of shape {tuple(logits.shape)}, "
                f"got {tuple(result.shape)} of {result.dtype}"
            )
        return result


def without_processors(model: M) -> M:
    """A model without its checkpoint's processors, sharing all else: for comparing the logits themselves."""
    if not model.config.processors:
        return model
    return dataclasses.replace(model, config=dataclasses.replace(model.config, processors={}))
