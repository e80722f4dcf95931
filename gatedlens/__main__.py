"""`python -m gatedlens` is `gatedlens`."""

from gatedlens.cli.command_line import main

if __name__ == "__main__":
    raise SystemExit(main())
