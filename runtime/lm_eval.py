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

import functools
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
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

from runtime.checkpoint import sources
from runtime.engine.engine import engine_of
from runtime.engine.non_finite import non_finite
from runtime.engine.prefill import prefill
from runtime.engine.request import whole_number
from runtime.errors import CheckpointError, GemmaRuntimeError, InvalidArgument, NotEnoughMemory
from runtime.families.state import new_state
from runtime.generation import generate
from runtime.kernels.argmax import logits_reference
from runtime.kernels.rms_norm import rms_norm_reference
from runtime.lm_eval_arguments import (
    check_generation_arguments,
    check_model_arguments,
    read_batch_size,
    read_device,
    read_dtype,
)
from runtime.loading import examine, load

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_GEN_TOKS = 256  # the `hf` model's, where a task does not say
ROWS_AT_ONCE = 64  # positions whose logits exist together: a quarter of a million fp32 numbers each

_log = logging.getLogger(__name__)


@register_model("gemma-runtime")
class GemmaRuntimeLM(TemplateLM):
    """A model of this runtime as the harness sees one.

    Args:
        pretrained: what `runtime.load` takes; None means $GEMMA_RUNTIME_MODEL, or "demo" where that is not set.
        device: "auto", "cpu", "cuda" or "cuda:N"; "cuda" and "cuda:0" mean the CPU where there is no CUDA device.
        dtype, eager: as in `runtime.load`; "torch.bfloat16" and `torch.bfloat16` too.
        revision: a branch, tag or commit of a hub repository.
        max_length: longest sequence in tokens, 2 or more; what is longer loses its beginning. None means the
            checkpoint's max_position_embeddings, for which there must be memory.
        batch_size: prompts that `generate_until` answers together, 1 to 8, or "auto" (also "auto:N") for as many as
            there is memory for; no answer depends on it.
        max_batch_size: the most that "auto" takes.
        softmax_dtype: "float32", "bfloat16" or "float16", what log-probabilities are computed and added up in. None
            means the model's dtype, as in the `hf` model: in 16 bits that leaves three digits of a score, or two.
        add_bos_token: whether texts begin with BOS; None leaves it to the tokenizer.
        prefix_token_id: the token before a text that has no context; None means BOS.
        chat_template_args: what the chat template is given besides the messages.
        others: arguments of the `hf` model, at values that change nothing.

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
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        check_model_arguments(others)
        if add_bos_token not in (None, True, False):
            raise InvalidArgument(f"add_bos_token must be True, False or None, got {add_bos_token!r}")
        softmax_name = read_dtype("softmax_dtype", softmax_dtype)
        self._softmax_dtype = None if softmax_name is None else getattr(torch, softmax_name)
        batch, may_shrink = read_batch_size(batch_size, max_batch_size)
        if revision == "main" and "@" not in str(pretrained):
            revision = None  # the harness's default, whatever the source
        source = sources.pinned(pretrained, None if revision is None else str(revision))
        options: dict[str, Any] = {"device": read_device(device), "dtype": read_dtype("dtype", dtype) or "auto"}
        found = examine(source, max_seq_len=1, **options)
        self.max_length = whole_number(
            "max_length", found.config.max_position_embeddings if max_length is None else max_length, least=2
        )
        options |= {"max_seq_len": self.max_length, "eager": eager}
        while True:
            try:
                self.model = load(source, max_batch=batch, **options)
                break
            except NotEnoughMemory:  # nothing has been read
                if batch == 1 or not may_shrink:
                    raise
                batch //= 2
        self.batch_size = batch
        if self.model.tokenizer is None:
            raise InvalidArgument(f"the harness works on text, but {self.model.name} has no tokenizer")
        self.tokenizer = _load_tokenizer(found.source.folder, add_bos_token)
        self._add_bos_token = add_bos_token
        if prefix_token_id is not None:
            whole_number("prefix_token_id", prefix_token_id, least=0, most=self.model.config.vocab - 1)
        self._prefix_token_id = prefix_token_id
        self._chat_template_args = dict(chat_template_args or {})
        self._device = self.model.device

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has no context."""
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
        """What tells the harness's caches of requests apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with BOS as the tokenizer or `add_bos_token` says, and never a second one: none is added to a
        text that begins with it."""
        return self._encode(string, add_special_tokens, self.tokenizer.decode(self.prefix_token_id))

    def _encode(self, string: str, add_special_tokens: bool | None, bos: str | None) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = self._add_bos_token
            if bos is not None and string.startswith(bos):
                add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat by the checkpoint's template, without system messages where the template refuses those.

        Args:
            chat_history: messages with `role` and `content`.
            add_generation_prompt: whether the model's turn begins; if not, the last message is left open.

        Raises:
            ValueError: there is no template, or it refuses these messages.
        """

        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._chat_template_args,
            )

        try:
            try:
                return render(chat_history)
            except jinja2.exceptions.TemplateError:
                _log.warning("the chat template failed: leaving out the system messages")
                return render([message for message in chat_history if message["role"] != "system"])
        except (jinja2.exceptions.TemplateError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InvalidArgument(f"the chat template of {self.model.name} cannot be applied: {reason}") from error

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
        until = [] if asked.get("until") is None else asked["until"]
        if not all(isinstance(string, str) for string in ([until] if isinstance(until, str) else until)):
            raise InvalidArgument(f"until must be a string or a list of strings, got {until!r}")
        try:
            options = dict(normalize_gen_kwargs({**asked, "until": until}, MAX_GEN_TOKS))
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"generation arguments {asked} are not the harness's: {error}") from None
        until = handle_stop_sequences(options.pop("until"), eos=self.tokenizer.decode(self.eot_token_id))
        max_gen_toks = options.pop("max_gen_toks")
        check_generation_arguments(options)
        whole_number("max_gen_toks", max_gen_toks, least=1, most=self.max_length - 1)
        bos = self.tokenizer.bos_token
        most = self.max_length - max_gen_toks
        prompts = [self._last(self._encode(context, None, bos), most) for context in contexts]
        if "" in until:  # any text holds it, so for the `hf` model the first token ends the answer
            max_gen_toks = 1
        stop = [string for string in until if string]
        results = generate(self.model, prompts, max_new_tokens=max_gen_toks, stop=stop)
        return [self._cut(result.token_ids, stop) for result in results]

    def _cut(self, ids: list[int], until: list[str]) -> str:
        """The text of an answer, cut as the `hf` model cuts it: a special token among the stop strings ends it too."""
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
        alone = [self.tok_encode(string, add_special_tokens=False) for string in until]
        special = {token for token, *more in alone if not more and not decode([token])}
        end = next((at for at, token in enumerate(ids) if token in special), len(ids))
        return postprocess_generated_text(decode(ids[:end]), until, think_end_token=None)

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
        engine = engine_of(model)
        with engine.turn.taken():
            if engine.state is None:
                engine.state = new_state(model, model.runtime.max_batch)
            hidden = torch.empty(len(ids), model.config.hidden, dtype=model.dtype, device=model.device)
            prefill(model, engine.state, 0, ids, hidden_out=hidden)

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


def _load_tokenizer(folder: Path, add_bos_token: bool | None) -> Any:
    """The checkpoint's tokenizer as transformers loads it: the harness's rules are written for those."""
    from transformers import AutoTokenizer

    options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # whatever a tokenizer's files may lead to
        reason = " ".join(str(error).split())
        raise CheckpointError(f"transformers cannot load the tokenizer in {folder}: {reason}") from error


def main() -> int:
    """The harness's command line; bad input is one line on stderr.

    Returns:
        The exit code: 0, 2 for bad input, 130 after Ctrl-C.
    """
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except KeyboardInterrupt:
        return 130
    except (GemmaRuntimeError, ValueError, TypeError, OSError, ImportError) as error:
        print(f"gemma-runtime: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
