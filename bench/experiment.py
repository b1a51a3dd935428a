"""The frame of a program that measures one thing: its options, and its report as JSON.

Progress goes to stderr. The report is written to --out FILE, and to stdout as its last line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from runtime.bench.environment import environment
from runtime.cli.arguments import whole


def parser(description: str | None, dtype: str | None, **numbers: tuple[int, int, str]) -> argparse.ArgumentParser:
    """The options of a program: --model, --out and its own.

    Args:
        description: the program's docstring.
        dtype: the default of --dtype, a comma list, if there is one.
        numbers: for each whole number its default, its least value and what it counts; `gen_len` becomes --gen-len.
    """
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", default="demo", metavar="NAME", help="folder, .gguf file or hub id (%(default)s)")
    if dtype is not None:
        found.add_argument("--dtype", default=dtype, metavar="D,...", help="(%(default)s)")
    for name, (default, least, what) in numbers.items():
        option = "--" + name.replace("_", "-")
        found.add_argument(option, type=whole(least), default=default, metavar="N", help=f"{what} (%(default)s)")
    found.add_argument("--out", type=Path, metavar="FILE", help="write the report there too")
    return found


def publish(name: str, options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Writes the report of a program: its options, the environment, and what it found."""
    given = {option: value for option, value in vars(options).items() if option != "out"}
    where = environment(torch.device("cpu")).model_dump(mode="json")
    text = json.dumps({"benchmark": name, **given, "environment": where, **found}, ensure_ascii=False)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
