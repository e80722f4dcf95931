"""The command line: `gatedlens demo`, `attention`, `patch`, `harvest`, ...; each has --help with examples, and --json."""

from gatedlens.cli.command_line import main, parser

# fmt: off
__all__ = [
    "main", "parser",
]
# fmt: on
