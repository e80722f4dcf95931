"""Verification: whether a model's open forward is the model, measured on the model itself.

    print(gl.verify(model))                    # a table of figures and verdicts
    found = gl.verify("path/to/folder", dtype="float64")
    found.passed, found["A x + r"].error       # True, 3e-15

Each claim is an error and the most it may be, or a reason why it was not asked. Errors are relative: the largest difference over
the largest number that was expected. They are of random tokens (or images), unless others are given.

    the vendor's logits           those of the wrapped model's own forward
    the vendor's gradients        ... and d (a random sum of logits) / d parameters
    points fire                   every declared point once, with the axes that it declares; how many did not
    somebody inside               the logits while every point is cached, lazy ones too
    A x + r                       the implicit attention of every mixer yields its output, and its views say the same
    an edit reaches the output    how many points may be edited without the output moving
    ... and what its rows say     how many points do not move, of which the equation names the edited one
    a split at a state            prefix, then suffix from the state, against the whole
    padding                       a batch of unequal rows, padded on either side, against its rows alone
    step by step                  a token at a time from states
    generation                    by how much `generate`'s greedy tokens fall short of the likeliest of one whole forward
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gatedlens.address.equations import arrows
from gatedlens.attention.checking import off
from gatedlens.attention.stack import implicit_attention
from gatedlens.errors import InputError, did_you_mean
from gatedlens.loading import from_pretrained
from gatedlens.markup import card, table
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.model.language import HookedLanguageModel
from gatedlens.options import checked
from gatedlens.runs import inputs

__all__ = ["Claim", "Verification", "verify"]

# For editors and type checkers: whoever passes something else gets the error of `from_pretrained`.
if TYPE_CHECKING:
    Verified: TypeAlias = HookedModel | str | Path
else:
    Verified = Any

ROWS, LENGTH = 2, 12  # of the random input
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
VENDORS = {torch.float64: 1e-4}  # in float64 a vendor's forward still takes some steps in float32
STEEP = 0.3  # the most that a gradient may be off where numbers are of half precision
PLAIN = {  # what transformers does for speed alone, and what stands for its not being done
    "_experts_implementation": "eager",  # kernels of experts, for some precisions and sizes
    "rescale_every": 0,  # RWKV's weights divided in place, to keep half precision from overflowing
}


@dataclass(frozen=True)
class Claim:
    """`Claim("A x + r", 3e-15, 1e-9)`: one line of the table. An error of None was not measured; `why` says why not, or what
    is wrong."""

    name: str
    error: float | None
    limit: float
    why: str = ""

    @property
    def passed(self) -> bool:
        """Whether it holds, or was not asked."""
        return self.error is None or self.error <= self.limit

    @property
    def verdict(self) -> str:
        """ "holds", "fails" or "not asked"."""
        return "not asked" if self.error is None else "holds" if self.passed else "fails"


@dataclass(frozen=True, repr=False)
class Verification:
    """What `verify` found: claims in order; `print` shows a table, `to_dict()` is what --json prints."""

    model: str
    dtype: str
    claims: tuple[Claim, ...]

    @property
    def passed(self) -> bool:
        """Whether every claim that was asked holds."""
        return all(claim.passed for claim in self.claims)

    def __getitem__(self, name: str) -> Claim:
        """`found["A x + r"]`: one claim; InputError for a name that none has."""
        names = [claim.name for claim in self.claims]
        if name not in names:
            raise InputError(
                f"{name!r} is no claim.{did_you_mean(str(name), names)} The claims are {', '.join(names)}."
            )
        return self.claims[names.index(name)]

    def to_dict(self) -> dict[str, Any]:
        """`gl.verify(model).to_dict()`: all of it as JSON holds it."""
        claims = [{**asdict(claim), "verdict": claim.verdict} for claim in self.claims]
        return {"model": self.model, "dtype": self.dtype, "passed": self.passed, "claims": claims}

    def __repr__(self) -> str:
        failed = [claim.name for claim in self.claims if not claim.passed]
        said = f"fails: {', '.join(failed)}" if failed else "every claim holds"
        return f"Verification({self.model}, {self.dtype}, {len(self.claims)} claims: {said})"

    def _repr_html_(self) -> str:
        rows = [
            (claim.name, "" if claim.error is None else claim.error, claim.limit, claim.verdict, claim.why)
            for claim in self.claims
        ]
        facts = {"dtype": self.dtype, "": "every claim holds" if self.passed else "NOT AS CLAIMED"}
        return card(
            f"Verification: {self.model}", facts, table(["claim", "error", "limit", "verdict", "why"], rows, 40)
        )

    def __str__(self) -> str:
        width = max(len(claim.name) for claim in self.claims)
        rows = [f"{self.model}, {self.dtype}: {'every claim holds' if self.passed else 'NOT AS CLAIMED'}"]
        for claim in self.claims:
            figure = " " * 18 if claim.error is None else f"{claim.error:8.1e} <= {claim.limit:.0e}"
            rows.append(f"  {claim.name:{width}}  {figure}  {claim.verdict}{f': {claim.why}' if claim.why else ''}")
        return "\n".join(rows)


@checked
def verify(model: Verified, input: Input | None = None, dtype: torch.dtype | str | None = None) -> Verification:
    """`print(gl.verify(model))`: the claims of this package, measured on your model; see the head of this file.

    model: a model that you have, or a name or path as `gl.from_pretrained` takes it. dtype: of one that is loaded, "float64" for
    the sharpest figures; the numbers of a model that you have stay as they are. input: tokens, text or images of at least 2 rows
    and 4 positions; None: random ones, 2 rows of 12 tokens. It runs the model some 30 times, and once for each point of a block;
    the vendor's own forward runs on a copy, since it may change what it runs on.

    InputError for an input that is too small. The model is left as it was.
    """
    if not isinstance(model, HookedModel):
        model = from_pretrained(model, dtype=dtype)
    elif dtype is not None:
        raise InputError(f"dtype={dtype!r} is for a model that is loaded; this one is used as it is.")
    batch = _random(model) if input is None else inputs.ready(model, input)
    length = model.positions(batch)
    if len(batch.value) < 2 or length < 4 or batch.mask is not None or batch.is_resid:
        raise InputError(
            f"verify takes a batch of 2 rows or more, of 4 positions or more, without padding; this is "
            f"{len(batch.value)} x {length}{', padded' if batch.mask is not None else ''}."
        )
    own = model.W_U.dtype
    trial = Trial(model, batch, LIMITS[own])
    return Verification(model.cfg.model_name, str(own).removeprefix("torch."), tuple(trial.claims()))


def _random(model: HookedModel) -> Batch:
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, HookedLanguageModel):
        return inputs.ready(
            model, torch.randint(model.cfg.d_vocab, (ROWS, LENGTH), generator=generator).to(model.W_U.device)
        )
    return inputs.ready(model, torch.randn(ROWS, *model.image_shape, generator=generator).to(model.W_U))


class Trial:
    """One model and one input, asked for every claim."""

    def __init__(self, model: Any, batch: Batch, limit: float):
        self.model, self.batch, self.limit = model, batch, limit
        with torch.no_grad():
            self.logits: Tensor = model(batch).float() if limit > 1e-2 else model(batch)

    def claims(self) -> Iterator[Claim]:
        """Every claim in order."""
        yield from self._vendors()
        with torch.no_grad():
            yield from self._inside()
            yield from self._edits()
            if isinstance(self.model, HookedLanguageModel):
                yield from self._in_parts()
            else:
                why = "it reads a whole image at once"
                yield from (
                    Claim(name, None, self.limit, why)
                    for name in ("a split at a state", "padding", "step by step", "generation")
                )

    def _claim(self, name: str, got: Tensor, wanted: Tensor, limit: float | None = None) -> Claim:
        return Claim(name, off(got.to(wanted), wanted).relative, self.limit if limit is None else limit)

    # -- against the vendor ----------------------------------------------------------------------------------------

    def _vendors(self) -> Iterator[Claim]:
        names, limit = ("the vendor's logits", "the vendor's gradients"), VENDORS.get(self.logits.dtype, self.limit)
        wrapped = self.model.wrapped
        if type(wrapped).forward is torch.nn.Module.forward:
            why = f"{type(wrapped).__name__} only holds parameters: the vendor's code is not here"
            yield from (Claim(name, None, limit, why) for name in names)
            return
        weights = torch.randn(self.logits.shape, generator=torch.Generator().manual_seed(1)).to(self.logits)
        theirs, logits, slopes = _vendors_own(wrapped), [], []
        for module, forward in ((wrapped, self._open), (theirs, partial(self._called, theirs))):
            with _differentiable(module) as parameters, torch.enable_grad():
                out = forward().to(weights)
                slopes.append(torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True))
                logits.append(out.detach())
        yield self._claim(names[0], logits[0], logits[1], limit)
        errors = [
            off(torch.zeros_like(wanted) if got is None else got, wanted).relative
            for got, wanted in zip(*slopes, strict=True)
            if wanted is not None and bool(wanted.any())
        ]
        yield Claim(names[1], max(errors), min(10 * limit, STEEP), "the worst parameter")

    def _open(self) -> Tensor:
        logits: Tensor = self.model(self.batch)
        return logits

    def _called(self, vendors: torch.nn.Module) -> Tensor:
        options = {"use_cache": False} if isinstance(self.model, HookedLanguageModel) else {}
        out = vendors(self.batch.value, **options)
        found: Tensor = out if isinstance(out, Tensor) else out.logits
        return found

    # -- the interior ------------------------------------------------------------------------------------------------

    def _inside(self) -> Iterator[Claim]:
        model, fired = self.model, dict[str, list[torch.Size]]()

        def note(x: Tensor, hook: Any) -> None:
            fired.setdefault(hook.name, []).append(x.shape)

        logits = model.run_with_hooks(self.batch, fwd_hooks=[(lambda name: True, note)])
        sizes = {**model.cfg.sizes, "batch": len(self.batch.value), "pos": model.positions(self.batch)}
        sizes["key_pos"] = sizes["pos"]
        wrong = [
            name
            for name, point in model.names.points.items()
            if len(shapes := fired.get(name, [])) != 1
            or any(axis in sizes and sizes[axis] != size for axis, size in zip(point.dims, shapes[0], strict=True))
        ]
        yield Claim("points fire", float(len(wrong)), 0.0, ", ".join(wrong[:3]) or f"{len(fired):,} points")
        yield self._claim("somebody inside", logits, self.logits)
        _, cache = model.run_with_cache(self.batch)
        errors = [
            implicit_attention(cache, layer=mixer.layer, place=mixer.place).check().relative
            for block in model.blocks
            for mixer in block.mixers
        ]
        yield Claim("A x + r", max(errors), self.limit, f"{len(errors)} mixers, with every view of their matrices")

    def _edits(self) -> Iterator[Claim]:
        """Of each kind of block the first, and the points outside the blocks: from a state, where there are states."""
        model, options = self.model, {}
        if isinstance(model, HookedLanguageModel):
            options = {"state": model(self.batch, return_state=True)[1]}
        kinds = {model.rows_for(layer): layer for layer in reversed(range(model.cfg.n_layers))}
        some = tuple(f"blocks.{layer}." for layer in kinds.values())
        every = [name for name in model.names.points if not name.startswith("blocks.") or name.startswith(some)]
        names = [name for name in every if not model.names.points[name].chooses]
        feeds: dict[str, list[str]] = {}
        for rows, layer in kinds.items():
            for source, target in arrows(rows):
                feeds.setdefault(f"blocks.{layer}.{source}", []).append(f"blocks.{layer}.{target}")
        plain, before = model.run_with_cache(self.batch, names_filter=[*every, "hook_logits"], **options)
        idle, still = [], []
        for name in names:
            generator = torch.Generator().manual_seed(0)

            def edit(x: Tensor, hook: Any, generator: torch.Generator = generator) -> Tensor:
                noise = torch.rand(x.shape, generator=generator).to(x)
                return x * (1 + 0.2 * noise) + 0.1 * noise

            with model.hooks([(name, edit)]):
                edited, after = model.run_with_cache(
                    self.batch, names_filter=[*feeds.get(name, ()), "hook_logits"], **options
                )
            if torch.equal(edited, plain):
                idle.append(name)
            still += [f"{name} -> {fed}" for fed in feeds.get(name, ()) if torch.equal(after[fed], before[fed])]
        told = f"{len(names):,} points"
        yield Claim("an edit reaches the output", float(len(idle)), 0.0, ", ".join(idle[:3]) or told)
        told = f"{sum(map(len, feeds.values())):,} equations"
        yield Claim("... and what its rows say", float(len(still)), 0.0, ", ".join(still[:3]) or told)

    # -- in parts ----------------------------------------------------------------------------------------------------

    def _in_parts(self) -> Iterator[Claim]:
        model, tokens = self.model, self.batch.value
        length, cut = tokens.shape[1], tokens.shape[1] // 2
        first, state = model(tokens[:, :cut], return_state=True)
        yield self._claim(
            "a split at a state", torch.cat([first, model(tokens[:, cut:], state=state)], dim=1), self.logits
        )
        errors = []
        for side in ("left", "right"):
            mask = torch.ones_like(tokens, dtype=torch.bool)
            mask[0, slice(cut) if side == "left" else slice(length - cut, None)] = False
            batch = model(tokens, attention_mask=mask)
            for row in range(len(tokens)):
                alone = model(tokens[row : row + 1][:, mask[row]])[0]
                errors.append(off(batch[row][mask[row]].to(self.logits), alone.to(self.logits)).relative)
        yield Claim("padding", max(errors), self.limit, "each row against itself alone, both sides")
        steps, state = [], None
        for place in range(length):
            out, state = model(tokens[:, place : place + 1], state=state, return_state=True)
            steps.append(out)
        yield self._claim("step by step", torch.cat(steps, dim=1), self.logits)
        yield self._generation(cut)

    def _generation(self, new: int) -> Claim:
        model, tokens = self.model, self.batch.value
        options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
        made = model.generate(tokens, max_new_tokens=new, **options)
        logits = model(made)[:, -new - 1 : -1].float()
        chosen = logits.gather(-1, made[:, -new:].unsqueeze(-1)).squeeze(-1)
        short = (logits.amax(-1) - chosen).max() / logits.abs().max()
        return Claim("generation", float(short), self.limit, f"{new} tokens a row, greedily")


def _vendors_own(wrapped: torch.nn.Module) -> torch.nn.Module:
    """A copy for the vendor's own forward, which may change what it runs on."""
    copied = copy.deepcopy(wrapped)
    config = getattr(copied, "config", None)
    for name, value in PLAIN.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    return copied


@contextmanager
def _differentiable(module: torch.nn.Module) -> Iterator[list[torch.nn.Parameter]]:
    """Its parameters, for which gradients are asked; they are as before afterwards."""
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    asked = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        yield parameters
    finally:
        for p, before in zip(parameters, asked, strict=True):
            p.requires_grad_(before)
