"""Seconds, in a fresh process, until gatedlens is there.

python -m benchmarks.imports          # `import gatedlens`, over `import transformer_lens`
python -m benchmarks.imports names    # every public name of it loaded, over `import transformer_lens`
python -m benchmarks.imports help     # `gatedlens --help` in all, from the start of Python to its end
"""

from __future__ import annotations

import json
import subprocess
import sys
import time


def alone() -> float:
    import transformer_lens  # noqa: F401  what it brings is not ours to count

    began = time.perf_counter()
    import gatedlens  # noqa: F401

    return time.perf_counter() - began


def names() -> float:
    import transformer_lens  # noqa: F401

    began = time.perf_counter()
    import gatedlens as gl

    for name in gl.__all__:
        getattr(gl, name)
    return time.perf_counter() - began


def help_() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "gatedlens.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


PARTS = {"import": alone, "names": names, "help": help_}

if __name__ == "__main__":
    print(json.dumps(PARTS[(sys.argv[1:] or ["import"])[0]]()))
