"""`gemma-runtime quantize`: a model as a quantised GGUF file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cli import arguments
from runtime.cli.exit_codes import DONE
from runtime.errors import CheckpointError

if TYPE_CHECKING:
    from runtime.model.config import ModelConfig

TO = ("q8_0", "q4_0")


def add(commands: arguments.Commands) -> None:
    command = arguments.add_command(
        commands,
        run,
        "Write a model as a quantised GGUF file, for llama.cpp and for this runtime.",
        "Write a model as a GGUF file in Q8_0 or Q4_0, embedding and head in Q8_0, that llama.cpp reads, and this "
        "runtime too (--quantize gguf: the same values). Weights on a grid of Q4_0, as a QAT checkpoint's, keep it.",
    )
    command.add_argument("model", metavar="MODEL", help="folder, .gguf file, hub id (also OWNER/NAME@REV) or 'demo'")
    command.add_argument("out", metavar="OUT", help="the file, which must not exist")
    command.add_argument("--to", choices=TO, required=True, help="what matrices become")


def run(options: argparse.Namespace) -> int:
    out = Path(options.out)
    write(options.model, options.to, out)
    print(f"{out}: {out.stat().st_size / 1e6:,.0f} MB")
    return DONE


def write(model: str, to: str, out: Path, progress: bool | None = None) -> None:
    """Write a model as a GGUF file.

    Args:
        model: the model's name.
        to: the format, one of TO.
        out: the file.
        progress: whether to draw progress bars; None draws them on a terminal only.

    Raises:
        as `sources.locate`, `find_stored` and `write_quantized`.
    """
    import torch

    from runtime.checkpoint import sources
    from runtime.checkpoint.containers.folder import FolderCheckpoint
    from runtime.checkpoint.gguf import writing
    from runtime.checkpoint.weights import find_stored, is_tied
    from runtime.loading import read_config

    writing.check_new(out)
    location = sources.locate(model, progress, to)
    config = read_config(location.folder)
    stored: Mapping[str, Any]
    if isinstance(location, sources.InPlaceFile):
        metadata = writing.copied_metadata(location.checkpoint.file)
        stored = find_stored(location.checkpoint, config)
    else:
        metadata = _metadata(location.folder, config, Path(model).name)  # before weights are downloaded
        stored = find_stored(FolderCheckpoint(location.fetch(progress), in_blocks=False), config)
    config = replace(config, tied=is_tied(stored, torch.float32))
    writing.write_quantized(out, to, stored, config, metadata, progress)


def _metadata(folder: Path, config: ModelConfig, name: str) -> dict[str, Any]:
    """The metadata of a GGUF file for the model in a folder.

    Raises:
        CheckpointError: it has no tokenizer, or one that a GGUF file cannot hold; or llama.cpp would run it as a
            different model.
    """
    from runtime.checkpoint.gguf.metadata import differing_fields, sizes_of
    from runtime.checkpoint.gguf.vocabulary import vocabulary
    from runtime.text.tokenizer_files import read_tokenizer

    files = read_tokenizer(folder)
    if files is None:
        raise CheckpointError(f"{folder} has no tokenizer, which a GGUF file must have")
    files.backend.no_truncation()
    files.backend.no_padding()
    plain, given = (files.backend.encode("a", add_special_tokens=adds).ids for adds in (False, True))
    adds_bos = given != plain
    if adds_bos and given != [config.bos_token_id, *plain]:
        raise CheckpointError(
            f"a GGUF file's tokenizer adds BOS to a text or nothing, got {given} for {plain}: {folder}"
        )
    tokenizer = json.loads(files.backend.to_str())
    metadata: dict[str, Any] = {"general.type": "model", "general.name": name} | sizes_of(config)
    metadata |= vocabulary(tokenizer, config, files.named.get("unk_token"), adds_bos, files.chat_template)
    differing = [field for field in differing_fields(config, metadata) if field not in ("stored_dtype", "tied")]
    if differing:
        raise CheckpointError(f"a GGUF file cannot express this model's {', '.join(differing)}: {folder}")
    return metadata
