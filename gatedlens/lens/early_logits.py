"""LogitLens: logits_l = unembed(ln_final(resid_post_l)), with the final norm computed anew from each residual stream.

    lens = gl.lens.logit_lens(model, "The cat sat on the mat"); lens.plot()

Every other lens gives one too, of the streams that it has carried on to the last layer: `carried` tells by what. A soft cap
counts where the model has one, so the last layer's logits are the model's. A Vision Mamba reads classes off the class token only;
here they are read off every patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.foreign import Axes, Figure
from gatedlens.markup import card, picture
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.model.cache import ActivationCache
from gatedlens.options import checked, is_whole
from gatedlens.recurrence.autocast import exact
from gatedlens.result.result import Result
from gatedlens.runs import inputs

EMBED = "embed"


@checked
@torch.no_grad()
def logit_lens(model: HookedModel | ActivationCache, input: Input | ActivationCache | None = None) -> LogitLens:
    """`gl.lens.logit_lens(model, input)`: text, ids, a pair (ids, mask), images, or a cache with the residual streams; a cache
    alone, `gl.lens.logit_lens(cache)`, is read with its own model."""
    if isinstance(model, ActivationCache):
        if input is not None:
            raise InputError(
                "logit_lens(cache, input): a cache has its input; give the cache alone, or a model and an input."
            )
        return logit_lens(model.model, model)
    if input is None:
        raise InputError("logit_lens(model): give an input too, or a cache alone.")
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers))]
    cache, batch = inputs.cached(model, input, names)
    return LogitLens(model, batch, tuple(cache[name] for name in names))


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens:
    """The residual streams of one run, `resid` from the embedding on, layer by layer, read as logits.

    depths: what they are called where they are not all of them. carried: the lens that carried them on to the last layer.
    """

    model: Any
    batch: Batch
    resid: tuple[Float[Tensor, "batch pos d_model"], ...]
    depths: tuple[int | str, ...] | None = None
    carried: str = ""

    def __repr__(self) -> str:
        rows, length = self.resid[0].shape[:2]
        by = f" by a {self.carried}" if self.carried else ""
        return f"LogitLens({self.model.cfg.model_name}{by}, {rows} rows, {len(self.resid)} depths x {length} positions)"

    @property
    def layers(self) -> list[Any]:
        """What the depths are called: "embed", then each layer's number."""
        return [EMBED, *range(self.model.cfg.n_layers)] if self.depths is None else list(self.depths)

    @checked
    @torch.no_grad()
    def logits(self, layer: int | str = -1) -> Float[Tensor, "batch pos d_vocab"]:
        """`lens.logits(3)`: [batch, pos, d_vocab], the logits after a layer (negative: from the last), or, with "embed",
        before the first.
        """
        resid = self.resid[self._depth(layer)]
        with exact(resid):
            found: Tensor = self.model.unembed(self.model.ln_final(resid))
        return found

    def _depth(self, layer: int | str) -> int:
        n, known = self.model.cfg.n_layers, self.layers
        found = int(layer) % n if is_whole(layer) and -n <= int(layer) < n else layer
        if found not in known or isinstance(found, bool):
            if self.depths is None:
                raise InputError(f"layer={layer!r}: {self.model.cfg.model_name} has layers 0 to {n - 1}, and 'embed'.")
            raise InputError(f"layer={layer!r}: this {self.carried} reads {', '.join(map(str, known))}.")
        return known.index(found)

    # -- one row, layer by real position ------------------------------------------------------------------------------

    @checked
    def top(self, row: int = 0) -> Result:
        """`lens.top()`: a Result [layer, pos], the probability of the likeliest token."""
        return self._result(row, "probability of the likeliest token", lambda p: p.amax(-1))

    @checked
    def probability(self, token: int | str, row: int = 0) -> Result:
        """`lens.probability(" whale")`: a Result [layer, pos], softmax(logits)[token]."""
        chosen = self._token(token)
        return self._result(row, f"probability of {inputs.word(self.model, chosen)!r}", lambda p: p[:, chosen])

    @checked
    def rank(self, token: int | str, row: int = 0) -> Result:
        """`lens.rank(" whale")`: a Result [layer, pos], how many tokens are likelier (0: it is the likeliest)."""
        chosen = self._token(token)
        title = f"rank of {inputs.word(self.model, chosen)!r}"
        found = self._result(row, title, lambda p: (p > p[:, chosen, None]).sum(-1).to(p.dtype))
        return replace(found, value="rank (0: the likeliest)", facts={**found.facts, "scale": "log"})

    @checked
    @torch.no_grad()
    def divergence(self, row: int = 0) -> Result:
        """`lens.divergence()`: a Result [layer, pos], KL(the model's prediction || the depth's) in nats."""
        real = self._real(row)
        own = self._predicted()[row].double().log_softmax(-1)
        each = [(own.exp() * (own - self.logits(layer)[row].double().log_softmax(-1))).sum(-1) for layer in self.layers]
        labels = {"layer": self.layers, "pos": inputs.labels(self.model, self.batch, row)}
        title = f"{self.called}: divergence from the model's prediction"
        return Result(torch.stack(each).cpu()[:, real], ("layer", "pos"), labels, title, "KL (nats)", self._facts(row))

    def _predicted(self) -> Float[Tensor, "batch pos d_vocab"]:
        """What the last layer says; every lens leaves that as it is."""
        return self.logits(-1)

    @checked
    def words(self, row: int = 0) -> list[list[str]]:
        """`lens.words()`: the likeliest token of each cell, layer by layer."""
        real = self._real(row)
        best = [self.logits(layer)[row].argmax(-1).cpu()[real].tolist() for layer in self.layers]
        return [[inputs.word(self.model, token) for token in tokens] for tokens in best]

    @checked
    def plot(
        self,
        row: int = 0,
        ax: Axes | None = None,
        pos: slice | Sequence[int] | None = None,
        layers: slice | Sequence[int] | None = None,
    ) -> Figure:
        """`lens.plot(pos=slice(-20, None))`: a matplotlib Figure: the likeliest token in each cell, coloured by its probability.

        pos, layers: some positions and depths (0: the embedding), a slice or a list. Of more positions than have room the last.
        """
        from gatedlens.plot import results

        chosen = {"pos": slice(None) if pos is None else pos, "layer": slice(None) if layers is None else layers}
        found, words = self.top(row).some(**chosen), self.words(row)
        across, down = ([*range(n)] for n in (len(words[0]), len(words)))
        across = across[pos] if isinstance(pos, slice) else [*(across if pos is None else pos)]
        down = down[layers] if isinstance(layers, slice) else [*(down if layers is None else layers)]
        return results.words(found, [[words[i][j] for j in across] for i in down], ax)

    def _repr_html_(self) -> str:
        rows, length = self.resid[0].shape[:2]
        facts = {"rows": rows, "depths": len(self.resid), "positions": length}
        return card(f"{self.called}: {self.model.cfg.model_name}", facts, picture(self.plot))

    @property
    def called(self) -> str:
        """What it is called in titles: "Logit lens", or the lens that carried the streams on."""
        return self.carried or "Logit lens"

    def _facts(self, row: int) -> dict[str, Any]:
        return {"model": self.model.cfg.model_name, "row": row}

    def _real(self, row: int) -> Bool[Tensor, " pos"]:
        rows, length = self.resid[0].shape[:2]
        if not -rows <= row < rows:
            raise InputError(f"row={row}: this run has {rows} rows.")
        mask = self.batch.mask
        return torch.ones(length, dtype=torch.bool) if mask is None else mask[row].bool().cpu()

    def _token(self, token: int | str) -> int:
        chosen = self.model.to_single_token(token) if isinstance(token, str) else token
        size = self.model.cfg.d_vocab_out
        if not 0 <= chosen < size:
            raise InputError(f"token={token} is out of range: the logits have {size} entries (0 to {size - 1}).")
        return int(chosen)

    def _result(self, row: int, title: str, read: Any) -> Result:
        """`read` of every layer's probabilities [pos, d_vocab], at the row's real positions."""
        real = self._real(row)
        values = torch.stack([read(self.logits(layer)[row].softmax(-1)).cpu() for layer in self.layers])
        labels = {"layer": self.layers, "pos": inputs.labels(self.model, self.batch, row)}
        said = f"{self.called}: {title}"
        return Result(values[:, real], ("layer", "pos"), labels, said, title.split(" of ")[0], self._facts(row))
