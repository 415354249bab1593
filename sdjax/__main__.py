"""`python -m sdjax` is the command `sdjax`."""

import sys

from sdjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
