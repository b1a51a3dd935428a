"""The model `gemma-runtime` for lm-evaluation-harness, with the scores of the harness's own `hf` model.

    python -m runtime.lm_eval --model gemma-runtime --model_args pretrained=demo --tasks arc_easy

The harness looks models up in a registry, to which importing this package adds ours. So `python -m runtime.lm_eval` is
the harness's command line with this model in it, and in Python

    import lm_eval, runtime.lm_eval

    lm_eval.simple_evaluate("gemma-runtime", {"pretrained": "demo"}, tasks=["arc_easy"])

Where the harness leaves a rule to the model (BOS, truncation, the dtype of the softmax, stop strings), the rule is the
`hf` model's. That model (0.4.13) mixes up continuations of unequal length if context and continuation together,
without the last token, are the same; here each scores as it does alone.
"""

from runtime.errors import MissingPackage

try:
    import lm_eval.api.model
    import lm_eval.models.utils  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingPackage(
        f"runtime.lm_eval needs the eval extra (pip install 'gemma-runtime[eval]'): {error}", name=error.name
    ) from error

from runtime.lm_eval.model import GemmaRuntimeLM

__all__ = ["GemmaRuntimeLM"]
