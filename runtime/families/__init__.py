"""The families that can be run. Each module offers the same two functions:

prefill_layers(chunk, x)     takes a chunk of a prompt through all layers, in PyTorch with Hugging Face's own operations
decode(model, state)         takes each row's token through all layers and the head, by the launchers of kernels/
"""

from types import ModuleType

from runtime.families import gemma, gemma2, gemma3

FAMILIES: dict[str, ModuleType] = {"gemma": gemma, "gemma2": gemma2, "gemma3": gemma3}
