"""Run: what one forward call carries; DocumentRun: one whose rows may hold several documents, each beginning at position 0.

b batch, l pos. A document is a run of tokens whose first has position 0: nothing passes from one into the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.model.padding import Padding
from gatedlens.model.state import RecurrentState


@dataclass
class Run:
    """One forward call: `padding`, `positions` (each token's place in its document, counted through the state), the
    `before` state (None: from nothing) and, if wanted, the tensors that are `left` for the next call."""

    positions: Int[Tensor, "batch pos"]
    padding: Padding = field(default_factory=Padding)
    before: RecurrentState | None = None
    left: dict[str, Tensor] | None = None  # None: nobody wants the state
    handed: dict[str, Tensor] = field(default_factory=dict)  # what blocks give later ones beside the stream
    without_gradient: set[str] = field(default_factory=set)  # of these, what was handed on under no_grad
    tokens: Int[Tensor, "batch pos"] | None = None  # what the call is of; None: a stream whose tokens nobody told

    def hand_on(self, name: str, value: Float[Tensor, "batch pos ..."]) -> None:
        """Hand the activation of a point to later blocks of this call, beside the residual stream."""
        self.handed[name] = value
        (self.without_gradient.discard if torch.is_grad_enabled() else self.without_gradient.add)(name)

    def handed_on(self, name: str, layer: int, like: Tensor) -> Float[Tensor, "batch pos ..."]:
        """What block `layer` reads of an earlier one; InputError where the call began, or went, past it."""
        if name not in self.handed:
            raise InputError(
                f"Block {layer} reads {name} beside the residual stream, and that block did not run in this call. With "
                f"start_at_layer give earlier=cache, the cache of a run of these tokens (or {{{name!r}: its activation}})."
            )
        if name in self.without_gradient and torch.is_grad_enabled():
            raise InputError(
                f"Block {layer} reads {name} beside the residual stream, which was handed on without gradients, as in a reentrant"
                " checkpoint of its block: gradients would lack what goes that way. Checkpoint with use_reentrant=False."
            )
        given = self.handed[name]
        if given.shape[:2] != like.shape[:2]:
            raise InputError(
                f"earlier[{name!r}] has shape {list(given.shape)}; this call has [batch, pos] = {list(like.shape[:2])}."
            )
        return given.to(device=like.device, dtype=like.dtype)

    def start(self, name: str, layer: int, shape: tuple[int, ...], like: Tensor, nothing: float = 0.0) -> Tensor:
        """The tensor `name` of the state that this call continues; full of `nothing` if it starts from none.

        A size of -1 stands for whatever the state has there, and for 0 when there is no state.
        """
        if self.before is None:
            return like.new_full([max(size, 0) for size in shape], nothing)
        key = RecurrentState.key(name, layer)
        if key not in self.before.tensors:
            raise InputError(
                f"The state that this call goes on from holds no {key}: block {layer}, or that part of it, did not run in "
                "the call that left the state (it was skipped, or the run stopped before it), or the state is another "
                "model's. While generating, skip a block in every step or in none. The state holds "
                f"{', '.join(self.before.tensors)}."
            )
        given = self.before[key]
        if given.ndim != len(shape) or any(size not in (-1, has) for size, has in zip(shape, given.shape, strict=True)):
            raise InputError(
                f"The state's {key} has shape {list(given.shape)}; this call needs {list(shape)}"
                " (batch first). `state.rows([...])` repeats or picks rows."
            )
        return given.to(device=like.device, dtype=like.dtype)

    def in_document(self, width: int) -> Bool[Tensor, "batch pos one tap"] | None:
        """Which taps of each conv window are of the same document as the window's position; None: a row is one document."""
        return None

    def resets(self, like: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos one"] | None:
        """1 where a document begins, else 0; None: no position_ids told of documents."""
        return None

    def of_last_document(
        self, long: Shaped[Tensor, "batch long channel"], width: int
    ) -> Shaped[Tensor, "batch long channel"]:
        """A row behind its tail, 0 where it is not of the row's last document: what the next call may see of it."""
        return long

    def leave(self, name: str, layer: int, value: Tensor) -> None:
        """Hand `value` to the next call. InputError if another part of the block has left something by this name."""
        if self.left is None:
            return
        key = RecurrentState.key(name, layer)
        if key in self.left:
            raise InputError(
                f"Two parts of block {layer} leave a state {name!r} ({key}): each needs a name of its own."
            )
        self.left[key] = value.clone(memory_format=torch.contiguous_format)  # so that entries of it are views


@dataclass
class DocumentRun(Run):
    """A Run whose rows may hold several documents.

    `documents` is known once `apart` was called, as for position_ids. Before that each row is one document, and what lies
    before its beginning is empty anyway. `axes`: of a model of images and text, positions by time, height and width, which turn
    its queries and keys; None: `positions` do.
    """

    axes: Int[Tensor, "axis batch pos"] | None = None

    def apart(self) -> DocumentRun:
        """`run = DocumentRun(positions).apart()`: the same, with the documents that its positions tell of."""
        return replace(self, padding=replace(self.padding, documents=self.begins.long().cumsum(1)))

    @property
    def documents(self) -> Int[Tensor, "batch pos"] | None:
        """How many documents have begun in this call, up to each position (0: the state's goes on)."""
        return self.padding.documents

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """Where a token is no padding."""
        return torch.ones_like(self.positions, dtype=torch.bool) if self.padding.mask is None else self.padding.mask

    @property
    def ranks(self) -> Int[Tensor, "batch pos"]:
        """Each real token's place among the real tokens of its row; padding ranks behind them."""
        if self.padding.rank is not None:
            return self.padding.rank
        return torch.arange(self.positions.shape[1], device=self.positions.device).expand_as(self.positions)

    @property
    def begins(self) -> Bool[Tensor, "batch pos"]:
        """Where a document begins: the recurrence forgets what was before."""
        return self.real & (self.positions == 0)

    def resets(self, like: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos one"] | None:
        """As `Run.resets`."""
        return None if self.documents is None else self.begins.unsqueeze(-1).to(like.dtype)

    @property
    def next_position(self) -> Int[Tensor, " batch"]:
        """The position of the token that would come next."""
        if self.padding.mask is None:
            return self.positions[:, -1] + 1
        is_last = self.ranks == self.padding.mask.sum(1, keepdim=True) - 1
        return (self.positions * is_last).sum(1) + 1

    def behind(self, width: int) -> Int[Tensor, "batch long"]:
        """The document of each place of `Padding.behind`: the tail's is the state's."""
        assert self.documents is not None
        order = self.padding.order
        return F.pad(self.documents if order is None else self.documents.gather(1, order), (width - 1, 0))

    def in_document(self, width: int) -> Bool[Tensor, "batch pos one tap"] | None:
        """As `Run.in_document`."""
        if self.documents is None:
            return None
        seen = self.behind(width).unfold(1, width, 1)
        return (seen == seen[..., -1:]).unsqueeze(2)

    def of_last_document(
        self, long: Shaped[Tensor, "batch long channel"], width: int
    ) -> Shaped[Tensor, "batch long channel"]:
        """As `Run.of_last_document`."""
        return long if self.documents is None else long * (self.behind(width) == self.last).unsqueeze(2)

    @property
    def last(self) -> Int[Tensor, "batch one"]:
        """The last document of each row."""
        assert self.documents is not None
        return self.documents.amax(1, keepdim=True)
