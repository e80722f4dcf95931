"""The bridge: our hook points for users of TransformerLens's TransformerBridge.

    import gatedlens.bridge
    gatedlens.bridge.register()                                    # opt-in; `unregister()` undoes it
    bridge = TransformerBridge.boot_transformers("state-spaces/mamba-130m-hf")
    logits, cache = bridge.run_with_cache("Call me", names_filter="blocks.3.mixer.hook_decay")
    bridge.gated                                                   # the HookedMamba inside, and all that takes one

From then on a bridge of Mamba, FalconMamba, RecurrentGemma or RWKV runs gatedlens's forward over the Hugging Face model's own
parameters, and lists our points, name for name; every one fires, lazy ones when they are hooked. What TransformerBridge's
design rules out:

 - text for the model inside: `bridge.gated` reads ids, `bridge.to_tokens(text)`; its `set_tokenizer` gives it a tokenizer;
 - other tools' names, globs and the propagating `hook_h.{t}`: `bridge.gated` knows them;
 - lazy points left out by default: `bridge.run_with_cache()` asks for all, so name what you want of a large model;
 - a carried state and cached generation: `generate` reads the whole prefix at every step, which is exact, and `hf_generate`
   raises; `bridge.gated.generate` goes on from the state;
 - folded weights (`enable_compatibility_mode` raises), so its `logit_attrs` leaves the final norm's weight out, as on any
   unfolded bridge; the cache of `bridge.gated.run_with_cache` counts it;
 - `bridge.state_dict()` holds what its components own, which is not all; `bridge.parameters()` are complete.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES, ArchitectureAdapterFactory
from transformer_lens.hook_points import LensHandle
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.generalized_components import EmbeddingBridge, UnembeddingBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from gatedlens.errors import InputError
from gatedlens.hooks import architectures
from gatedlens.loading import wrap
from gatedlens.model.hookpoint import HookPoint
from gatedlens.model.language import HookedLanguageModel


def bridged() -> list[str]:
    """`gatedlens.bridge.bridged()`: the Hugging Face classes that `register` takes over: what our language architectures
    wrap and a bridge knows.
    """
    language = [a for a in architectures().values() if issubclass(a, HookedLanguageModel)]
    return [name for a in language for name in a.wraps if name in SUPPORTED_ARCHITECTURES]


def register() -> None:
    """`gatedlens.bridge.register()`: have TransformerBridge open gated-linear models with gatedlens, until `unregister`."""
    for name in bridged():
        ArchitectureAdapterFactory.register_adapter(name, GatedAdapter)


def unregister() -> None:
    """`gatedlens.bridge.unregister()`: give TransformerBridge its own adapters back."""
    for name in bridged():
        ArchitectureAdapterFactory.register_adapter(name, SUPPORTED_ARCHITECTURES[name])


class Parts:
    """Which of our modules opens which of the wrapped model's; one for all the copies that a bridge makes of a component."""

    def __init__(self, *parts: Any):
        self.by_weights = {id(part.weights): part for part in parts}

    def __deepcopy__(self, memo: Any) -> Parts:
        return self


def drop_points(component: GeneralizedComponent) -> None:
    """Take away `hook_in` and `hook_out`, which would never fire: a bridge is to list what it can serve."""
    del component.hook_in, component.hook_out
    component._hook_registry.clear()


class Opened(GeneralizedComponent):
    """A bridge component that shows the hook points of one of our modules; `forward` is that module's."""

    def __init__(self, name: str, parts: Parts):
        super().__init__(name)
        self.parts = parts
        drop_points(self)  # ours fire in their place

    def set_original_component(self, original_component: nn.Module) -> None:
        self.__dict__["part"] = part = self.parts.by_weights[id(original_component)]
        for name, child in part.named_children():
            self.add_module(name, child)
        super().set_original_component(original_component)  # last: behind it the wrapped module's names are taken

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.part(*args, **kwargs)


class SecondName(HookPoint):
    """A point of ours under the bridge's own name for it: its hooks go to that point, and are told the name they asked for.

    TransformerLens's tools look up what they captured by `hook.name` (its Jacobian lens by `blocks.3.hook_out`).
    """

    def __init__(self, point: HookPoint):
        self.__dict__["behind"] = lambda: (
            point
        )  # not the point: a bridge lists every point that it finds as an attribute
        super().__init__(point.point)

    @property
    def fwd_hooks(self) -> list[LensHandle]:
        return self.behind().fwd_hooks

    @fwd_hooks.setter
    def fwd_hooks(self, hooks: list[LensHandle]) -> None:
        """Nothing: the list is the point's, and only `__init__` sets it."""

    @property
    def bwd_hooks(self) -> list[LensHandle]:
        return self.behind().bwd_hooks

    @bwd_hooks.setter
    def bwd_hooks(self, hooks: list[LensHandle]) -> None:
        """Nothing, as for `fwd_hooks`."""

    def add_hook(
        self,
        hook: Any,
        dir: Any = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: list[str] | None = None,
    ) -> LensHandle:
        asked = [str(self.name)] if alias_names is None else alias_names
        return self.behind().add_hook(hook, dir, is_permanent, level, prepend, asked)

    def remove_hooks(self, dir: Any = "fwd", including_permanent: bool = False, level: int | None = None) -> None:
        self.behind().remove_hooks(dir, including_permanent, level)

    def has_hooks(self, dir: Any = "both", including_permanent: bool = True, level: int | None = None) -> bool:
        return self.behind().has_hooks(dir, including_permanent, level)


