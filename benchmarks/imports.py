"""Seconds that `import gatedlens` adds to `import transformer_lens` (fresh process)."""

import json
import time

import transformer_lens  # noqa: F401

began = time.perf_counter()
import gatedlens  # noqa: E402, F401

print(json.dumps(time.perf_counter() - began))
