"""Maps the repository's folders to import packages; everything else is in pyproject.toml.

`kernels/` and `bench/` stand at the top of the repository because they are what people come to read, but install as
`runtime.kernels` and `runtime.bench`: on PyPI the import name `kernels` belongs to Hugging Face's kernel hub client,
which transformers imports when it is present, and two packages of one name would overwrite each other.
"""

from setuptools import setup

PACKAGES = {
    "runtime": "runtime",
    "runtime.check": "runtime/check",
    "runtime.checkpoint": "runtime/checkpoint",
    "runtime.checkpoint.containers": "runtime/checkpoint/containers",
    "runtime.checkpoint.gguf": "runtime/checkpoint/gguf",
    "runtime.cli": "runtime/cli",
    "runtime.cost": "runtime/cost",
    "runtime.engine": "runtime/engine",
    "runtime.families": "runtime/families",
    "runtime.inspection": "runtime/inspection",
    "runtime.lm_eval": "runtime/lm_eval",
    "runtime.model": "runtime/model",
    "runtime.page": "runtime/page",
    "runtime.parity": "runtime/parity",
    "runtime.ray": "runtime/ray",
    "runtime.sampling": "runtime/sampling",
    "runtime.hugging_face": "runtime/hugging_face",
    "runtime.serve": "runtime/serve",
    "runtime.text": "runtime/text",
    "runtime.bench": "bench",
    "runtime.bench.peers": "bench/peers",
    "runtime.kernels": "kernels",
    "runtime.kernels.cpu": "kernels/cpu",
}

setup(
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    include_package_data=False,  # what is listed here, and nothing else
    package_data={
        "runtime": ["py.typed"],
        "runtime.page": ["*.html", "*.css"],
        "runtime.parity": ["*.html"],
        "runtime.serve": ["web/*"],
        "runtime.kernels": ["blocks/*.json"],
        "runtime.bench": ["*.html", "prompts/*.json"],
        "runtime.bench.peers": ["*.txt"],
    },
)
