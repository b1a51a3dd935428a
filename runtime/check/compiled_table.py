"""The readable table of what runtime/check/compiled.py found, from one results file per Triton version."""

from __future__ import annotations

from typing import Any

import torch

INTEGERS = {torch.float32: "int8", torch.int64: "int4"}  # by the dtype of their scales
HEAD = """\
# What the compiler makes of the kernels

Made by

    python -m runtime.check.compiled --render {files} --out {out}

from the results of `python -m runtime.check.compiled --out FILE` under each version of Triton (`make compiled` does all
of it); no GPU is needed.

Every kernel of a decode step, of a step that checks guesses and of a chunk of a prompt, and the norm on its own, at the
sizes of {models}, in bfloat16, compiled to a cubin for {archs}
under Triton {versions}; for sm_80 and sm_90 also what reads int8 and int4 weights of the smallest model, and for
sm_90 of a large one: {kernels} kernels in all. Those of models of one row and of the sum form are one program for every
number of rows; those on tensor cores (`dot`) one for up to 8 rows, and one each for 16, 32 and 64, of which 8 and 64
are here.

Every one keeps the seven rules at the top of [`compiled.py`](../runtime/check/compiled.py). Of the exceptions that
these allow, heads that draw tokens for 64 rows spill at most {stack} bytes of stack, and a multiprocessor holds only
one program of {alone}.

A cell has the range over the GPUs of its row. sm_90 has the blocks of the H100's table, the others the default ones.
`shared` is in bytes. Programs are those that fit one multiprocessor at once, and the limit is what allows no more:
registers, shared memory, threads or program slots.
"""


def shape(arguments: dict[str, Any]) -> tuple[str, str]:
    """A launch's sizes and its block, as the table shows them."""
    a = arguments
    width = a.get("WIDTH") or a.get("HEADS", 0) * a.get("HEAD_DIM", 0)
    outputs = a.get("OUTPUTS")
    if "HEAD_DIM" in a:
        heads = f"{a['KV_HEADS']} x {a['HEADS'] // a['KV_HEADS']}" if "KV_HEADS" in a else str(a["HEADS"])
        sizes = f"{heads} heads of {a['HEAD_DIM']}"
        sizes += f", {a['FEW_SPLITS']} to {a['MOST_SPLITS']} splits" if "FEW_SPLITS" in a else ""
    elif "FIELDS" in a:
        sizes = "heads of any number and size"
    else:
        sizes = f"{outputs}x{width}" if outputs else str(width or a.get("SLOTS"))
    flags = [] if a.get("scale_ptr") is None else [INTEGERS[a["scale_ptr"].dtype]]
    flags += [name[4:].lower().replace("_", " ") for name, value in a.items() if name.startswith("HAS_") and value]
    flags += [f"{a['N']} rows"] if "N" in a else [f"{a['STEPS']} rows"] if "STEPS" in a else []
    flags += ["stored"] if a.get("STORE_RESIDUAL") else []
    flags += ["guesses"] if a.get("IS_SEQUENCE") else []
    sides = ("BLOCK_OUTPUTS", "BLOCK_ROWS", "BLOCK_TOKENS"), ("BLOCK_WIDTH", "BLOCK_KEYS")
    block = [str(a[name]) for names in sides for name in names if name in a]
    return ", ".join([sizes, *flags]), "x".join(block)


def spread(values: list[Any]) -> str:
    """One value, or the range of several; nothing of none, as of a launch that only one version has."""
    if not values:
        return ""
    if isinstance(values[0], str):
        return ", ".join(sorted(set(values)))
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}-{high}"


def cell(rows: list[dict[str, Any]], column: str) -> str:
    """One column over several rows."""
    return spread([row[column] for row in rows])


def render(results: list[dict[str, Any]], files: list[str], out: str) -> str:
    """The table.

    Args:
        results: the contents of the files, one per Triton version.
        files, out: their names on the command line.
    """
    versions = [".".join(result["triton"].split(".")[:2]) for result in results]
    rows = [
        row | {"triton": version} for version, result in zip(versions, results, strict=True) for row in result["rows"]
    ]
    archs = ", ".join(f"sm_{arch}" for arch in sorted({row["arch"] for row in rows}))
    models = ", ".join(sorted({model for row in rows for model in row["models"]}))
    single: dict[str, set[int]] = {}
    for row in rows:
        if row["programs"] == 1:
            single.setdefault(f"{row['kernel']} of {row['block']}", set()).add(row["arch"])
    alone = "; ".join(f"{name} on {', '.join(f'sm_{arch}' for arch in sorted(on))}" for name, on in single.items())
    named = {"files": " ".join(files), "out": out, "models": models, "archs": archs, "kernels": len(rows)}
    named |= {"alone": alone or "none", "stack": max(row["stack"] for row in rows)}
    lines = [HEAD.format(**named, versions=" and ".join(versions))]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        by_version = [f"{column}, {version}" for version in versions for column in ("registers", "programs")]
        titles = ["shape", "block", "warps", "sm", *by_version, "shared", "limit"]
        lines += [f"## {kernel}\n", f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
        launches: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in rows:
            if row["kernel"] == kernel:
                launches.setdefault((row["shape"], row["block"], row["warps"], row["arch"]), []).append(row)
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for (*same, _), found in launches.items():
            groups.setdefault((*same, cell(found, "limit")), []).extend(found)
        for (sizes, block, warps, limit), found in sorted(groups.items(), key=lambda item: item[0][0]):
            cells = [sizes, block, str(warps), ", ".join(map(str, sorted({row["arch"] for row in found})))]
            for version in versions:
                of_version = [row for row in found if row["triton"] == version]
                cells += [cell(of_version, "registers"), cell(of_version, "programs")]
            lines.append(f"| {' | '.join([*cells, cell(found, 'shared'), limit])} |")
        lines.append("")
    return "\n".join(lines)
