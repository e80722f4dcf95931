"""The site: what `make docs` builds from docs/, hooks/, tutorials/ and the docstrings, and the notebooks of the tutorials."""
