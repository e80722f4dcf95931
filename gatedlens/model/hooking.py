"""Hooking: putting hooks on points, by any name, and taking caches.

    with model.hooks(fwd_hooks=[("blocks.3.mixer.hook_gate", f)]): ...
    model.run_with_hooks(input, fwd_hooks=[("blocks.*.hook_mixer_out", f)])
    out, cache = model.run_with_cache(input, names_filter="blocks.*.mixer.hook_decay")

What HookedModel inherits of this: TransformerLens's HookedRootModule, with names resolved through our tables, nothing
silently missing, and hooks undone on exceptions too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
import transformer_lens
from torch import Tensor
from transformer_lens.utilities import Slice

from gatedlens.address.names import Name, Names, NamesFilter
from gatedlens.errors import InputError, PointError, TooLargeError, in_bytes
from gatedlens.model.batch import Batch, ForwardOutput, Input, Option, Output
from gatedlens.model.cache import ActivationCache
from gatedlens.model.config import HookedConfig
from gatedlens.model.hookpoint import Capture, HookPoint, Saver
from gatedlens.model.keeping import Keep, KeepLive, SliceLike, gradients
from gatedlens.model.turns import Turns
from gatedlens.model.views import Visit
from gatedlens.options import Device, checked, device_of, is_many

Hook = tuple[Name | Callable[[str], bool], Callable[..., Any]]
# What `fwd_hooks=` and `bwd_hooks=` take, and `self` as it is returned; for type checkers alone, since `_pairs` says more.
if TYPE_CHECKING:
    from typing_extensions import Self

    Hooks: TypeAlias = Iterable[Hook]
else:
    Hooks = Self = Any
CACHE_LIMIT = 8 * 2**30  # bytes that run_with_cache takes without being told more


class Hooking(transformer_lens.HookedRootModule):
    """`names`, `hook_dict`, `cfg`, `prepare` and `positions` are the model's."""

    names: Names
    cfg: HookedConfig
    turns: Turns

    def prepare(self, input: Input | None, **options: Option) -> tuple[Batch, dict[str, Any]]:
        """`batch, options = model.prepare(input)`: the input as tensors, checked, with the options of `forward` that are
        still to be used.
        """
        raise NotImplementedError

    def follow(self) -> None:
        """See what has changed in the wrapped model since the last call."""
        raise NotImplementedError

    def positions(self, batch: Batch) -> int:
        """`model.positions(batch)`: how many positions the residual stream has for this input."""
        return int(batch.value.shape[1])

    def add_hook(
        self,
        name: Name | Callable[[str], bool],
        hook: Callable[..., Any],
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """`model.add_hook("blocks.*.mixer.hook_gate", f)`: names, aliases, globs, views and predicates; see `reset_hooks`."""
        _check_hook(name, hook)
        for found in self.names.hooked(name):
            if found.view is not None:
                Visit.add(self, found, hook, dir, is_permanent, level)
                continue
            asked = [found.asked] if found.asked != found.name else None
            self.hook_dict[found.name].add_hook(hook, dir, is_permanent, level, prepend, asked)

    def is_hooked(self) -> bool:
        """`model.is_hooked()`: whether a hook that may edit is on any point now: what a run does may then depend on its
        rows and positions.
        """
        return any(point.hooked() and not point.only_by_position() for point in self.hook_dict.values())

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Self]:
        """`with model.hooks(fwd_hooks=[(name, hook)]): ...`: hooks for the time of the block; every name is checked first.

        Meanwhile other threads' calls of this model wait; see `turns.py`.
        """
        for name, hook in _pairs(fwd_hooks, bwd_hooks):
            self.names.hooked(name)
            _check_hook(name, hook)
        with self._level(reset_hooks_end, clear_contexts) as level:
            for dir, hooks in (("fwd", fwd_hooks), ("bwd", bwd_hooks)):
                for name, hook in hooks:
                    self.add_hook(name, hook, dir, level=level)
            yield self

    @contextmanager
    def _level(self, reset_hooks_end: bool, clear_contexts: bool) -> Iterator[int]:
        """The model for this thread alone, and a level to put hooks on: those of it go when the block is left."""
        with self.turns.alone():
            self.context_level += 1
            try:
                yield self.context_level
            finally:
                if reset_hooks_end:
                    self.reset_hooks(clear_contexts, level=self.context_level)
                self.context_level -= 1

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: str = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """`model.reset_hooks()`: take hooks off, as TransformerLens's; permanent ones stay unless `including_permanent`.

        Without a `level` also those of a thread that has ended, or of a `with model.hooks()` block that is never left.
        """
        if level is None:
            self.turns.clear()
        super().reset_hooks(clear_contexts, direction, including_permanent, level)

    @overload
    def run_with_hooks(
        self,
        input: Input | None = None,
        return_type: Literal["logits", "loss"] = "logits",
        *,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        return_state: Literal[False] = False,
        **options: Any,
    ) -> Tensor: ...
    @overload
    def run_with_hooks(
        self,
        input: Input | None = None,
        *,
        return_type: Literal["both"],
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        return_state: Literal[False] = False,
        **options: Any,
    ) -> Output: ...
    @overload
    def run_with_hooks(
        self,
        input: Input | None = None,
        *,
        return_type: None,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        stop_at_layer: None = None,
        return_state: Literal[False] = False,
        **options: Any,
    ) -> None: ...
    @overload
    def run_with_hooks(self, *args: Any, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), **options: Any) -> Any: ...

    def run_with_hooks(
        self,
        *model_args: Input | Option,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Input | Option,
    ) -> ForwardOutput:
        """`model.run_with_hooks(tokens, fwd_hooks=[("blocks.3.mixer.hook_gate", f)])`: one forward with hooks.

        The other arguments are those of `forward`. PointError for a hook whose point did not fire (a layer that was not
        run, say).
        """
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
        device: Device = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: SliceLike = None,
    ) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
        """`store, forward, backward = model.get_caching_hooks("blocks.*.mixer.hook_dt")`: hooks that fill `store` when the
        model runs under them.
        """
        store = {} if cache is None else cache
        keep = Keep(store, device_of(device), remove_batch_dim, _sliced(pos_slice))
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
        device: Device = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """`store = model.add_caching_hooks("hook_embed")`: hooks that fill the returned dict at every run, until
        `reset_hooks`.
        """
        store, forward, backward = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)
        for direction, hooks in (("fwd", forward), ("bwd", backward)):
            for name, hook in hooks:
                self.add_hook(name, hook, direction)
        self.is_caching = True
        return store

    @overload
    def run_with_cache(
        self,
        input: Input | None = None,
        return_type: Literal["logits", "loss"] = "logits",
        *,
        names_filter: NamesFilter = None,
        device: Device = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        pos_slice: SliceLike = None,
        return_cache_object: Literal[True] = True,
        max_bytes: int | None = CACHE_LIMIT,
        return_state: Literal[False] = False,
        **options: Any,
    ) -> tuple[Tensor, ActivationCache]: ...
    @overload
    def run_with_cache(
        self,
        input: Input | None = None,
        *,
        return_type: Literal["both"],
        names_filter: NamesFilter = None,
        return_cache_object: Literal[True] = True,
        return_state: Literal[False] = False,
        **options: Any,
    ) -> tuple[Output, ActivationCache]: ...
    @overload
    def run_with_cache(
        self,
        input: Input | None = None,
        *,
        return_type: None,
        names_filter: NamesFilter = None,
        return_cache_object: Literal[True] = True,
        stop_at_layer: None = None,
        return_state: Literal[False] = False,
        **options: Any,
    ) -> tuple[None, ActivationCache]: ...
    @overload
    def run_with_cache(
        self, *args: Any, names_filter: NamesFilter = None, return_cache_object: Literal[False], **options: Any
    ) -> tuple[Any, dict[str, Tensor]]: ...
    @overload
    def run_with_cache(
        self, *args: Any, names_filter: NamesFilter = None, return_cache_object: Literal[True] = True, **options: Any
    ) -> tuple[Any, ActivationCache]: ...

    @checked
    def run_with_cache(
        self,
        input: Input | None = None,
        *model_args: Option,
        names_filter: NamesFilter = None,
        device: Device = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: SliceLike = None,
        return_cache_object: bool = True,
        max_bytes: int | None = CACHE_LIMIT,
        **model_kwargs: Option,
    ) -> tuple[ForwardOutput, ActivationCache | dict[str, Tensor]]:
        """`out, cache = model.run_with_cache(input, names_filter="blocks.*.mixer.hook_dt")`.

        names_filter: None (every point that is not lazy), a name, alias or glob, a list of these, or a predicate on
        full names. pos_slice: which positions to keep, whatever axis they are. device: where to keep them.
        incl_bwd: also the gradients of the (scalar) output, under name + "_grad". max_bytes: refuse a larger cache.
        The rest goes to `forward`. Raises PointError if something asked for did not fire.
        """
        groups, device, kept = self.names.select(names_filter), device_of(device), _sliced(pos_slice)
        self.follow()
        batch, rest = self.prepare(input, *model_args, **model_kwargs)
        if remove_batch_dim and batch.value.shape[0] != 1:
            raise InputError(f"remove_batch_dim needs a batch of one; this one has {batch.value.shape[0]} rows.")
        self._check_size(groups, batch, kept, max_bytes)
        names = list(dict.fromkeys(name for group in groups for name in group))
        store: dict[str, Tensor] = {}
        live: dict[str, tuple[Tensor, HookPoint]] = {}
        keep: Any = Keep(store, device, remove_batch_dim, kept)
        hook = KeepLive(keep, live) if incl_bwd else keep
        with self._level(reset_hooks_end, clear_contexts) as level:
            for name in names:
                self.hook_dict[name].add_hook(hook, level=level)
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
        sliced = kept.mode != "identity"
        documents = self.documents(batch, rest.get("position_ids"))
        cache = ActivationCache(store, self, not remove_batch_dim, tokens, batch.mask, state, sliced, documents)
        return out, cache

    def _check_size(self, groups: list[list[str]], batch: Batch, pos_slice: Slice, limit: int | None) -> None:
        """Refuse, before anything runs, a cache of more than `limit` bytes."""
        length = self.positions(batch)
        try:
            kept = pos_slice.apply(torch.empty(1, length), dim=1).numel()
        except (IndexError, TypeError) as error:
            raise InputError(
                f"pos_slice={pos_slice.slice!r:.80} does not fit: there are {length} positions."
            ) from error
        if limit is None:
            return
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


