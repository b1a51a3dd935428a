"""`python -m runtime` is the command `gemma-runtime`."""

import sys

from runtime.cli.main import main

sys.exit(main())
