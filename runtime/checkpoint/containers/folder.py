"""The tensors of a checkpoint's folder, with a container's tensors put together as the matrices that they stand for."""

from __future__ import annotations

from pathlib import Path

from runtime.checkpoint.containers.config import scheme_of
from runtime.checkpoint.containers.packed_tensor import PackedTensor
from runtime.checkpoint.containers.table import TableTensor
from runtime.checkpoint.files import read_json
from runtime.checkpoint.safetensors_folder import Checkpoint
from runtime.checkpoint.stored_tensor import StoredTensor
from runtime.errors import CheckpointError

_TABLES = ("embed_tokens.weight", "lm_head.weight")  # the ends of their names
_INTEGERS = (".qweight", ".weight_packed")
FolderTensors = dict[str, StoredTensor | PackedTensor]


class FolderCheckpoint:
    """A folder's tensors by name.

    Args:
        folder: as `Checkpoint`, with its config.json.
        in_blocks: whether the matrices of a container are to be read as blocks, in place of their values.

    Raises:
        ModelNotFound: as `Checkpoint`.
        CheckpointError: as `Checkpoint` and `scheme_of`; or a matrix is stored twice, or none is stored as the config
            says, or one is packed though the config does not say so.
    """

    def __init__(self, folder: Path, in_blocks: bool) -> None:
        self.folder = folder
        self.tensors: FolderTensors = {}
        scheme, stored = scheme_of(read_json(folder / "config.json")), Checkpoint(folder).tensors
        if scheme is None:
            self.tensors |= stored
            if packed := next((name for name in stored if name.endswith(_INTEGERS)), None):
                raise CheckpointError(f"config.json must have a quantization_config beside tensor {packed}: {folder}")
            return
        parts: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in stored.items():
            base, _, part = name.rpartition(".")
            if in_blocks and name.endswith(_TABLES):
                tensor = TableTensor(**vars(tensor))
            if part in scheme.parts:
                parts.setdefault(base, {})[part] = tensor
            else:
                self.tensors[name] = tensor
        for base, found in parts.items():
            name = f"{base}.weight"
            if found.keys() == {"weight"}:  # values
                self.tensors[name] = found["weight"]
            elif name in self.tensors:
                second = next(iter(found.values())).name
                raise CheckpointError(f"tensor {name} is stored twice, as values and as {second}: {folder}")
            else:
                self.tensors[name] = PackedTensor(name, found, scheme, in_blocks)
        if not any(isinstance(tensor, PackedTensor) for tensor in self.tensors.values()):
            raise CheckpointError(f"quantization_config says {scheme.container}, but all tensors are values: {folder}")
