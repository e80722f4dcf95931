"""gatedlens: open up gated-linear recurrent models (Mamba, Griffin, RWKV, Vision Mamba).

    import gatedlens as gl

    model = gl.from_pretrained("gatedlens/mamba-moby")
    logits, cache = model.run_with_cache("Call me Ishmael", names_filter="blocks.*.mixer.*")
    attention = gl.implicit_attention(cache, layer=-1)
    gl.plot.heatmap(attention.mean()[0], tokens=model.to_str_tokens("Call me Ishmael"))

Every gate, convolution and scan intermediate is a named hook point (`model.hook_table()`); implicit attention follows
Zimerman, Ali and Wolf, "Explaining Modern Gated-Linear RNNs via a Unified Implicit Attention Formulation" (ICLR 2025).
"""

# fmt: off
# isort: off
from gatedlens import (
    ablation, amplify, attribution, circuits, data, evaluation, fused, knockout, lens, metrics, patching, plot, profiles,
    states, steering, store, tasks, tracing,
)
# isort: on
# fmt: on
from gatedlens.address.point import Alias, Point, View
from gatedlens.address.table import HookTable
from gatedlens.attention.contributions import Contributions
from gatedlens.attention.layer import ImplicitAttention
from gatedlens.attention.stack import AttentionStack, implicit_attention
from gatedlens.errors import (
    CheckpointError,
    GatedlensError,
    HookError,
    InputError,
    PointError,
    StoreError,
    TooLargeError,
)
from gatedlens.hooks.griffin import HookedGriffin
from gatedlens.hooks.mamba import HookedMamba
from gatedlens.hooks.rwkv import HookedRWKV
from gatedlens.hooks.vim import HookedViM
from gatedlens.loading import bundled_models, from_pretrained, wrap
from gatedlens.model.base import HookedModel
from gatedlens.model.cache import ActivationCache
from gatedlens.model.config import HookedConfig
from gatedlens.model.hookpoint import HookPoint
from gatedlens.model.language import HookedLanguageModel
from gatedlens.model.state import RecurrentState
from gatedlens.result.result import Result
from gatedlens.version import __version__

# fmt: off
__all__ = [
    "ActivationCache", "Alias", "AttentionStack", "CheckpointError", "Contributions", "GatedlensError", "HookError",
    "HookPoint", "HookTable", "HookedConfig", "HookedGriffin", "HookedLanguageModel", "HookedMamba", "HookedModel",
    "HookedRWKV", "HookedViM", "ImplicitAttention", "InputError", "Point", "PointError", "RecurrentState", "Result",
    "StoreError", "TooLargeError", "View", "__version__", "ablation", "amplify", "attribution", "bundled_models",
    "circuits", "data", "evaluation", "from_pretrained", "fused", "implicit_attention", "knockout", "lens",
    "metrics", "patching", "plot", "profiles", "states", "steering", "store", "tasks", "tracing", "wrap",
]
# fmt: on


def __dir__() -> list[str]:
    return sorted(__all__)
