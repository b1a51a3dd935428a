"""`python -m runtime` is the command `gemma-runtime`."""

import sys

from runtime.cli import main

sys.exit(main())
