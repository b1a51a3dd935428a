"""The harness's command line, with the model `gemma-runtime` in it."""

from __future__ import annotations

import sys

from runtime.errors import GemmaRuntimeError, one_line


def main() -> int:
    """The harness's command line; bad input is one line on stderr.

    Returns:
        The exit code: 0, 2 for bad input, 130 after Ctrl-C.
    """
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except KeyboardInterrupt:
        return 130
    except (GemmaRuntimeError, ValueError, TypeError, OSError, ImportError) as error:
        print(f"gemma-runtime: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
