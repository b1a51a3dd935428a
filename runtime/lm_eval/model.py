"""A model of this runtime as the harness sees one, with the rules of the harness's own `hf` model."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from runtime.api import load
from runtime.checkpoint import sources
from runtime.engine.request import whole_number
from runtime.errors import InvalidArgument
from runtime.generation import generate
from runtime.lm_eval import arguments
from runtime.lm_eval.chat import load_tokenizer, render_chat
from runtime.lm_eval.scoring import score
from runtime.loading import resolve
from runtime.model.placement import resolve_device

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_log = logging.getLogger("gemma_runtime")


@register_model("gemma-runtime")
class GemmaRuntimeLM(TemplateLM):
    """A model of this runtime as the harness sees one.

    Args:
        pretrained: what `runtime.load` takes; None means $GEMMA_RUNTIME_MODEL, or "demo" where that is not set.
        device: "auto", "cpu", "cuda" or "cuda:N"; "cuda" and "cuda:0" mean the CPU where there is no CUDA device.
        dtype, eager, quantize: as in `runtime.load`; a dtype may also be "torch.bfloat16" or `torch.bfloat16`.
        revision: a branch, tag or commit of a hub repository.
        max_length: longest sequence in tokens, 2 or more; longer ones lose their beginning. None means the
            checkpoint's max_position_embeddings, for which there must be memory.
        batch_size: prompts that `generate_until` answers together, 1 to 64, or "auto" (also
            "auto:N") for as many as `runtime.load` takes for its max_batch="auto"; no answer depends on it.
        max_batch_size: the most that "auto" takes.
        softmax_dtype: "float32", "bfloat16" or "float16", the dtype that log-probabilities are computed and summed in.
            None means the model's dtype, as in the `hf` model; in 16 bits a score then has two or three digits.
        add_bos_token: whether texts begin with BOS; None leaves it to the tokenizer.
        prefix_token_id: the token before a text that has no context; None means BOS, or EOS where there is none.
        chat_template_args: further arguments of the chat template.
        others: arguments of the `hf` model, accepted at values that change nothing.

    Raises:
        ValueError, TypeError: an argument is unknown or out of range, or the model has no tokenizer.
        OSError, MemoryError: as `runtime.load`.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = "auto",
        dtype: str | torch.dtype | None = "auto",
        revision: str | None = None,
        max_length: int | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        softmax_dtype: str | torch.dtype | None = None,
        eager: bool = False,
        quantize: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        arguments.check_model_arguments(others)
        if add_bos_token not in (None, True, False):
            raise InvalidArgument(f"add_bos_token must be True, False or None, got {add_bos_token!r}")
        softmax_name = arguments.read_dtype("softmax_dtype", softmax_dtype)
        self._softmax_dtype = None if softmax_name is None else getattr(torch, softmax_name)
        device = resolve_device(arguments.read_device(device))
        batch, may_shrink = arguments.read_batch_size(batch_size, max_batch_size)
        if revision == "main" and "@" not in str(pretrained):
            revision = None  # what the harness passes by default, for any source
        source = sources.pinned(pretrained, None if revision is None else str(revision))
        options: dict[str, Any] = {
            "device": device,
            "dtype": arguments.read_dtype("dtype", dtype) or "auto",
            "quantize": quantize,
            "eager": eager,
        }
        resolved = resolve(source, max_seq_len=1, **options)
        longest = resolved.config.max_position_embeddings if max_length is None else max_length
        self.max_length = whole_number("max_length", longest, least=2)
        options["max_seq_len"] = self.max_length
        if may_shrink:
            batch = min(batch, resolve(source, max_batch="auto", **options).runtime.max_batch)
        self.model = load(source, max_batch=batch, **options)
        self.batch_size = batch
        if self.model.tokenizer is None:
            raise InvalidArgument(f"the harness works on text, but {self.model.name} has no tokenizer")
        self.tokenizer = load_tokenizer(resolved.source.folder, add_bos_token)
        self._sampling_defaults = arguments.sampling_defaults(resolved.source.folder)
        self._add_bos_token = add_bos_token
        if prefix_token_id is not None:
            whole_number("prefix_token_id", prefix_token_id, least=0, most=self.model.config.vocab - 1)
        self._prefix_token_id = prefix_token_id
        self._chat_template_args = dict(chat_template_args or {})
        self._device = self.model.device

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text."""
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name in the keys of the harness's request cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with BOS as the tokenizer or `add_bos_token` says; none is added to a text that begins with
        it."""
        return self._encode(string, add_special_tokens, self.tokenizer.decode(self.prefix_token_id))

    def _encode(self, string: str, add_special_tokens: bool | None, bos: str | None) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = self._add_bos_token
            if bos is not None and string.startswith(bos):
                add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat by the checkpoint's template, without system messages if the template refuses them.

        Args:
            chat_history: messages with `role` and `content`.
            add_generation_prompt: whether the model's turn begins; otherwise the last message is left open.

        Raises:
            ValueError: there is no template, or it refuses these messages.
        """

        return render_chat(
            self.tokenizer,
            chat_history,
            self.model.name,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._chat_template_args,
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each split into windows of at most max_length tokens."""
        totals = []
        for (text,) in tqdm([request.args for request in requests], "rolling log-likelihoods", disable=disable_tqdm):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            disjoint = [(None, *make_disjoint_window(window)) for window in windows]
            scores = self._loglikelihood_tokens(disjoint, disable_tqdm=True)
            totals.append(sum(log_likelihood for log_likelihood, _ in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each cut before the first of its stop strings. Where a task samples, torch's generator, which the
        harness seeds, gives each answer its seed.

        Raises:
            ValueError: a task asks for beams or another mode of decoding, or for max_length tokens or more.
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

    def _answers(self, contexts: Sequence[str], gen_kwargs: dict[str, Any]) -> list[str]:
        eos = self.tokenizer.decode(self.eot_token_id)
        asked = arguments.read_generation_arguments(gen_kwargs, eos, self.max_length, self._sampling_defaults)
        bos = self.tokenizer.bos_token
        most = self.max_length - asked.max_gen_toks
        prompts = [self._last(self._encode(context, None, bos), most) for context in contexts]
        # Every text contains an empty stop string, so the `hf` model stops after the first token.
        max_new_tokens = 1 if "" in asked.until else asked.max_gen_toks
        stop = [string for string in asked.until if string]
        choice = dict(asked.choice)
        if asked.samples:
            choice["seed"] = torch.randint(1 << 62, (len(prompts),)).tolist()
        results = generate(self.model, prompts, max_new_tokens=max_new_tokens, stop=stop, **choice)
        return [self._cut(list(result.token_ids), stop) for result in results]

    def _cut(self, ids: list[int], until: list[str]) -> str:
        """The text of an answer, cut as the `hf` model does: a special token among the stop strings also ends it."""
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
        alone = [self.tok_encode(string, add_special_tokens=False) for string in until]
        special = {token for token, *more in alone if not more and not decode([token])}
        end = next((at for at, token in enumerate(ids) if token in special), len(ids))
        return postprocess_generated_text(decode(ids[:end]), until, think_end_token=None)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each (cache key, context, continuation): the log-likelihood of the continuation, and whether greedy
        decoding would give it."""
        by_input: dict[tuple[int, ...], list[int]] = {}  # one-token answers to a question share their input
        for index, (_, context, continuation) in enumerate(requests):
            whole_number("tokens of a continuation", len(continuation), least=1, most=self.max_length)
            inputs = self._last(context + continuation, self.max_length + 1)[:-1]
            by_input.setdefault(tuple(inputs), []).append(index)

        scores: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for ids, indices in by_input.items():
                shared = score(self.model, ids, [requests[index][2] for index in indices], self._softmax_dtype)
                for index, scored in zip(indices, shared, strict=True):
                    scores[index] = scored
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], scored)
                bar.update(len(indices))
        return scores

    def _last(self, ids: list[int], most: int) -> list[int]:
        if (excess := len(ids) - most) > 0:
            _log.warning(
                "%d tokens are too many for max_length = %d: dropped the first %d", len(ids), self.max_length, excess
            )
        return ids[-most:]