def _pairs(*lists: Any) -> list[Any]:
    """The hooks of some lists, each checked to be a (name, hook) pair."""
    pairs: list[Any] = []
    for hooks in lists:
        if isinstance(hooks, str | Tensor) or not is_many(hooks):
            raise InputError(f"Hooks are a list of pairs [(name, hook), ...]; this is {hooks!r:.80}.")
        pairs += hooks
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(f"Hooks are a list of pairs [(name, hook), ...]; this holds {pair!r}.")
    return pairs


def _check_hook(name: Any, hook: Any) -> None:
    """InputError for a hook that cannot be called as hooks are: `hook(activation, hook=point)`."""
    if not callable(hook):
        raise InputError(f"The hook on {name!r} is {hook!r:.80}; a hook is a function of (activation, hook).")
    if isinstance(hook, Saver | Capture):
        return
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):  # a builtin does not say what it takes
        return
    try:
        signature.bind(None, hook=None)
    except TypeError as error:
        raise InputError(
            f"The hook on {name!r} takes {signature}: {error}. It is called as hook(activation, hook=point)."
        ) from error


def _sliced(pos_slice: Any) -> Slice:
    """TransformerLens's Slice of what a user gave; InputError for what is none."""
    try:
        return Slice.unwrap(pos_slice)
    except (ValueError, TypeError) as error:
        raise InputError(f"pos_slice={pos_slice!r:.80}: give a number, a slice, a list of numbers or None.") from error


def _scalar(out: Any) -> Tensor:
    if not isinstance(out, Tensor) or out.numel() != 1:
        raise InputError('incl_bwd differentiates a scalar output: pass return_type="loss".')
    if not out.requires_grad:
        raise InputError("incl_bwd needs gradients, and they are switched off (torch.no_grad or inference_mode).")
    return out
