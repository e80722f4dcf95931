"""`python -m gatedlens.cli` is `gatedlens`."""

from gatedlens.cli.command_line import main

raise SystemExit(main())
