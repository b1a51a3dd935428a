"""The tiny model, for engines in Ray's actors."""

from ..runtime.conftest import tiny_folder as tiny_folder
