"""An original checkpoint into the architecture's own parameter module, which is built once everything fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gatedlens.model import checkpoint, fields, fit
from gatedlens.model.checkpoint import about, reading


def from_original(
    hooked: Any,
    source: str,
    where: Any,
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    on_disk: bool,
) -> nn.Module:
    """An original checkpoint into the architecture's own parameter module, which is built once everything fits."""
    fields.check_depth(config, hooked.layout.fields, where, len(state))
    expected = empty(hooked, where, config)
    wanted = expected.state_dict()
    with reading(source, f"holds tensors that are not as {hooked.title}'s are"), about(source):
        bare = [{name.removeprefix(p): t for name, t in state.items()} for p in checkpoint.prefixes(state)]
        found = [hooked.layout.rename(one) for one in bare]
    renamed = next((one for one in found if set(one) & set(wanted)), found[0])
    shapes = {name: tensor.shape for name, tensor in renamed.items()}
    fit.check(source, fit.missing(expected, renamed), set(renamed) - set(wanted), fit.misshapen(wanted, shapes))
    if on_disk:
        return fit.holding(expected, renamed)
    wrapped: nn.Module = hooked.layout.empty(config)
    wrapped.load_state_dict(renamed, strict=False)
    return wrapped.to(dtype or next(iter(renamed.values())).dtype)


def empty(hooked: Any, where: Any, config: dict[str, Any]) -> nn.Module:
    """The module that an original checkpoint's config asks for, without memory for its weights."""
    with reading(where, f"asks for a {hooked.title} that cannot be built"), about(where), torch.device("meta"):
        module: nn.Module = hooked.layout.empty(config)
    return module
