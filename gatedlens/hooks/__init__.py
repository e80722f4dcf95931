"""The architectures: one file each, holding its rows, its open forward and how it fills the one recurrence.

`architectures()` finds them: those that `gl.register` was given, those that an installed package names under the entry point
group `gatedlens.architectures`, and the files beside this one, each with its `HOOKED` (a HookedModel subclass).
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from gatedlens.errors import InputError, did_you_mean
from gatedlens.late import late
from gatedlens.model.base import HookedModel

# The files, and a class of each: loaded when it is first asked for, whether or not its file was asked for before. Checkers and
# editors read the imports, Python the table.
if TYPE_CHECKING:
    from gatedlens.hooks.bailing_hybrid import HookedBailingHybrid as HookedBailingHybrid
    from gatedlens.hooks.fla import HookedFLA as HookedFLA
    from gatedlens.hooks.griffin import HookedGriffin as HookedGriffin
    from gatedlens.hooks.jamba import HookedJamba as HookedJamba
    from gatedlens.hooks.kimi_linear import HookedKimiLinear as HookedKimiLinear
    from gatedlens.hooks.lfm2 import HookedLFM2 as HookedLFM2
    from gatedlens.hooks.mamba import HookedMamba as HookedMamba
    from gatedlens.hooks.mamba2 import HookedMamba2 as HookedMamba2
    from gatedlens.hooks.mamba2_hybrid import HookedMamba2Hybrid as HookedMamba2Hybrid
    from gatedlens.hooks.mamba3 import HookedMamba3 as HookedMamba3
    from gatedlens.hooks.mamba_ssm_hybrid import HookedMambaSsmHybrid as HookedMambaSsmHybrid
    from gatedlens.hooks.minimax import HookedMiniMax as HookedMiniMax
    from gatedlens.hooks.olmo_hybrid import HookedOlmoHybrid as HookedOlmoHybrid
    from gatedlens.hooks.qwen3_next import HookedQwen3Next as HookedQwen3Next
    from gatedlens.hooks.qwen4_exp import HookedQwen4Exp as HookedQwen4Exp
    from gatedlens.hooks.rwkv import HookedRWKV as HookedRWKV
    from gatedlens.hooks.rwkv6 import HookedRWKV6 as HookedRWKV6
    from gatedlens.hooks.rwkv7 import HookedRWKV7 as HookedRWKV7
    from gatedlens.hooks.vim import HookedViM as HookedViM
    from gatedlens.hooks.zamba import HookedZamba as HookedZamba
else:
    CLASSES = {
        "bailing_hybrid": ("HookedBailingHybrid",),
        "fla": ("HookedFLA",),
        "griffin": ("HookedGriffin",),
        "jamba": ("HookedJamba",),
        "kimi_linear": ("HookedKimiLinear",),
        "lfm2": ("HookedLFM2",),
        "mamba": ("HookedMamba",),
        "mamba2": ("HookedMamba2",),
        "mamba2_hybrid": ("HookedMamba2Hybrid",),
        "mamba3": ("HookedMamba3",),
        "mamba_ssm_hybrid": ("HookedMambaSsmHybrid",),
        "minimax": ("HookedMiniMax",),
        "olmo_hybrid": ("HookedOlmoHybrid",),
        "qwen3_next": ("HookedQwen3Next",),
        "qwen4_exp": ("HookedQwen4Exp",),
        "rwkv": ("HookedRWKV",),
        "rwkv6": ("HookedRWKV6",),
        "rwkv7": ("HookedRWKV7",),
        "vim": ("HookedViM",),
        "zamba": ("HookedZamba",),
    }
    __getattr__ = late(__name__, CLASSES)

GROUP = "gatedlens.architectures"
NEEDED = ("title", "wraps", "block_points", "recurrence", "attention_words")  # what every architecture says of itself
# For checkers alone: whoever registers something else gets the error of `register`.
if TYPE_CHECKING:
    Hooked = TypeVar("Hooked", bound=type[HookedModel])
else:
    Hooked = Any
_registered: dict[str, type[HookedModel]] = {}  # what a program adds to itself, as it would by putting a file here


def architectures() -> dict[str, type[HookedModel]]:
    """`architectures()["mamba"]`: every architecture by name: `{"mamba": HookedMamba, ...}`. Those that were registered come
    first, so that `gl.wrap` prefers them where two wrap the same class.
    """
    return {**_registered, **{name: a for name, a in {**_plugins(), **shipped()}.items() if name not in _registered}}


def shipped() -> dict[str, type[HookedModel]]:
    """The architectures that gatedlens comes with, by file name."""
    modules = {info.name: importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)}
    return {name: module.HOOKED for name, module in modules.items()}


def register(hooked: Hooked, name: str | None = None) -> Hooked:
    """`gl.register(HookedHGRN)`: from now on `gl.wrap`, `gl.from_pretrained` and the catalogue know an architecture of yours.

    hooked: a HookedModel subclass, as tutorial 8 writes one; it is returned, so this is a decorator, too. name: what it is called
    in `architectures()` (None: the file it is in). A package of yours can name it under the entry point group
    `gatedlens.architectures` instead; then nobody needs to call this.

    InputError for what is no such class or lacks what an architecture says of itself, and for a name that another has.
    """
    if not isinstance(hooked, type) or not issubclass(hooked, HookedModel):
        raise InputError(f"register takes a HookedModel subclass, not {hooked!r:.80}. gl.wrap(model) takes a model.")
    missing = [need for need in NEEDED if not getattr(hooked, need, None)]
    if missing:
        raise InputError(
            f"{hooked.__name__} lacks {', '.join(missing)}: what an architecture says of itself. gl.HookedMamba shows each."
        )
    known = hooked.__module__.rpartition(".")[2] if name is None else name
    other = architectures().get(known)
    if other is not None and other is not hooked:
        close = did_you_mean(hooked.__name__, [other.__name__])
        raise InputError(f"{known!r} is the name of {other.__name__}: give another, register(..., name=...).{close}")
    _registered[known] = hooked
    return hooked


def unregister(name: str) -> None:
    """`unregister("hgrn")`: take back `gl.register`. InputError for a name that was not registered."""
    if name not in _registered:
        known = ", ".join(_registered) or "nothing is"
        raise InputError(f"{name!r} was not registered; {known}.{did_you_mean(name, _registered)}")
    del _registered[name]


@cache  # installed packages do not change while a program runs
def _plugins() -> dict[str, type[HookedModel]]:
    """What installed packages name; one that cannot be loaded is told, and is no reason to lose the others."""
    loaded = ((entry.name, _loaded(entry)) for entry in entry_points(group=GROUP))
    return {name: hooked for name, hooked in loaded if hooked is not None}


def _loaded(entry: EntryPoint) -> type[HookedModel] | None:
    try:
        hooked: type[HookedModel] = entry.load()
        return hooked
    except Exception as error:  # whatever a stranger's import raises
        warnings.warn(f"The architecture {entry.name} ({entry.value}) cannot be loaded: {error}", stacklevel=4)
        return None
