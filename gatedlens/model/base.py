"""HookedModel: a wrapped model whose forward is open. It knows no architecture and no modality.

    model = gl.wrap(mamba)                                   # shares mamba's parameters
    logits, cache = model.run_with_cache(tokens, names_filter="blocks.*.mixer.hook_decay")
    model.run_with_hooks(tokens, fwd_hooks=[("blocks.3.mixer.hook_gate", lambda gate, hook: gate * 0)])
    model.hook_table()

An architecture subclasses it (see `hooks/`) and gives rows, blocks, and how an input enters and leaves the stream.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, overload

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from gatedlens.address.layers import layer_of
from gatedlens.address.names import Names
from gatedlens.address.point import Alias, Point, View
from gatedlens.address.table import HookTable
from gatedlens.errors import CheckpointError, InputError
from gatedlens.model import placement, summary
from gatedlens.model.batch import Batch, Input, Output
from gatedlens.model.block import Block
from gatedlens.model.config import HookedConfig
from gatedlens.model.fields import ConfigValue, Field
from gatedlens.model.hooking import Hooking
from gatedlens.model.hookpoint import HookPoint, rows_of, same
from gatedlens.model.image import Grid
from gatedlens.model.layout import Layout
from gatedlens.model.mixer import TokenMixing
from gatedlens.model.norm import Norm, norm_rows
from gatedlens.model.padding import Padding
from gatedlens.model.run import DocumentRun, Run
from gatedlens.model.state import CARRIED, Carried, RecurrentState
from gatedlens.model.tiny import Tiny
from gatedlens.model.tokenizer import TokenizerLike
from gatedlens.model.turns import Turns
from gatedlens.model.watch import AGAIN, Watch, check_plain
from gatedlens.options import checked, is_whole, tensor_of
from gatedlens.weights import AsRead

if TYPE_CHECKING:
    from gatedlens.compat.nnsight import TracedModel  # a door: at run time `nnsight()` alone imports it

    class Wrapped(nn.Module):
        """A vendor's module: its parts are attributes by the vendor's names."""

        def __getattr__(self, name: str) -> Any: ...
else:
    Wrapped = TracedModel = Any

R = TypeVar("R")
M = TypeVar("M", bound="HookedModel")


class HookedModel(Hooking):
    """`wrapped` holds the parameters; `cfg` the sizes; `names` all names; `blocks`, `ln_final` the open forward."""

    title: ClassVar[str]
    paper: ClassVar[str] = ""
    reference: ClassVar[tuple[str, dict[str, int]]] = ("", {})  # a known model and its axis sizes, for the catalogue
    recurrence: ClassVar[dict[str, str]] = {}  # how the architecture fills the one recurrence, for the catalogue
    attention_words: ClassVar[dict[str, str]] = {}  # each factor of the implicit attention, from its points; ditto
    wraps: ClassVar[tuple[str, ...]] = ()  # class names that `gl.wrap` hands to this architecture
    hub_types: ClassVar[tuple[str, ...]] = ()  # model_type in a config.json of transformers
    hub_fields: ClassVar[Mapping[str, Field]] = {}  # what the keys of such a config.json may hold
    hub_renames: ClassVar[Mapping[str, str]] = {}  # in the names of such a checkpoint's tensors: theirs -> the module's
    small: ClassVar[Tiny | None] = None  # the model that `tiny` makes
    layout: ClassVar[Layout] = Layout()  # of an original checkpoint, which transformers does not read
    block_points: ClassVar[tuple[Point, ...]] = ()
    first_points: ClassVar[tuple[Point, ...]] = ()
    final_points: ClassVar[tuple[Point, ...]] = norm_rows("ln_final", "blocks.-1.hook_resid_post", "the final norm")
    last_points: ClassVar[tuple[Point, ...]] = ()
    aliases: ClassVar[tuple[Alias, ...]] = ()
    views: ClassVar[tuple[View, ...]] = ()
    has_positions: ClassVar[bool] = False  # whether position_ids mean anything to it: they tell packed documents apart
    carried: ClassVar[Mapping[str, Carried]] = CARRIED  # what a RecurrentState holds of a layer, by name
    hands_on: ClassVar[tuple[str, ...]] = ()  # the points that later blocks read beside the residual stream
    cfg: HookedConfig
    blocks: Sequence[Block]  # an nn.ModuleList of them
    wrapped: Any
    tokenizer: Any  # with the words of transformers' tokenizers; None without one
    training: bool

    if TYPE_CHECKING:  # hook points are attributes, named by rows

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, wrapped: nn.Module, *, model_name: str = "", tokenizer: TokenizerLike = None):
        super().__init__()
        self.as_read = AsRead(wrapped)  # dequantised, merged with adapters: the wrapped model itself, if it has neither
        check_plain(self.as_read.model)
        self.wrapped = self.as_read.whole
        self.turns = Turns()
        self.cfg = self._described(model_name or type(wrapped).__name__)
        self._told = copy.copy(self.cfg)  # what the wrapped model said when it was last asked
        if placement.is_placed(wrapped):
            self.cfg.device = str(placement.device_of(wrapped))
        self.tokenizer = tokenizer
        for row in self.first_points:
            self.add_module(row.name, HookPoint(row))
        blocks = nn.ModuleList(self.make_block(layer) for layer in range(self.cfg.n_layers))
        self.blocks = blocks  # type: ignore[assignment]
        self.ln_final = self.make_final_norm(rows_of("ln_final", self.final_points))
        for row in self.last_points:
            self.add_module(row.name, HookPoint(row))
        self._take_mode(wrapped.training)
        self.setup()
        # None: whoever took the wrapped model's modules apart answers for them
        self.watch: Watch | None = Watch(self.as_read.model)

    def _take_mode(self, mode: bool) -> None:
        """Take over the wrapped model's mode without touching any of its modules'."""
        theirs = set(self.wrapped.modules())
        for module in self.modules():
            if module not in theirs:
                module.training = mode

    def __repr__(self) -> str:
        return summary.line(self)

    def _repr_html_(self) -> str:
        return summary.page(self)

    def tree(self) -> str:
        """`print(model.tree())`: torch's own repr, every module within every other."""
        return super().__repr__()

    # -- what an architecture gives ------------------------------------------------------------------------------

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """`HookedMamba2.fits(model)`: whether a module is this architecture's; others may wrap a class of its name."""
        return True

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> HookedConfig:
        """`HookedMamba.describe(wrapped, model_name)`: the cfg of `wrapped`; CheckpointError for a model that this
        architecture cannot run.
        """
        raise NotImplementedError

    def make_block(self, layer: int) -> nn.Module:
        """`model.make_block(layer)`: our open block over the wrapped model's block of that number."""
        raise NotImplementedError

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        """`model.make_final_norm(rows)`: our open norm over the wrapped model's final one, with these points."""
        raise NotImplementedError

    def reads_from(self, batch: Batch) -> Float[Tensor, "batch pos"]:
        """`model.reads_from(batch)`: [batch, pos], which positions a prediction is read from, as shares that sum to 1 in
        each row.
        """
        raise NotImplementedError

    def ends(self) -> dict[str, tuple[Any, type[nn.Module]]]:
        """`model.ends()`: the modules before and behind the blocks by what they are called, each with the class that it
        has to be of.
        """
        return {}

    @property
    def grid(self) -> Grid | None:
        """Where in the image each position is; None for a model whose positions are tokens."""
        return None

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        """`model.rows_for(layer)`: the rows of one block, relative to it, in firing order."""
        return self.block_points

    def unembed(self, normed: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """`model.unembed(normed)`: the logits that one position's normalised residual stream stands for."""
        raise NotImplementedError

    def pooling(self) -> Float[Tensor, " pos"] | None:
        """`model.pooling()`: [pos], with which weights positions enter the one output of a row; None where each position
        has an output of its own.
        """
        return None

    @classmethod
    def tiny(cls: type[M], seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: ConfigValue) -> M:
        """`HookedMamba.tiny(seed=0, n_layer=3)`: a small random model for tests and tours.

        sizes: words of its config, as in `HookedMamba.small.config`; they stand for those there. InputError for an architecture
        that says no such config.
        """
        if cls.small is None:
            raise InputError(f"{cls.__name__} has no tiny model: it says none, small = Tiny(name, make, config).")
        return cls(cls.small.module(seed, sizes).to(dtype), model_name=cls.small.name)

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        """`HookedGriffin.kinds()`: the rows of each kind of block that the architecture mixes, by name; one kind, "block",
        for most.
        """
        return {"block": cls.block_points}

    @classmethod
    def snippet(cls) -> str:
        """`HookedModel.snippet()`: three lines of code that read one point of `model`, for the catalogue."""
        raise NotImplementedError

    # -- the wrapped model, as it is now -------------------------------------------------------------------------

    def _described(self, model_name: str) -> Any:
        """The cfg of the wrapped model; CheckpointError if it lacks what this architecture reads."""
        try:
            told = self.describe(self.wrapped, model_name)
        except (AttributeError, IndexError, KeyError) as error:
            with suppress(AttributeError, IndexError, KeyError):  # a head of another kind says more than what it lacks
                self._check_ends(model_name)
            raise CheckpointError(f"{model_name} is not built as {self.title} is: {error}.") from error
        self._check_ends(model_name)
        return told

    def _check_ends(self, model_name: str) -> None:
        for what, (module, kind) in self.ends().items():
            if type(module).forward is not kind.forward:
                raise CheckpointError(
                    f"The {what} of {model_name} is a {type(module).__name__}; gatedlens reads the weight of a "
                    f"{kind.__name__} there, so what this one computes would be lost. Give the model a {kind.__name__}, "
                    "or read the residual stream (stop_at_layer, hook_resid_post) and call your own module on it."
                )

    def follow(self) -> None:
        """`model.follow()`: see what has changed in the wrapped model since the last call: modules, numbers, sizes.

        Every forward begins with it. CheckpointError for changes that the blocks and points of this model cannot follow.
        """
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()
        placement.check_frozen(self.wrapped)
        if self.watch is None:
            return
        if not self.watch.unchanged():
            self._make_anew()
        for module, hook in self.watch.recomputing:  # pruning, weight_norm: `module.weight` is made of other parameters
            hook(module, ())

    def _make_anew(self) -> None:
        """Make the blocks of the wrapped model as it is now, and let ours, with their hooks, read what they read."""
        assert self.watch is not None
        known, model = self.as_read, self.as_read.model
        check_plain(model)
        self._read(AsRead(model))
        try:
            self._follow(self.watch, model)
        except BaseException:
            self._read(known)
            raise

    def _read(self, as_read: AsRead) -> None:
        """Read the wrapped model's weights so."""
        self.as_read = as_read
        self.wrapped = as_read.whole

    def _follow(self, watch: Watch, model: nn.Module) -> None:
        told = self._described(self._told.model_name)
        if told.n_layers != self.cfg.n_layers:
            raise CheckpointError(
                f"The wrapped model has {told.n_layers} layers now and had {self.cfg.n_layers} when it was wrapped, so its "
                f"hook points are others. {AGAIN}"
            )
        before = dict(vars(self.cfg))
        vars(self.cfg).update({k: v for k, v in vars(told).items() if v != vars(self._told)[k]})
        try:
            fresh = [self.make_block(layer) for layer in range(self.cfg.n_layers)]
            fresh.append(self.make_final_norm(rows_of("ln_final", self.final_points)))
            norms = {id(m.weights): m.torch_norms for part in fresh for m in part.modules() if isinstance(m, Norm)}
            watch.check(model, norms)
            pairs = [
                pair for old, new in zip((*self.blocks, self.ln_final), fresh, strict=True) for pair in same(old, new)
            ]
        except BaseException as error:
            vars(self.cfg).update(before)
            if isinstance(error, AttributeError | IndexError | KeyError):
                raise CheckpointError(f"The wrapped model is no longer built as {self.title} is: {error}.") from error
            raise
        for old, new in pairs:
            old.read_as(new)
        self._told, self.watch = told, Watch(model)

    @property
    def mixers(self) -> dict[int, TokenMixing]:
        """`model.mixers[3]`: by layer, what mixes its tokens (the first, where several do). A layer of a channel mixer alone, as
        Nemotron-H has, is not among them.
        """
        return {layer: block.mixer for layer, block in enumerate(self.blocks) if block.mixing}

    # -- names ---------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """`model.setup()`: name our modules as TransformerLens does; the wrapped model's are listed and left as they are."""
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
        titles = [other.title for other in _architectures() if leaf in {row.leaf for row in other.block_points}]
        return list(dict.fromkeys(titles))

    @classmethod
    def from_pretrained(cls: type[M], name_or_path: str | Path, **options: Any) -> M:
        """`gl.HookedMamba.from_pretrained("gatedlens/mamba-recall")`: `gl.from_pretrained`, with all its options, by the class.

        InputError for a checkpoint of another architecture; `gl.from_pretrained` takes any.
        """
        from gatedlens.loading import from_pretrained

        model = from_pretrained(name_or_path, **options)
        if not isinstance(model, cls):
            raise InputError(
                f"{cls.__name__}.from_pretrained({name_or_path!r}): this is a {model.title} model. Call "
                f"gl.{type(model).__name__}.from_pretrained, or gl.from_pretrained, which takes any."
            )
        return model

    @checked
    def hook_table(self, layer: int | None = 0) -> HookTable:
        """`model.hook_table(layer=3)`: every hook point as a table: name, axes, shape in this model, equation, source,
        lazy, bytes per token.

        `layer`: the block to show, None for all of them (blocks differ only where the architecture mixes kinds).
        """
        chosen = range(self.cfg.n_layers) if layer is None else [layer_of(self, layer)]
        blocks = tuple(f"blocks.{i}." for i in chosen)
        rows = {n: p for n, p in self.names.points.items() if not n.startswith("blocks.") or n.startswith(blocks)}
        itemsize = torch.empty((), dtype=self.cfg.dtype).element_size()
        return HookTable(f"{self.cfg.model_name}: hook points ({self.title})", rows, self.cfg.sizes, itemsize)

    def nnsight(self) -> TracedModel:
        """`traced = model.nnsight()`: this model in nnsight's hands, a TracedModel; see `nnsight.py`."""
        from gatedlens.compat.nnsight import TracedModel

        return TracedModel(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to()`, `.half()`, `.cuda()`: keep cfg.dtype and cfg.device true."""
        out = super()._apply(fn, recurse)
        fresh = self.describe(self.wrapped, self.cfg.model_name)
        self.cfg.dtype, self.cfg.device = fresh.dtype, fresh.device
        return out

    # -- forward -------------------------------------------------------------------------------------------------

    if TYPE_CHECKING:  # what `return_type` and `return_state` make of the output; an architecture's `forward` says more

        @overload
        def __call__(
            self,
            input: Input | None = None,
            return_type: Literal["logits", "loss"] = "logits",
            *,
            return_state: Literal[False] = False,
            **options: Any,
        ) -> Tensor: ...
        @overload
        def __call__(
            self,
            input: Input | None = None,
            return_type: Literal["logits", "loss"] = "logits",
            *,
            return_state: Literal[True],
            **options: Any,
        ) -> tuple[Tensor, RecurrentState]: ...
        @overload
        def __call__(
            self,
            input: Input | None = None,
            *,
            return_type: Literal["both"],
            return_state: Literal[False] = False,
            **options: Any,
        ) -> Output: ...
        @overload
        def __call__(
            self,
            input: Input | None = None,
            *,
            return_type: None,
            stop_at_layer: None = None,
            return_state: Literal[False] = False,
            **options: Any,
        ) -> None: ...
        @overload
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, side by side with other threads' calls, and never while another thread has hooks on."""
        with self.turns.call():
            return super().__call__(*args, **kwargs)

    @property
    def running(self) -> Run | None:
        """The luggage of this thread's forward call that is in progress: what hooks know of padding and state."""
        return self.turns.running.get(threading.get_ident())

    @contextmanager
    def _carrying(self, run: Run) -> Iterator[None]:
        me, running = threading.get_ident(), self.turns.running
        outer = running.get(me)
        running[me] = run
        try:
            yield
        finally:
            if outer is None:
                del running[me]
            else:
                running[me] = outer

    def through_blocks(
        self, resid: Float[Tensor, "batch pos d_model"], run: Run, start: int | None, stop: int | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """`model.through_blocks(resid, run, 0, 3)`: the residual stream after blocks `start` to `stop` (exclusive;
        negative ones count from the end).
        """
        n = self.cfg.n_layers
        for option, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not (is_whole(layer) and -n <= layer <= n):
                raise InputError(f"{option}={layer!r}: {self.cfg.model_name} has {n} layers; give -{n} to {n}.")
        with self._carrying(run):
            for layer in range(n)[start:stop]:
                block = self.blocks[layer]
                resid = self.there(block.weights, block, resid, run)
        return resid

    def current(self) -> Run:
        """`model.current()`: the Run of the forward call that is in progress: what a hook knows of its padding and its state.

        InputError outside a call.
        """
        run = self.running
        if run is None:
            raise InputError("This hook needs the call that it runs in: call the model, not a block by itself.")
        return run

    def there(self, module: nn.Module | list[nn.Module], function: Callable[..., R], *inputs: object) -> R:
        """`model.there(block.weights, block, resid, run)`: `block(resid, run)`, where accelerate put the weights of the
        module (of a list: their own).
        """
        with self.as_read.held():
            return placement.call(module, function, *inputs) if placement.is_placed(self.wrapped) else function(*inputs)

    def begin(
        self,
        batch: Batch,
        state: RecurrentState | None,
        return_state: bool,
        position_ids: Shaped[Tensor, "*document position"] | None = None,
    ) -> Run:
        """`run = model.begin(batch, state, return_state)`: what a forward call carries: padding, positions, the state to
        go on from, and a place for the state to leave.

        InputError for a state of another batch or model, and for positions where there are none.
        """
        self.follow()
        rows, length = batch.value.shape[0], self.positions(batch)
        if state is not None:
            self.check_state(state, rows)
        padding = Padding.of(batch.mask)
        if position_ids is None:
            place = torch.arange(length, device=batch.value.device).expand(rows, length)
            place = place if padding.rank is None else padding.rank
            positions = place if state is None else place + state.seen.to(place.device).unsqueeze(1)
        else:
            positions = self._check_positions(position_ids, rows, length).to(batch.value.device)
        left: dict[str, Tensor] | None = {} if return_state else None
        if not self.has_positions:
            return Run(positions, padding, state, left)
        run = DocumentRun(positions, padding, state, left)
        return run if position_ids is None else run.apart()

    def check_state(self, state: RecurrentState, rows: int | None = None) -> None:
        """`model.check_state(state)`: InputError for a state of another model, or of another number of rows (None: any)."""
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
        carried = self.carried
        for key, tensor in state.tensors.items():
            own = carried.get(key.rpartition(".")[2])
            axes = [] if own is None else own.axes.split()[: tensor.ndim]
            sizes = [self.cfg.sizes.get(axis, size) for axis, size in zip(axes, tensor.shape, strict=False)]
            if sizes != list(tensor.shape):
                has = "carries no such thing" if own is None else f"has [{', '.join(axes)}] of {sizes} there"
                raise InputError(
                    f"The state is that of another model ({state.model_name or 'unnamed'}): its {key} is "
                    f"{list(tensor.shape)}, and {self.cfg.model_name} {has}."
                )
        if rows is not None and state.batch_size != rows:
            raise InputError(
                f"The state holds {state.batch_size} rows and the input {rows}: `state.rows([...])` repeats or picks rows."
            )

    def documents(
        self, batch: Batch, position_ids: Shaped[Tensor, "*document position"] | None
    ) -> Int[Tensor, "batch pos"] | None:
        """`model.documents(batch, position_ids)`: how many documents have begun up to each position, as a call counts them; None
        without positions."""
        if position_ids is None:
            return None
        positions = self._check_positions(position_ids, batch.value.shape[0], self.positions(batch))
        return DocumentRun(positions.to(batch.value.device), Padding.of(batch.mask)).apart().documents

    def _check_positions(
        self, position_ids: Shaped[Tensor, "*document position"], rows: int, length: int
    ) -> Shaped[Tensor, "batch pos"]:
        if not self.has_positions:
            raise InputError(f"position_ids were given, and {self.title} knows no positions: it would ignore them.")
        positions = tensor_of(position_ids, "position_ids")
        if tuple(positions.shape) not in ((rows, length), (1, length), (length,)):
            raise InputError(f"position_ids have shape {list(positions.shape)}; the input is [{rows}, {length}].")
        if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
            raise InputError(f"position_ids are {positions.dtype}; they are whole numbers, 0 where a document begins.")
        return positions.expand(rows, length)


def _architectures(base: type[HookedModel] = HookedModel) -> list[type[HookedModel]]:
    """Every architecture that has been defined: the subclasses that write rows. One that inherits them has no point more."""
    found = [base] if "block_points" in vars(base) and base.block_points else []
    for sub in base.__subclasses__():
        found += _architectures(sub)
    return found
