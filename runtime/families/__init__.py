"""The families that can be run. Each module offers the same functions:

prefill_layers(chunk, x)     takes a chunk of a prompt through the layers, in PyTorch with Hugging Face's own operations
decode(ops, model, state)    takes each row's token through all layers and the head, on a backend (kernels/ops.py)
decode_layers(...)           the same without the head, with an attention of the caller's
"""

from types import ModuleType

from runtime.families import gemma, gemma2, gemma3

FAMILIES: dict[str, ModuleType] = {"gemma": gemma, "gemma2": gemma2, "gemma3": gemma3}
