"""gatedlens: open up gated-linear recurrent models (Mamba, Griffin, RWKV, Qwen3-Next, Kimi Linear, GLA, Vision Mamba, ...).

    import gatedlens as gl

    model = gl.from_pretrained("gatedlens/mamba-moby")
    logits, cache = model.run_with_cache("Call me Ishmael", names_filter="blocks.*.mixer.*")
    attention = gl.implicit_attention(cache, layer=-1)
    gl.plot.heatmap(attention.mean()[0], tokens=model.to_str_tokens("Call me Ishmael"))

Every gate, convolution and scan intermediate is a named hook point (`model.hook_table()`); implicit attention follows
Zimerman, Ali and Wolf, "Explaining Modern Gated-Linear RNNs via a Unified Implicit Attention Formulation" (ICLR 2025)."""

# fmt: off
# isort: off
from typing import TYPE_CHECKING

from gatedlens.errors import CheckpointError, GatedlensError, HookError, InputError, PointError, StoreError, TooLargeError
from gatedlens.late import late
from gatedlens.version import __version__

# What knows torch is loaded when first asked for. Checkers read the imports, Python the table of the same names (but modules).
if TYPE_CHECKING:
    from gatedlens import ablation, amplify, attribution, circuits, comparing, data, dictionaries, evaluation, feature_graph
    from gatedlens import fused, knockout, layers, lens, metrics, patching, plot, probes, profiles, states, steering, store
    from gatedlens import subspaces, tasks, tracing
    from gatedlens.address import Alias, HookTable, Point, View
    from gatedlens.attention import AttentionStack, Contributions, ImplicitAttention, implicit_attention
    from gatedlens.hooks import (
        HookedBailingHybrid, HookedFLA, HookedGriffin, HookedJamba, HookedKimiLinear, HookedLFM2, HookedMamba, HookedMamba2,
        HookedMamba2Hybrid, HookedMamba3, HookedMambaSsmHybrid, HookedMiniMax, HookedOlmoHybrid, HookedQwen3Next, HookedQwen4Exp,
        HookedRWKV, HookedRWKV6, HookedRWKV7, HookedViM, HookedZamba, register,
    )
    from gatedlens.inspection import Inspection, inspect
    from gatedlens.loading import bundled_models, from_pretrained, wrap
    from gatedlens.model import ActivationCache, HookPoint, HookedConfig, HookedLanguageModel, HookedModel, RecurrentState
    from gatedlens.model.vision import HookedVisionModel
    from gatedlens.result import Result, Results
    from gatedlens.verification import Verification, verify
else:
    __getattr__ = late(__name__, {
        "address": ("Alias", "HookTable", "Point", "View"),
        "attention": ("AttentionStack", "Contributions", "ImplicitAttention", "implicit_attention"),
        "hooks": (
            "HookedBailingHybrid", "HookedFLA", "HookedGriffin", "HookedJamba", "HookedKimiLinear", "HookedLFM2", "HookedMamba",
            "HookedMamba2", "HookedMamba2Hybrid", "HookedMamba3", "HookedMambaSsmHybrid", "HookedMiniMax", "HookedOlmoHybrid",
            "HookedQwen3Next", "HookedQwen4Exp", "HookedRWKV", "HookedRWKV6", "HookedRWKV7", "HookedViM", "HookedZamba",
            "register"), "inspection": ("Inspection", "inspect"), "loading": ("bundled_models", "from_pretrained", "wrap"),
        "model": ("ActivationCache", "HookPoint", "HookedConfig", "HookedLanguageModel", "HookedModel", "RecurrentState"),
        "model.vision": ("HookedVisionModel",), "result": ("Result", "Results"), "verification": ("Verification", "verify"),
    })

__all__ = [
    "ActivationCache", "Alias", "AttentionStack", "CheckpointError", "Contributions", "GatedlensError", "HookError", "HookPoint",
    "HookTable", "HookedBailingHybrid", "HookedConfig", "HookedFLA", "HookedGriffin", "HookedJamba", "HookedKimiLinear",
    "HookedLFM2", "HookedLanguageModel", "HookedMamba", "HookedMamba2", "HookedMamba2Hybrid", "HookedMamba3",
    "HookedMambaSsmHybrid", "HookedMiniMax", "HookedModel", "HookedOlmoHybrid", "HookedQwen3Next", "HookedQwen4Exp",
    "HookedRWKV", "HookedRWKV6", "HookedRWKV7", "HookedViM", "HookedVisionModel", "HookedZamba", "ImplicitAttention",
    "InputError", "Inspection", "Point", "PointError", "RecurrentState", "Result", "Results", "StoreError", "TooLargeError",
    "Verification", "View", "__version__", "ablation", "amplify", "attribution", "bundled_models", "circuits", "comparing",
    "data", "dictionaries", "evaluation", "feature_graph", "from_pretrained", "fused", "implicit_attention", "inspect",
    "knockout", "layers", "lens", "metrics", "patching", "plot", "probes", "profiles", "register", "states", "steering", "store",
    "subspaces", "tasks", "tracing", "verify", "wrap",
]
# isort: on
# fmt: on


def __dir__() -> list[str]:
    return sorted(__all__)
