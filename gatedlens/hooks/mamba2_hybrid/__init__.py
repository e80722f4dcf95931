"""Hybrids around Mamba-2: Bamba, Granite-4-H, Falcon-H1, Nemotron-H and Zamba2; attention, MLPs and experts beside the scan.

    Bamba         h += mamba or attention (norm(h))               h += mlp(norm(h))                           bamba.py
    Granite-4-H   the same with multipliers                       h += r (experts(m) + shared_mlp(m))         granite.py
    Falcon-H1     h += a mamba(norm(h)) + b attention(norm(h))    h += mlp(norm(h))                           falcon_h1.py
    Nemotron-H    h += mamba, attention, mlp or experts (norm(h)), one a layer                                nemotron_h.py
    Zamba2        h += mamba(norm(h + t)), t of a block that several layers share, or none                    zamba2.py

The mixer is Mamba-2's (hooks/mamba2.py), word for word; what stands around it is data, a `Family` each (parts/hybrid.py).
Wraps transformers' classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gatedlens.compat.names.hybrid import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.mamba2_hybrid import FIELDS, TINY
from gatedlens.hooks.mamba2 import HookedMamba2, Mamba2Shape
from gatedlens.hooks.mamba2_hybrid.bamba import BAMBA
from gatedlens.hooks.mamba2_hybrid.falcon_h1 import FALCON_H1
from gatedlens.hooks.mamba2_hybrid.granite import GRANITE, NO_POSITIONS
from gatedlens.hooks.mamba2_hybrid.nemotron_h import NEMOTRON_H
from gatedlens.hooks.mamba2_hybrid.zamba2 import ZAMBA2
from gatedlens.model.base import Wrapped
from gatedlens.parts.attention import CARRIED_WINDOW
from gatedlens.parts.hybrid import HybridConfig, HybridModel, points_of
from gatedlens.parts.positioned import NEXT_POSITION

FAMILIES = {  # by the model_type of transformers
    "bamba": BAMBA,
    "granitemoehybrid": GRANITE,
    "falcon_h1": FALCON_H1,
    "nemotron_h": NEMOTRON_H,
    "zamba2": ZAMBA2,
}


@dataclass(kw_only=True)
class Mamba2HybridConfig(HybridConfig):
    """cfg of such a hybrid; the sizes of its mixers are 0 where it has none."""

    head = "q_head"
    n_mixer_heads: int = 0
    d_inner: int = 0
    d_state: int = 0
    n_groups: int = 0
    d_conv: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        value = self.d_inner // self.n_mixer_heads if self.n_mixer_heads else 0
        heads = {"channel": self.d_inner, "head": self.n_mixer_heads, "value": value}
        keys = {"group": self.n_groups, "state": self.d_state, "tap": self.d_conv}
        return {**super().sizes, **heads, **keys, "d_concat": 2 * self.d_model}


class HookedMamba2Hybrid(HybridModel):
    """`HookedMamba2Hybrid(BambaForCausalLM(...))`, or better `gl.wrap(...)`: a hybrid around Mamba-2 opened up.

    These are Bamba, Granite-4-H, Falcon-H1, Nemotron-H and Zamba2. Heads (axis `head`) are those of Mamba-2; the attention's are
    `q_head`. Padding on either side or inside a row, and documents packed in a row, are as if each row stood alone; a time step
    keeps its limits while decoding. (transformers lets a bias of in_proj into the state through padding on the left, and padding
    on the right into the state that a call leaves; packed documents run into one another; Bamba's positions begin anew where a
    cache goes on without position_ids.)
    """

    title = "Mamba-2 hybrids"
    paper = (
        "Bamba (huggingface.co/blog/bamba), Granite 4.0 (ibm.com/granite), Falcon-H1 (arXiv 2507.22448), Nemotron-H "
        "(arXiv 2504.03624) and Zamba2 (arXiv 2411.15242), around Mamba-2 (arXiv 2405.21060)"
    )
    reference = (
        "ibm-granite/granite-4.0-h-small",
        {
            "d_model": 4096, "channel": 8192, "head": 128, "value": 64, "state": 128, "group": 1, "tap": 4, "q_head": 32,
            "kv_head": 8, "d_head": 128, "d_mlp": 1536, "expert": 72, "d_expert": 768, "d_shared": 1536, "latent": 1024,
            "d_concat": 8192,
        },
    )  # fmt: skip
    recurrence: ClassVar = HookedMamba2.recurrence
    attention_words: ClassVar = {**HookedMamba2.attention_words, "attention layers": NO_POSITIONS.words}
    wraps = tuple(family.wraps for family in FAMILIES.values())
    hub_types = tuple(FAMILIES)
    hub_fields = FIELDS
    small = TINY
    families = FAMILIES
    config_class = Mamba2HybridConfig
    block_points = points_of(FAMILIES)
    aliases = ALIASES
    carried: ClassVar = {**HookedMamba2.carried, **CARRIED_WINDOW, **NEXT_POSITION}
    cfg: Mamba2HybridConfig

    @classmethod
    def sizes_of_mixers(cls, wrapped: Wrapped, model_name: str) -> dict[str, int]:
        """`HookedMamba2Hybrid.sizes_of_mixers(wrapped, "mine")`: the sizes by name, none where there are no mixers.

        CheckpointError for a mixer that differs from the others or is laid out otherwise.
        """
        found, given = {}, wrapped.config.to_dict()
        for number, layer in enumerate(wrapped.model.layers):
            parts = layer._modules.get("mamba_decoder", layer)._modules
            mixer = parts.get("mamba") or parts.get("mixer")
            if mixer is None or "A_log" not in mixer._parameters:
                continue
            if vars(mixer)["activation"] not in ("silu", "swish"):
                raise CheckpointError(
                    f"{model_name} has the activation {mixer.activation!r} in a mixer; supported is 'silu'."
                )
            shape = Mamba2Shape.of(mixer, given)
            shape.check(mixer, f"Layer {number} of {model_name}")
            found[shape.n_heads, shape.d_inner, shape.d_state, shape.n_groups, mixer.conv1d.weight.shape[-1]] = number
        if len(found) > 1:
            raise CheckpointError(
                f"{model_name} has mixers of different sizes, in layers {', '.join(map(str, found.values()))}."
            )
        names = ("n_mixer_heads", "d_inner", "d_state", "n_groups", "d_conv")
        return dict(zip(names, next(iter(found)), strict=True)) if found else {}


HOOKED = HookedMamba2Hybrid