class OpenedBlock(Opened):
    """A block; the bridge stops a run at its `hook_in`."""

    is_list_item = True
    hook_out_is_single_residual_stream = True

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        self.hook_in, self.hook_out = SecondName(self.part.hook_resid_pre), SecondName(self.part.hook_resid_post)


class Embedding(EmbeddingBridge):
    """The embedding's weights; our forward does not call it, and its `hook_out` is our `hook_embed`."""

    def __init__(self, name: str, hook_embed: HookPoint):
        super().__init__(name)
        drop_points(self)
        self.hook_out = SecondName(hook_embed)

    def forward(
        self, input_ids: Int[Tensor, "batch pos"], position_ids: Any = None, **kwargs: Any
    ) -> Float[Tensor, "batch pos d_model"]:
        return self.original_component(input_ids)


class Unembedding(UnembeddingBridge):
    """The unembedding's weights; our forward does not call it, and its output is our `hook_logits`."""

    def __init__(self, name: str):
        super().__init__(name)
        drop_points(self)

    def forward(self, hidden_states: Float[Tensor, "... d_model"], **kwargs: Any) -> Float[Tensor, "... d_vocab"]:
        return self.original_component(hidden_states)


class GatedAdapter(ArchitectureAdapter):
    """TransformerLens's adapter for every architecture that gatedlens opens: its components are found, not listed."""

    supports_kv_cache = False
    supports_compatibility_mode = False
    supports_hf_output_attentions = False
    supports_fold_ln = False
    applicable_phases: ClassVar[list[int]] = []  # TransformerLens's verification compares modules that we do not call

    def __init__(self, cfg: Any):
        super().__init__(cfg)
        self.weight_processing_conversions = dict[str, Any]()
        self.component_mapping = dict[str, Any]()

    def prepare_model(self, hf_model: nn.Module) -> None:
        """`adapter.prepare_model(hf_model)`: open `hf_model`: its forward becomes ours, over its own parameters."""
        gated = self.gated = wrap(hf_model)
        for word in (
            "normalization_type",
            "eps",
            "attn_only",
            "act_fn",
            "positional_embedding_type",
            "n_heads",
            "d_head",
        ):
            setattr(self.cfg, word, getattr(gated.cfg, word))
        self.cfg.use_hook_mlp_in = self.cfg.use_attn_in = True  # points of ours by these names always fire
        paths = {id(module): path for path, module in hf_model.named_modules()}
        blocks = paths[id(gated.blocks[0].weights)].rpartition(".")[0]
        parts = Parts(*gated.blocks, gated.ln_final)
        self.component_mapping = {
            "embed": Embedding(paths[id(gated.embedding)], gated.hook_embed),
            "blocks": OpenedBlock(blocks, parts),
            "ln_final": Opened(paths[id(gated.ln_final.weights)], parts),
            "unembed": Unembedding(paths[id(gated.unembedding)]),
        }
        gated.watch = None  # the bridge now puts components of its own, which hold these modules, in their places
        hf_model.forward = self.run

    def setup_hook_compatibility(self, bridge: TransformerBridge) -> None:
        """`adapter.setup_hook_compatibility(bridge)`: the points that belong to no component, the model as `bridge.gated`,
        and the points' own names again.
        """
        for row in (*self.gated.first_points, *self.gated.last_points):
            setattr(bridge, row.name, self.gated.hook_dict[row.name])
        for name, point in self.gated.hook_dict.items():
            point.name = name
        bridge.__dict__["gated"] = self.gated
        self.blocks = bridge.blocks

    def apply_output_logits_transform(self, logits: Float[Tensor, "... d_vocab"]) -> Float[Tensor, "... d_vocab"]:
        """`adapter.apply_output_logits_transform(logits)`: as the hooked model's."""
        return self.gated.apply_output_logits_transform(logits)

    def run(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
        inputs_embeds: Float[Tensor, "batch pos d_model"] | None = None,
        labels: Int[Tensor, "batch pos"] | None = None,
    ) -> SimpleNamespace:
        """`adapter.run(input_ids)`: the forward of the wrapped model as the bridge calls it, from and to the layers that
        the bridge marked.

        With start_at_layer the residual stream comes as inputs_embeds; labels are the bridge's, which computes the loss.
        """
        marks = vars(self.blocks[0])
        start, stop = marks.get("_start_at_layer_idx"), marks.get("_stop_at_layer_idx")
        input = input_ids if start is None else marks["_start_residual"]
        if input is None:
            raise InputError(
                "A bridge of a gated-linear model reads token ids; a residual stream needs start_at_layer."
            )
        if start is None and attention_mask is not None:
            input = input.masked_fill(attention_mask == 0, 0)  # a bridge may pad with a token that it invented
        out = self.gated(input, attention_mask=attention_mask, start_at_layer=start, stop_at_layer=stop)
        if stop is not None:
            raise StopAtLayerException(out)
        return SimpleNamespace(logits=out)
