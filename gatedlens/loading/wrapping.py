"""`gl.wrap`: hook points around a model that exists, whose parameters are shared, not copied."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from gatedlens.errors import CheckpointError, did_you_mean
from gatedlens.formats import adapting
from gatedlens.formats.refused import NAMESAKES, why_not_opened
from gatedlens.hooks import architectures
from gatedlens.loading.sources import supported
from gatedlens.model import tokenizer as tokenizers
from gatedlens.model.base import HookedModel
from gatedlens.model.checkpoint import reading
from gatedlens.model.config import FLOATS
from gatedlens.model.language import HookedLanguageModel
from gatedlens.model.tokenizer import TokenizerLike
from gatedlens.model.vision import HookedVisionModel
from gatedlens.model.watch import check_plain
from gatedlens.options import checked
from gatedlens.weights import bare, disk

# What `wrap` and `from_pretrained` return: an editor completes the methods of both; isinstance tells which it is. A fifth
# architecture is one of the two, or joins the union.
Model: TypeAlias = HookedLanguageModel | HookedVisionModel
if TYPE_CHECKING:  # for type checkers alone, since the function says more of what is none
    Vendors: TypeAlias = nn.Module
else:
    Vendors = Any

log = logging.getLogger("gatedlens")


@checked
def wrap(model: Vendors, tokenizer: TokenizerLike = None, *, model_name: str | None = None) -> Model:
    """`gl.wrap(MambaForCausalLM(...))`: hook points around a model's own parameters, which are shared, not copied.

    The architecture follows from the model's class (or that of a base class); CheckpointError for one that is not
    supported.
    """
    if isinstance(model, HookedModel):
        raise CheckpointError(f"This is a {type(model).__name__} already: use it as it is, or wrap its `.wrapped`.")
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"wrap takes a model, not {type(model).__name__}: gl.from_pretrained loads one by name.")
    model = adapting.base_of(model)
    hooked = architecture_of(model)
    if hooked is None:
        raise CheckpointError(_unknown(model))
    check_plain(bare(model))
    config, name = getattr(model, "config", None), type(model).__name__
    known = getattr(config, "name_or_path", "") if not isinstance(config, dict) else ""
    found = opened(hooked, model, str(model_name or known or name), tokenizer)
    tell_nonfinite(found.cfg.model_name, model)
    return found


def architecture_of(model: nn.Module) -> Any:
    """The architecture that wraps a class of this name (or that of a base class); None if none does."""
    names = {base.__name__ for base in type(model).__mro__}
    named = [hooked for hooked in architectures().values() if names & set(hooked.wraps)]
    return next((hooked for hooked in named if hooked.fits(model)), named[0] if named else None)


def opened(hooked: Any, wrapped: nn.Module, name: str, tokenizer: Any) -> Any:
    """The hooked model; CheckpointError for a module that lacks what its class has, or whose config is not as expected."""
    tokenizer = tokenizers.tokenizer_of(tokenizer)
    with reading(name, f"({type(wrapped).__name__}) is not built as {hooked.title} is"):
        model = hooked(wrapped, model_name=name, tokenizer=tokenizer)
    told = model.as_read.told()
    if told:
        log.info("%s: %s.", name, told)
    return model


def _unknown(model: nn.Module) -> str:
    """Why a model is not wrapped, and what could be."""
    name = type(model).__name__
    inside = next(((path, part) for path, part in model.named_modules() if path and architecture_of(part)), None)
    if inside is not None:
        path, part = inside
        return f"{name} is around a {type(part).__name__}: gl.wrap(model.{path}) takes that."
    hint = NAMESAKES.get(name, "") or why_not_opened(name)
    if not hint:
        hint = did_you_mean(name, [known for hooked in architectures().values() for known in hooked.wraps]).strip()
    if name.endswith("Model"):
        hint = f"Wrap the model with its head (…ForCausalLM). {hint}".strip()
    return f"gatedlens does not know {name}. {hint} {supported()}".replace("  ", " ")


@torch.no_grad()
def tell_nonfinite(name: str, model: nn.Module) -> None:
    """Warn of weights that are NaN or infinite: whatever reads them is so too."""

    def finite(p: Tensor) -> bool:
        low, high = p.aminmax()  # NaN if any number is; no second tensor of this size
        return bool(torch.isfinite(low)) and bool(torch.isfinite(high))

    wrong = []
    for place, module in model.named_modules():
        with disk.reading([module]):
            plain = (
                (n, p)
                for n, p in module.named_parameters(place, False)
                if type(p) is nn.Parameter and p.dtype in FLOATS
            )
            wrong += [path for path, p in plain if not p.is_meta and p.numel() and not finite(p)]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        warnings.warn(f"{name}: {', '.join(wrong[:4])}{more} hold NaN or infinite numbers.", stacklevel=3)
