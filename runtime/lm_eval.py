"""The model `gemma-runtime` for lm-evaluation-harness, with the scores of the harness's own `hf` model.

    python -m runtime.lm_eval --model gemma-runtime --model_args pretrained=demo --tasks arc_easy

The harness finds models in a table of its own, which importing this module adds to. So `python -m runtime.lm_eval` is
the harness's command line with this model in it, and in Python

    import lm_eval, runtime.lm_eval

    lm_eval.simple_evaluate("gemma-runtime", {"pretrained": "demo"}, tasks=["arc_easy"])

Where the harness leaves a rule to the model (BOS, truncation, the dtype of the softmax, stop strings), the rule is the
`hf` model's. That model (0.4.13) mixes up continuations of unequal length whose contexts and all tokens but the last
are together the same; here they score as they do alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from runtime.errors import MissingPackage

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        Collator,
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise MissingPackage(
        f"runtime.lm_eval needs the eval extra (pip install 'gemma-runtime[eval]'): {error}", name=error.name
    ) from error

from runtime.config import DTYPES, MAX_BATCH
from runtime.errors import InvalidArgument
from runtime.generate import generate
from runtime.kernels.argmax import logits_reference
from runtime.kernels.rms_norm import rms_norm_reference
from runtime.load import examine, load
from runtime.non_finite import non_finite
from runtime.prefill import prefill
from runtime.request import whole_number
from runtime.state import new_state

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_GEN_TOKS = 256  # the `hf` model's, where a task does not say
ROWS_AT_ONCE = 64  # positions whose logits exist together: a quarter of a million fp32 numbers each
WITHOUT_EFFECT = {"temperature", "top_k", "top_p", "min_p", "typical_p"}  # on greedy decoding

_log = logging.getLogger(__name__)


@register_model("gemma-runtime")
class GemmaRuntimeLM(TemplateLM):
    """A model of this runtime as the harness sees one.

    Args:
        pretrained: what `runtime.load` takes; None means $GEMMA_RUNTIME_MODEL, or "demo" where that is not set.
        device, dtype, eager: as in `runtime.load`.
        max_length: longest sequence in tokens, 2 or more; what is longer loses its beginning. None means the
            checkpoint's max_position_embeddings, for which there must be memory.
        batch_size: prompts that `generate_until` answers together, 1 to 8, or "auto" for 8; no answer depends on it.
        softmax_dtype: "float32", "bfloat16" or "float16", what log-probabilities are computed and added up in. None
            means the model's dtype, as in the `hf` model: in 16 bits that leaves three digits of a score, or two.

    Raises:
        ValueError, TypeError: an argument is out of range, or the model has no tokenizer.
        OSError, MemoryError: as `runtime.load`.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_length: int | None = None,
        batch_size: int | str = 1,
        softmax_dtype: str | None = None,
        eager: bool = False,
    ) -> None:
        super().__init__()
        if softmax_dtype not in (None, *DTYPES):
            raise InvalidArgument(f"softmax_dtype must be one of {DTYPES}, got {softmax_dtype!r}")
        if isinstance(batch_size, str):  # the harness's command line gives text
            if batch_size != "auto" and not batch_size.isdecimal():
                raise InvalidArgument(
                    f'batch_size must be a number from 1 to {MAX_BATCH} or "auto", got {batch_size!r}'
                )
            batch_size = MAX_BATCH if batch_size == "auto" else int(batch_size)
        self.batch_size = whole_number("batch_size", batch_size, least=1, most=MAX_BATCH)
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"  # "cuda:0" is the harness's default, whatever the machine
        if max_length is None:
            max_length = examine(pretrained, device=device, dtype=dtype, max_seq_len=1).config.max_position_embeddings
        self.max_length = whole_number("max_length", max_length, least=2)
        self.model = load(
            pretrained,
            device=device,
            dtype=dtype,
            max_seq_len=self.max_length,
            max_batch=self.batch_size,
            eager=eager,
        )
        if self.model.tokenizer is None:
            raise InvalidArgument(f"the harness works on text, but {self.model.name} has no tokenizer")
        self._text = self.model.tokenizer  # `tokenizer` is the harness's name for one of transformers
        self._softmax_dtype = None if softmax_dtype is None else getattr(torch, softmax_dtype)
        self._device = self.model.device

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has no context."""
        return self._text.bos_id

    @property
    def eot_token_id(self) -> int:
        """The first of the checkpoint's stop tokens, or BOS where it has none."""
        return next(iter(self.model.config.stop_token_ids), self._text.bos_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text: with one BOS, whether or not the text begins with it; with `add_special_tokens=False` only
        where it does."""
        ids, bos = self._text.encode(string), self._text.bos_id
        added = ids[:1] == [bos] and not string.startswith(self._text.piece(bos))
        return ids[1:] if added and add_special_tokens is False else ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each cut into windows of at most max_length tokens."""
        totals = []
        for (text,) in tqdm([request.args for request in requests], "rolling log-likelihoods", disable=disable_tqdm):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each cut before the first of its stop strings.

        Raises:
            ValueError: a task asks for anything but greedy decoding, or for no fewer than max_length tokens.
        """
        batches = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(args[0]), args[0]),
            group_fn=lambda args: args[1],
            group_by="gen_kwargs",
        )
        answers = []
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as bar:
            for batch in batches.get_batched(n=self.batch_size):
                texts = self._answers([context for context, _ in batch], batch[0][1])
                for args, text in zip(batch, texts, strict=True):
                    self.cache_hook.add_partial("generate_until", args, text)
                answers += texts
                bar.update(len(texts))
        return batches.get_original(answers)

    def _answers(self, contexts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        options = dict(normalize_gen_kwargs(asked, MAX_GEN_TOKS))
        until = handle_stop_sequences(options.pop("until"), eos=self._text.piece(self.eot_token_id))
        max_gen_toks = options.pop("max_gen_toks")
        if options.pop("do_sample") or options.keys() - WITHOUT_EFFECT:
            raise InvalidArgument(f"gemma-runtime decodes greedily: expected do_sample=False and no more, got {asked}")
        whole_number("max_gen_toks", max_gen_toks, least=1, most=self.max_length - 1)
        prompts = [self._last(self.tok_encode(context), self.max_length - max_gen_toks) for context in contexts]
        results = generate(self.model, prompts, max_new_tokens=max_gen_toks, stop=until)
        return [self._cut(result.token_ids, until) for result in results]

    def _cut(self, ids: list[int], until: list[str]) -> str:
        """The text of an answer, cut as the `hf` model cuts it: a special token among the stop strings ends it too."""
        alone = [self.tok_encode(string, add_special_tokens=False) for string in until]
        special = {token for token, *more in alone if not more and not self._text.decode([token])}
        end = next((at for at, token in enumerate(ids) if token in special), len(ids))
        return postprocess_generated_text(self._text.decode(ids[:end]), until, think_end_token=None)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For (cache key, context, continuation) each: the log-likelihood of the continuation, and whether greedy
        decoding would give it."""
        sharing: dict[tuple[int, ...], list[int]] = {}  # one-token answers to one question differ in no input
        for index, (_, context, continuation) in enumerate(requests):
            whole_number("tokens of a continuation", len(continuation), least=1, most=self.max_length)
            inputs = self._last(context + continuation, self.max_length + 1)[:-1]
            sharing.setdefault(tuple(inputs), []).append(index)

        scores: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for ids, indices in sharing.items():
                for index, score in zip(indices, self._score(ids, [requests[at][2] for at in indices]), strict=True):
                    scores[index] = score
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], score)
                bar.update(len(indices))
        return scores

    def _score(self, ids: Sequence[int], continuations: list[list[int]]) -> list[tuple[float, bool]]:
        """Scores continuations that share their input: `ids` ends with every one's tokens but its last."""
        model, most = self.model, max(map(len, continuations))
        with model.turn.taken():
            if model.state is None:
                model.state = new_state(model, model.runtime.max_batch)
            hidden = torch.empty(len(ids), model.config.hidden, dtype=model.dtype, device=model.device)
            prefill(model, model.state, 0, ids, hidden_out=hidden)

        padded = [[0] * (most - len(continuation)) + continuation for continuation in continuations]
        targets = torch.tensor(padded, device=model.device).T  # [most, continuations]
        blocks = zip(hidden[-most:].split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
        chosen, best = zip(*(self._judge(x, wanted) for x, wanted in blocks), strict=True)
        log_probs, greedy = torch.cat(chosen).T.contiguous(), torch.cat(best).tolist()
        return [
            (float(row[-len(continuation) :].sum()), greedy[-len(continuation) :] == continuation)
            for row, continuation in zip(log_probs, continuations, strict=True)
        ]

    @torch.inference_mode()
    def _judge(self, x: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """After the residual stream x [n, hidden]: the log-probabilities of the tokens `wanted` [n, any], and the
        likeliest token [n]."""
        weights, config = self.model.weights, self.model.config
        normed = rms_norm_reference(x, weights.final_norm, config.rms_norm_eps)
        log_probs = logits_reference(normed, weights.head, config.final_softcap).log_softmax(
            -1, dtype=self._softmax_dtype
        )
        if not log_probs.amax(-1).isfinite().all():
            raise non_finite(self.model, "of a text to be scored")
        return log_probs.gather(1, wanted), log_probs.argmax(-1)

    def _last(self, ids: list[int], most: int) -> list[int]:
        if (excess := len(ids) - most) > 0:
            _log.warning(
                "%d tokens are too many for max_length = %d: dropped the first %d", len(ids), self.max_length, excess
            )
        return ids[-most:]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
