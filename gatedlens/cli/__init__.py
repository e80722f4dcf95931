"""The command line: `gatedlens demo`, `attention`, `patch`, `harvest`, ...; each has --help with examples, and --json."""

from gatedlens.cli.command_line import main
from gatedlens.cli.commands import app

# fmt: off
__all__ = [
    "app", "main",
]
# fmt: on
