"""SAELens beside TransformerLens 4: `sae_lens = gatedlens.compat.sae_lens.load()`.

    runner = sae_lens.LanguageModelSAETrainingRunner(config, override_dataset=data, override_model=model)

A hooked model is a valid `override_model` at any point whose last axis is the SAE's. But SAELens imports names that
TransformerLens 4.0 removed: version 6.51 installs beside it and fails on import; later ones refuse to be installed
(`pip install "sae-lens==6.51.*"`). `load` puts stand-ins where the removed names were, imports SAELens and returns it; what
needs the old HookedTransformer itself (SAELens's own model loading, HookedSAETransformer) stays out of reach.

A store that `gl.store.harvest` made with `context=` is in SAELens's layout: `use_cached_activations=True,
cached_activations_path="out/activations"`, and any `override_dataset` of tokens, which SAELens asks for and does not read.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import transformer_lens
from transformer_lens import utilities

__all__ = ["load", "stand_ins"]

REMOVED = {
    "transformer_lens.HookedTransformer": ("HookedTransformer", "Loss", "Output"),
    "transformer_lens.components": (),
    "transformer_lens.components.mlps": (),
    "transformer_lens.components.mlps.can_be_used_as_mlp": ("CanBeUsedAsMLP",),
}


def stand_ins() -> dict[str, ModuleType]:
    """`stand_ins()`: modules by the removed names: classes that nothing is an instance of, HookedRootModule and the
    utilities as they are.
    """
    modules = {name: ModuleType(name) for name in REMOVED}
    for name, module in modules.items():
        for word in REMOVED[name]:
            setattr(module, word, type(word, (), {"__module__": name}))
    setattr(modules["transformer_lens.HookedTransformer"], "HookedRootModule", transformer_lens.HookedRootModule)  # noqa: B010
    return {**modules, "transformer_lens.utils": utilities}


def load() -> ModuleType:
    """`sae_lens = gatedlens.compat.sae_lens.load()`: the module `sae_lens`; ImportError if it is not installed."""
    if importlib.util.find_spec("sae_lens") is None:
        raise ImportError("SAELens is not installed: pip install 'sae-lens==6.51.*'.")
    for name, module in stand_ins().items():
        sys.modules.setdefault(name, module)
    vars(transformer_lens).setdefault(
        "HookedTransformer", sys.modules["transformer_lens.HookedTransformer"].HookedTransformer
    )
    return importlib.import_module("sae_lens")
