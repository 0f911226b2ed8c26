"""``python -m ganclean`` is the command ``ganclean``."""

import sys

from ganclean.cli import main

if __name__ == "__main__":
    sys.exit(main())
