"""``python -m ganclean`` is the command ``ganclean``."""

import sys

from ganclean.cli import main

sys.exit(main())
