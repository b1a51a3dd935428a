"""The families that can be run. Each module offers the same functions:

prefill_layers(chunk, x)     takes a chunk of a prompt through the layers, in PyTorch with Hugging Face's own operations
decode_layers(ops, ...)      takes each row's token through the layers on a backend (kernels/ops.py)
"""

from types import ModuleType

from runtime.families import gemma, gemma2, gemma3

FAMILIES: dict[str, ModuleType] = {"gemma": gemma, "gemma2": gemma2, "gemma3": gemma3}
