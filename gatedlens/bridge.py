"""The door to TransformerLens's TransformerBridge: `compat/transformer_bridge.py` says what it does, and what not.

import gatedlens.bridge
gatedlens.bridge.register()                                    # opt-in; `unregister()` undoes it
bridge = TransformerBridge.boot_transformers("state-spaces/mamba-130m-hf")
"""

from gatedlens.compat.transformer_bridge import GatedAdapter, bridged, register, unregister

__all__ = ["GatedAdapter", "bridged", "register", "unregister"]
