"""HookedModel: a wrapped model whose forward is open. It knows no architecture and no modality.

    model = gl.wrap(mamba)                                   # shares mamba's parameters
    logits, cache = model.run_with_cache(tokens, names_filter="blocks.*.mixer.hook_decay")
    model.run_with_hooks(tokens, fwd_hooks=[("blocks.3.mixer.hook_gate", lambda gate, hook: gate * 0)])
    model.hook_table()

An architecture subclasses it (see `hooks/`) and gives rows, blocks, and how an input enters and leaves the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformer_lens
from torch import Tensor, nn
from transformer_lens.utilities import Slice

from gatedlens.block import Norm, Run, norm_rows
from gatedlens.cache import ActivationCache, Keep, KeepLive, gradients
from gatedlens.config import HookedConfig
from gatedlens.errors import InputError, PointError, TooLargeError, in_bytes
from gatedlens.hookpoint import HookPoint, rows_of
from gatedlens.padding import Padding
from gatedlens.points import Alias, Names, NamesFilter, Point, View
from gatedlens.state import RecurrentState
from gatedlens.table import HookTable
from gatedlens.visit import Visit

Hook = tuple[str | Callable[[str], bool], Callable[..., Any]]
CACHE_LIMIT = 8 * 2**30  # bytes that run_with_cache takes without being told more


@dataclass
class Batch:
    """An input made ready: `value` is tokens [batch, pos] (or images), or the residual stream if `is_resid`."""

    value: Tensor
    mask: Tensor | None = None
    is_resid: bool = False


class HookedModel(transformer_lens.HookedRootModule):
    """`wrapped` holds the parameters; `cfg` the sizes; `names` all names; `blocks`, `ln_final` the open forward."""

    title: ClassVar[str]
    paper: ClassVar[str] = ""
    reference: ClassVar[tuple[str, dict[str, int]]] = (
        "",
        {},
    )  # a well-known model and its axis sizes, for the catalogue
    recurrence: ClassVar[dict[str, str]] = {}  # how the architecture fills the one recurrence, for the catalogue
    attention_words: ClassVar[dict[str, str]] = {}  # each factor of the implicit attention, from its points; ditto
    wraps: ClassVar[tuple[str, ...]] = ()  # class names that `gl.wrap` hands to this architecture
    hub_types: ClassVar[tuple[str, ...]] = ()  # model_type in a config.json of transformers
    block_points: ClassVar[tuple[Point, ...]] = ()
    first_points: ClassVar[tuple[Point, ...]] = ()
    final_points: ClassVar[tuple[Point, ...]] = norm_rows("ln_final", "blocks.-1.hook_resid_post", "the final norm")
    last_points: ClassVar[tuple[Point, ...]] = ()
    aliases: ClassVar[tuple[Alias, ...]] = ()
    views: ClassVar[tuple[View, ...]] = ()
    has_positions: ClassVar[bool] = False  # whether position_ids mean anything to it
    cfg: HookedConfig
    wrapped: Any
    training: bool

    if TYPE_CHECKING:  # hook points are attributes, named by rows

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, wrapped: nn.Module, *, model_name: str = "", tokenizer: Any = None):
        super().__init__()
        self.wrapped = wrapped
        self.cfg = self.describe(wrapped, model_name or type(wrapped).__name__)
        self.tokenizer = tokenizer
        for row in self.first_points:
            self.add_module(row.name, HookPoint(row))
        self.blocks = nn.ModuleList(self.make_block(layer) for layer in range(self.cfg.n_layers))
        self.ln_final = self.make_final_norm(rows_of("ln_final", self.final_points))
        for row in self.last_points:
            self.add_module(row.name, HookPoint(row))
        self._follow(wrapped.training)
        self.setup()

    def _follow(self, mode: bool) -> None:
        """Take over the wrapped model's mode without touching any of its modules'."""
        theirs = set(self.wrapped.modules())
        for module in self.modules():
            if module not in theirs:
                module.training = mode

    # -- what an architecture gives ------------------------------------------------------------------------------

    @classmethod
    def describe(cls, wrapped: Any, model_name: str) -> Any:
        """The cfg of `wrapped`; CheckpointError for a model that this architecture cannot run."""
        raise NotImplementedError

    def make_block(self, layer: int) -> nn.Module:
        raise NotImplementedError

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        raise NotImplementedError

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        """The rows of one block, relative to it, in firing order."""
        return self.block_points

    @classmethod
    def tiny(cls, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
        """A small random model for tests and tours."""
        raise NotImplementedError

    @classmethod
    def is_original(cls, config: dict[str, Any]) -> bool:
        """Whether a config.json describes this architecture's original (not transformers') checkpoint layout."""
        return False

    @classmethod
    def empty(cls, config: dict[str, Any]) -> nn.Module:
        """A module for the parameters of an original checkpoint with this config."""
        raise NotImplementedError

    @classmethod
    def config_of_file(
        cls, state: Mapping[str, Tensor], told: Mapping[str, Any], variant: str | None
    ) -> dict[str, Any] | None:
        """The config for `empty` of a checkpoint that is one file; None when its keys are not this architecture's.

        state: its tensors. told: what its training script left beside them (`args`). variant: what the caller says.
        """
        return None

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        """The rows of each kind of block that the architecture mixes, by name; one kind, "block", for most."""
        return {"block": cls.block_points}

    @classmethod
    def snippet(cls) -> str:
        """Three lines of code that read one point of `model`, for the catalogue."""
        raise NotImplementedError

    @classmethod
    def rename(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An original checkpoint's tensors by the names of `empty`."""
        return state

    # -- names ---------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Name our modules as TransformerLens does; the wrapped model's are listed and left as they are."""
        self.mod_dict, self.hook_dict = {}, {}
        for name, module in self.named_modules():
            if name == "":
                continue
            self.mod_dict[name] = module
            if isinstance(module, HookPoint):
                module.name = name
                self.hook_dict[name] = module
        rows = {row.name: row for row in self.first_points}
        for layer in range(self.cfg.n_layers):
            rows |= {f"blocks.{layer}.{row.name}": row for row in self.rows_for(layer)}
        rows |= {row.name: row for row in (*self.final_points, *self.last_points)}
        self.hook_dict = {name: self.hook_dict[name] for name in rows}  # in the order in which they fire
        self.names = Names(rows, self.aliases, self.views, self.cfg.n_layers, self.cfg.model_name, self._elsewhere)

    def _elsewhere(self, leaf: str) -> list[str]:
        """The titles of other architectures that have a point with this leaf name."""
        if leaf in {name.rpartition(".")[2] for name in self.names}:
            return []
        return [other.title for other in _architectures() if leaf in {row.leaf for row in other.block_points}]

    def hook_table(self, layer: int | None = 0) -> HookTable:
        """Every hook point as a table: name, axes, shape in this model, equation, source, lazy, bytes per token.

        `layer`: the block to show, None for all of them (blocks differ only where the architecture mixes kinds).
        """
        self._layer(layer, "layer")
        chosen = range(self.cfg.n_layers) if layer is None else [range(self.cfg.n_layers)[layer]]
        blocks = tuple(f"blocks.{i}." for i in chosen)
        rows = {n: p for n, p in self.names.points.items() if not n.startswith("blocks.") or n.startswith(blocks)}
        itemsize = torch.empty((), dtype=self.cfg.dtype).element_size()
        return HookTable(f"{self.cfg.model_name}: hook points ({self.title})", rows, self.cfg.sizes, itemsize)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to()`, `.half()`, `.cuda()`: keep cfg.dtype and cfg.device true."""
        out = super()._apply(fn, recurse)
        fresh = self.describe(self.wrapped, self.cfg.model_name)
        self.cfg.dtype, self.cfg.device = fresh.dtype, fresh.device
        return out

    # -- forward -------------------------------------------------------------------------------------------------

    def prepare(self, input: Any, **options: Any) -> tuple[Batch, dict[str, Any]]:
        """The input as tensors, checked, with the options of `forward` that are still to be used."""
        raise NotImplementedError

    def through_blocks(self, resid: Tensor, run: Run, start: int | None, stop: int | None) -> Tensor:
        """The residual stream after blocks `start` to `stop` (exclusive; negative ones count from the end)."""
        chosen = range(self.cfg.n_layers)[self._layer(start, "start_at_layer") : self._layer(stop, "stop_at_layer")]
        for layer in chosen:
            resid = self.blocks[layer](resid, run)
        return resid

    def _layer(self, layer: int | None, option: str) -> int | None:
        n = self.cfg.n_layers
        if layer is not None and not -n <= layer <= n:
            raise InputError(f"{option}={layer}: {self.cfg.model_name} has {n} layers; give -{n} to {n}.")
        return layer

    def begin(
        self, batch: Batch, state: RecurrentState | None, return_state: bool, position_ids: Tensor | None = None
    ) -> Run:
        """The luggage of a call: padding, positions, the state to go on from, and a place for the state to leave."""
        rows, length = batch.value.shape[0], self.positions(batch)
        self._check_state(state)
        if state is not None and state.batch_size != rows:
            raise InputError(
                f"The state holds {state.batch_size} rows and the input {rows}: `state.rows([...])` repeats or picks rows."
            )
        padding = Padding.of(batch.mask)
        if position_ids is None:
            place = torch.arange(length, device=batch.value.device).expand(rows, length)
            place = place if padding.rank is None else padding.rank
            positions = place if state is None else place + state.seen.to(place.device).unsqueeze(1)
        else:
            positions = self._check_positions(position_ids, rows, length).to(batch.value.device)
        return Run(positions, padding, state, {} if return_state else None)

    def _check_state(self, state: Any) -> None:
        if state is None:
            return
        if not isinstance(state, RecurrentState):
            raise InputError(
                f"state is {type(state).__name__}; it must be a RecurrentState, as return_state=True gives."
            )
        layers = {int(key.split(".")[1]) for key in state}
        if layers and max(layers) >= self.cfg.n_layers:
            raise InputError(
                f"The state is that of a model with {max(layers) + 1} layers ({state.model_name or 'unnamed'}); "
                f"{self.cfg.model_name} has {self.cfg.n_layers}."
            )

    def _check_positions(self, position_ids: Tensor, rows: int, length: int) -> Tensor:
        if not self.has_positions:
            raise InputError(f"position_ids were given, and {self.title} knows no positions: it would ignore them.")
        if tuple(position_ids.shape) not in ((rows, length), (1, length), (length,)):
            raise InputError(f"position_ids have shape {list(position_ids.shape)}; the input is [{rows}, {length}].")
        return position_ids.expand(rows, length)

    # -- hooks ---------------------------------------------------------------------------------------------------

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: Callable[..., Any],
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """`model.add_hook("blocks.*.mixer.hook_gate", f)`: names, aliases, globs, views and predicates; see `reset_hooks`."""
        for found in self.names.hooked(name):
            if found.view is not None:
                Visit.add(self, found, hook, dir, is_permanent, level)
                continue
            asked = [found.asked] if found.asked != found.name else None
            self.hook_dict[found.name].add_hook(hook, dir, is_permanent, level, prepend, asked)

    def _enable_hook(self, name: str | Callable[[str], bool], hook: Callable[..., Any], dir: Any) -> None:
        self.add_hook(name, hook, dir, level=self.context_level)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Any]:
        """`with model.hooks(fwd_hooks=[(name, hook)]): ...`: hooks for the time of the block; every name is checked first."""
        for name, hook in _pairs(fwd_hooks, bwd_hooks):
            self.names.hooked(name)
            if not callable(hook):
                raise InputError(f"The hook on {name!r} is {hook!r}; a hook is a function of (activation, hook).")
        with super().hooks(list(fwd_hooks), list(bwd_hooks), reset_hooks_end, clear_contexts) as hooked:
            yield hooked

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """One forward with hooks; a hook whose point did not fire (a layer that was not run, say) raises."""
        hooked = {str(name): self.names.hooked(name) for name, _ in _pairs(fwd_hooks, bwd_hooks)}
        asked = {name: [at for found in several for at in found.at()[-1:]] for name, several in hooked.items()}
        before = {at: self.hook_dict[at].visits for ats in asked.values() for at in ats}
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts) as model:
            out = model(*model_args, **model_kwargs)
        for name, ats in asked.items():
            if all(self.hook_dict[at].visits == before[at] for at in ats):
                raise PointError(f"The hook on {name!r} never ran: {', '.join(ats[:3])} did not fire in this call.")
        return out

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
        """(store, forward hooks, backward hooks): the hooks that fill `store` when the model runs under them."""
        store = {} if cache is None else cache
        keep = Keep(store, device, remove_batch_dim, Slice.unwrap(pos_slice))
        names = dict.fromkeys(name for group in self.names.select(names_filter) for name in group)
        backward: list[Any] = []
        if incl_bwd:

            def save_grad(grad: Tensor, hook: HookPoint) -> None:
                store[f"{hook.name}_grad"] = keep.trim(grad.detach(), hook).clone()

            backward = [(name, save_grad) for name in names]
        return store, [(name, keep) for name in names], backward

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Add hooks that fill the returned dict at every run, until `reset_hooks`."""
        store, forward, backward = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)
        for direction, hooks in (("fwd", forward), ("bwd", backward)):
            for name, hook in hooks:
                self.add_hook(name, hook, direction)
        self.is_caching = True
        return store

    def run_with_cache(
        self,
        input: Any,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: Any = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        return_cache_object: bool = True,
        max_bytes: int | None = CACHE_LIMIT,
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """`out, cache = model.run_with_cache(input, names_filter="blocks.*.mixer.hook_dt")`.

        names_filter: None (every point that is not lazy), a name, alias or glob, a list of these, or a predicate on
        full names. pos_slice: which positions to keep, whatever axis they are. device: where to keep them.
        incl_bwd: also the gradients of the (scalar) output, under name + "_grad". max_bytes: refuse a larger cache.
        The rest goes to `forward`. Raises PointError if something asked for did not fire.
        """
        groups = self.names.select(names_filter)
        batch, rest = self.prepare(input, *model_args, **model_kwargs)
        if remove_batch_dim and batch.value.shape[0] != 1:
            raise InputError(f"remove_batch_dim needs a batch of one; this one has {batch.value.shape[0]} rows.")
        self._check_size(groups, batch, Slice.unwrap(pos_slice), max_bytes)
        names = list(dict.fromkeys(name for group in groups for name in group))
        store: dict[str, Tensor] = {}
        live: dict[str, tuple[Tensor, HookPoint]] = {}
        keep: Any = Keep(store, device, remove_batch_dim, Slice.unwrap(pos_slice))
        hook = KeepLive(keep, live) if incl_bwd else keep
        with self.hooks([(name, hook) for name in names], (), reset_hooks_end, clear_contexts):
            out = self(batch, **rest)
            if incl_bwd:
                store |= gradients(_scalar(out), live, lambda g, point: keep.trim(g, point).to(device).clone())
        for group in groups:
            if group and not any(name in store for name in group):
                raise PointError(
                    f"{', '.join(group[:3])} did not fire in this call: the layers that ran do not reach it."
                )
        if not return_cache_object:
            return out, store
        tokens = None if batch.is_resid else batch.value
        state = rest.get("state")
        sliced = Slice.unwrap(pos_slice).mode != "identity"
        cache = ActivationCache(store, self, not remove_batch_dim, tokens, batch.mask, state, sliced)
        return out, cache

    def _check_size(self, groups: list[list[str]], batch: Batch, pos_slice: Slice, limit: int | None) -> None:
        """Refuse, before anything runs, a cache of more than `limit` bytes."""
        if limit is None:
            return
        kept = pos_slice.apply(torch.empty(1, self.positions(batch)), dim=1).numel()
        given = {"batch": batch.value.shape[0], "pos": kept, "key_pos": self.positions(batch)}
        sizes = {}
        for name in dict.fromkeys(name for group in groups for name in group):
            point = self.names.points[name]
            sizes[name] = 4 * point.elements({**self.cfg.sizes, **given})
        total = sum(sizes.values())
        if total > limit:
            worst = max(sizes, key=lambda name: sizes[name])
            raise TooLargeError(
                f"This cache would take {in_bytes(total)}, more than max_bytes={in_bytes(limit)}; the largest is {worst}"
                f" with {in_bytes(sizes[worst])}. Ask for fewer points or layers (names_filter), for some positions"
                " (pos_slice), or raise max_bytes."
            )

    def positions(self, batch: Batch) -> int:
        """How many positions the residual stream has for this input."""
        return int(batch.value.shape[1])


def _pairs(*lists: Any) -> list[Any]:
    """The hooks of some lists, each checked to be a (name, hook) pair."""
    pairs = [pair for hooks in lists for pair in hooks]
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(f"Hooks are a list of pairs [(name, hook), ...]; this holds {pair!r}.")
    return pairs


def _scalar(out: Any) -> Tensor:
    if not isinstance(out, Tensor) or out.numel() != 1:
        raise InputError('incl_bwd differentiates a scalar output: pass return_type="loss".')
    if not out.requires_grad:
        raise InputError("incl_bwd needs gradients, and they are switched off (torch.no_grad or inference_mode).")
    return out


def _architectures(base: type[HookedModel] = HookedModel) -> list[type[HookedModel]]:
    """Every architecture that has been defined: the subclasses that have rows."""
    found = [base] if base.block_points else []
    for sub in base.__subclasses__():
        found += _architectures(sub)
    return found
