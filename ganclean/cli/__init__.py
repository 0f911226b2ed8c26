"""The command ``ganclean``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ganclean._version import __version__
from ganclean.cli import cleanse, redact, value
from ganclean.exceptions import GANCleanError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (GANCleanError, ValueError) as error:
        print(f"ganclean: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ganclean", description="Find the training instances that harm a GAN, and prove that removing them helps."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (cleanse, value, redact):
        command.add_command(commands)
    return parser
