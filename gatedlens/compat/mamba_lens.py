"""MambaLens's interface over gatedlens: change the import, keep the code.

    from gatedlens.compat.mamba_lens import HookedMamba            # was: from mamba_lens import HookedMamba
    model = HookedMamba.from_pretrained("state-spaces/mamba-370m", device="cuda")
    logits, activations = model.run_with_cache("Hello World")      # every point, the states hook_h.{t} among them
    model.run_with_hooks(tokens, fwd_hooks=[("blocks.3.hook_h.2", patch)], fast_ssm=True, fast_conv=True)
    model(tokens, only_use_these_layers=[0, 1, 3])

Beside MambaLens's 25 names all of ours work. What differs, for the better: hooks never go silent (fast_ssm and fast_conv are
accepted and not needed: fused kernels run where they can and nobody listens inside), text may be a list, padding is exact,
`start_at_layer` goes on to the logits, `hook_A` is read and not hooked. A predicate, in names_filter or in place of a
hook's name, sees MambaLens's names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatedlens.address.names import NamesFilter
from gatedlens.compat.mamba_lens_format import (
    MambaCfg,
    MambaInitCfg,
    convert_hooked_mamba_config_to_original_config,
    convert_hooked_state_dict_to_original_state_dict,
    convert_original_config_to_hooked_mamba_config,
    convert_original_state_dict_to_hooked_state_dict,
    new_weights,
)
from gatedlens.errors import InputError
from gatedlens.hooks import mamba
from gatedlens.loading import from_pretrained
from gatedlens.model.batch import ForwardOutput, Input
from gatedlens.model.hooking import Hooks
from gatedlens.model.norm import Norm
from gatedlens.model.run import Run
from gatedlens.model.tokenizer import TokenizerLike

__all__ = [
    "HookedMamba",
    "MambaCfg",
    "MambaInitCfg",
    "convert_hooked_mamba_config_to_original_config",
    "convert_hooked_state_dict_to_original_state_dict",
    "convert_original_config_to_hooked_mamba_config",
    "convert_original_state_dict_to_hooked_state_dict",
]
TOKENIZER = "EleutherAI/gpt-neox-20b"  # of the original checkpoints, which come without one
EVERYWHERE = ("hook_embed", "hook_norm", "hook_logits")
IN_A_BLOCK = (
    "resid_pre", "layer_input", "normalized_input", "skip", "in_proj", "conv", "ssm_input", "delta_1", "delta_2", "B", "C",
    "delta", "A", "A_bar", "B_bar", "h_start", "y", "ssm_output", "after_skip", "out_proj", "resid_post",
)  # fmt: skip


class HookedMamba(mamba.HookedMamba):
    """MambaLens's HookedMamba: `HookedMamba.from_pretrained(name)`, `HookedMamba(cfg=MambaCfg(...), tokenizer=...)`."""

    def __init__(
        self,
        wrapped: nn.Module | None = None,
        *,
        cfg: Any = None,
        device: Any = None,
        tokenizer: Any = None,
        initialize_params: bool = False,
        model_name: str = "",
    ):
        if (wrapped is None) == (cfg is None):
            raise InputError("HookedMamba takes cfg=MambaCfg(...), or a Mamba model to wrap, and one of the two.")
        if wrapped is None:
            wrapped = new_weights(convert_original_config_to_hooked_mamba_config(cfg, device), initialize_params).eval()
        super().__init__(wrapped if device is None else wrapped.to(device), model_name=model_name, tokenizer=tokenizer)
        self.layer_order: list[int] | None = None

    @classmethod
    def from_pretrained(  # type: ignore[override]  # MambaLens calls its argument otherwise
        cls,
        pretrained_model_name: str | Path,
        device: str | torch.device | None = None,
        tokenizer: TokenizerLike = None,
    ) -> HookedMamba:
        """`HookedMamba.from_pretrained("state-spaces/mamba-130m")`: a hub name, folder or bundled model, as
        `gl.from_pretrained`; the tokenizer is the checkpoint's, else GPT-NeoX's.

        InputError for a model that is no Mamba; CheckpointError for one that cannot be read.
        """
        model = from_pretrained(pretrained_model_name, device=device, tokenizer=tokenizer)
        if not isinstance(model, mamba.HookedMamba):
            raise InputError(
                f"{pretrained_model_name} is a {model.title}, and MambaLens knows Mamba: gl.from_pretrained."
            )
        tokenizer = model.tokenizer
        if tokenizer is None and not Path(str(pretrained_model_name)).exists():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        return cls(model.wrapped, model_name=model.cfg.model_name, tokenizer=tokenizer)

    def forward(  # type: ignore[override]
        self,
        input: Input | None = None,
        *args: Any,
        only_use_these_layers: Sequence[int] | None = None,
        fast_conv: bool = False,
        fast_ssm: bool = False,
        warn_disabled_hooks: bool = True,
        **options: Any,
    ) -> ForwardOutput:
        """`model.forward(input, only_use_these_layers=[0, 1, 3])`, called as `model(input)`: as gatedlens's forward.

        only_use_these_layers: run these blocks alone, in this order, as often as they are named. fast_conv, fast_ssm and
        warn_disabled_hooks change nothing: no hook is ever disabled. InputError for a layer that there is not, and for
        layers beside start_at_layer, stop_at_layer or a state.
        """
        with self._only(only_use_these_layers, options):
            return super().forward(input, *args, **options)

    @contextmanager
    def _only(self, layers: Sequence[int] | None, options: Mapping[str, Any]) -> Iterator[None]:
        if layers is not None:
            clash = [name for name in ("start_at_layer", "stop_at_layer", "state") if options.get(name) is not None]
            clash += ["return_state"] if options.get("return_state") else []
            if clash:
                raise InputError(f"only_use_these_layers says which layers run; {clash[0]} does not go with it.")
            wrong = [layer for layer in layers if not -self.cfg.n_layers <= layer < self.cfg.n_layers]
            if wrong:
                raise InputError(
                    f"only_use_these_layers names layer {wrong[0]}; there are 0 to {self.cfg.n_layers - 1}."
                )
        before, self.layer_order = self.layer_order, None if layers is None else list(layers)
        try:
            yield
        finally:
            self.layer_order = before

    def through_blocks(
        self, resid: Float[Tensor, "batch pos d_model"], run: Run, start: int | None, stop: int | None
    ) -> Float[Tensor, "batch pos d_model"]:
        if self.layer_order is None:
            return super().through_blocks(resid, run, start, stop)
        for layer in self.layer_order:
            resid = self.blocks[layer](resid, run)
        return resid

    # -- names -------------------------------------------------------------------------------------------------------

    def mamba_lens_names(self, length: int) -> list[str]:
        """`model.mamba_lens_names(16)`: MambaLens's names of every point, for an input of `length` positions."""
        blocks = [f"blocks.{layer}.hook_{word}" for layer in range(self.cfg.n_layers) for word in IN_A_BLOCK]
        steps = [f"blocks.{layer}.hook_h.{t}" for layer in range(self.cfg.n_layers) for t in range(length)]
        return [*EVERYWHERE, *blocks, *steps]

    def _chosen(self, predicate: Callable[[str], bool], input: Input | None, options: Mapping[str, Any]) -> list[str]:
        reading = {name: options[name] for name in ("prepend_bos", "padding_side", "start_at_layer") if name in options}
        names = self.mamba_lens_names(self.positions(self.prepare(input, **reading)[0]))
        chosen = [name for name in names if predicate(name)]
        if not chosen:
            raise InputError(f"The predicate {predicate!r} is false for every name of MambaLens.")
        return chosen

    def run_with_cache(
        self,
        input: Input | None = None,
        *args: Any,
        names_filter: NamesFilter = None,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        **options: Any,
    ) -> tuple[Any, Any]:
        """`logits, cache = model.run_with_cache(input)`: as gatedlens's, with every point kept, lazy ones too, as in MambaLens.

        names_filter: names, or a predicate of MambaLens's names; hooks may be on meanwhile. InputError for a predicate that
        picks no name.
        """
        if fwd_hooks or bwd_hooks:
            forward, backward = (self._spelled(hooks, input, options) for hooks in (fwd_hooks, bwd_hooks))
            with self.hooks(forward, backward):
                return self.run_with_cache(input, *args, names_filter=names_filter, **options)
        if names_filter is None:
            names_filter = list(self.names)
        elif callable(names_filter):
            names_filter = self._chosen(names_filter, input, options)
        return super().run_with_cache(input, *args, names_filter=names_filter, **options)

    def run_with_hooks(  # type: ignore[override]
        self, *args: Any, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), **options: Any
    ) -> ForwardOutput:
        """`model.run_with_hooks(tokens, fwd_hooks=[("blocks.3.hook_h.2", patch)])`: as gatedlens's.

        A predicate in place of a name stands for the names of MambaLens that it picks; InputError if it picks none.
        """
        given = args[0] if args else options.get("input")
        forward, backward = (self._spelled(hooks, given, options) for hooks in (fwd_hooks, bwd_hooks))
        return super().run_with_hooks(*args, fwd_hooks=forward, bwd_hooks=backward, **options)

    def _spelled(self, hooks: Hooks, input: Input | None, options: Mapping[str, Any]) -> list[Any]:
        """Hooks by names, where a predicate stood."""
        chosen = [(self._chosen(n, input, options) if callable(n) else [n], hook) for n, hook in hooks]
        return [(name, hook) for names, hook in chosen for name in names]

    @contextmanager
    def input_dependent_hooks_context(
        self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), **_: Any
    ) -> Iterator[HookedMamba]:
        """`with model.input_dependent_hooks_context(input=tokens): ...`: MambaLens makes `hook_h.{t}` for an input here; ours
        are always there.
        """
        with self.hooks(fwd_hooks, bwd_hooks) as model:
            yield model

    @property
    def norm(self) -> Norm:
        """The final norm: `model.lm_head(model.norm(resid))` is MambaLens's logit lens."""
        return self.ln_final

    @property
    def lm_head(self) -> nn.Module:
        """The unembedding, by MambaLens's name."""
        return self.unembedding

    # -- parameters --------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        """`model.state_dict()`: parameters by MambaLens's names; within a larger module, and with arguments, as torch's."""
        if args or options:
            return super().state_dict(*args, **options)
        return convert_original_state_dict_to_hooked_state_dict(state_dict=self.wrapped.state_dict())

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> tuple[list[str], list[str]]:
        """`missing, unexpected = model.load_state_dict(state_dict)`: parameters by MambaLens's names, or by mamba-ssm's."""
        if not any(key.startswith("backbone.") for key in state_dict):
            state_dict = convert_hooked_state_dict_to_original_state_dict(state_dict=state_dict)
        theirs = set(dict(self.wrapped.named_parameters()))
        if "backbone.embeddings.weight" in theirs:
            state_dict = {
                key.replace("backbone.embedding.", "backbone.embeddings."): v for key, v in state_dict.items()
            }
        return self.wrapped.load_state_dict(state_dict, strict=strict, assign=assign)
