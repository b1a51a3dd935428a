"""What every test run states: the versions that its comparisons are made with."""

import importlib.metadata

STACK = ("torch", "triton", "transformers", "tokenizers", "numpy")


def pytest_report_header():
    return "stack: " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in STACK)
