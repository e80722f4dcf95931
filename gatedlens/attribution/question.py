"""Question: a model, an input and a target, made ready for any method to answer.

    question = Question.of(model, "The cat sat", target=None)
    question.explained                      # batch: the number to explain
    question.features                       # batch pos d_model: what enters the model, at the point `question.entrance`
    question.measure(features)              # the number for other features: [batch], or [copies * batch]
    question.gradients("blocks.0.hook_mixer_out")    # d number / d activation, by name
    question.answer(scores, "my method", value="...")    # the Attribution

The entrance is where an input enters: of tokens the residual stream before block 0 (their embeddings; RWKV has normed
them), of images the patches' embeddings, before positions and class tokens join them. These are linear in the pixels, so
what is attributed to a patch is what its pixels get, summed, overlapping patches included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.attribution.scores import IMAGE, TEXT, Attribution
from gatedlens.attribution.target import Asked, Target
from gatedlens.errors import InputError
from gatedlens.metrics import Logits, per_row
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.model.hookpoint import Capture
from gatedlens.recurrence.autocast import exact
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.result.rounding import moved
from gatedlens.runs.gradients import check_allowed


@dataclass(frozen=True)
class Question:
    """See the head of this file. `logits` are those of the clean run, `explained` what the target makes of them, `read` the
    positions that they are read from, as shares."""

    model: HookedModel
    batch: Batch
    target: Target
    features: Float[Tensor, "batch place d_model"]
    logits: Float[Tensor, "batch *pos d_vocab"]
    explained: Float[Tensor, " batch"]
    read: Float[Tensor, "batch pos"]

    @staticmethod
    def of(model: HookedModel, input: Input, target: Asked = None, attention_mask: Tensor | None = None) -> Question:
        """`Question.of(model, input, target)`: one clean run, with everything checked. Works under torch.no_grad: methods
        switch gradients on themselves.
        """
        if not isinstance(model, HookedModel):
            raise InputError(f"An attribution takes a gatedlens model, not {type(model).__name__}: `gl.wrap(model)`.")
        check_allowed()
        batch, _ = model.prepare(input, attention_mask=attention_mask)
        batch = Batch(batch.value.detach().clone(), batch.mask)
        entrance = _entrance(model)
        with torch.no_grad():
            logits, stored = model.run_with_cache(batch, names_filter=entrance, return_cache_object=False)
        read = model.reads_from(batch)
        logits = Logits.of(logits, batch.mask)  # so that a metric of the user's counts real positions
        chosen = Target.of(target, model, logits, read.argmax(1))
        explained = per_row(chosen.metric, logits).detach()
        return Question(model, batch, chosen, stored[entrance], logits, explained, read)

    @property
    def entrance(self) -> str:
        """The point at which features enter."""
        return _entrance(self.model)

    @property
    def real(self) -> Bool[Tensor, "batch pos"] | None:
        """Which positions are no padding; None when all are."""
        return None if self.batch.mask is None or bool(self.batch.mask.all()) else self.batch.mask

    @property
    def own(self) -> Bool[Tensor, "batch pos"]:
        """The position that is read, or both if there are two class tokens; none where a pool reads them all."""
        return self.read >= 0.5

    @property
    def zero(self) -> Float[Tensor, "#batch place d_model"]:
        """The features of an input that holds nothing: zero; of an image, the embedding of pixels that are all zero."""
        if self.model.grid is None:
            return torch.zeros_like(self.features)
        return self.features_of(torch.zeros_like(self.batch.value[:1]))

    @property
    def content(self) -> Float[Tensor, "batch place d_model"]:
        """What the features hold beyond those of nothing, exactly 0 where that is rounding."""
        zero = self.zero
        return (self.features - zero).masked_fill(~moved(self.features, zero).unsqueeze(-1), 0)

    def features_of(self, value: Tensor) -> Float[Tensor, "rows place d_model"]:
        """`question.features_of(tokens)`: the features of other tokens or images."""
        with torch.no_grad():
            run = self.model.run_with_cache
            _, stored = run(Batch(value), names_filter=self.entrance, stop_at_layer=1, return_cache_object=False)
        found: Tensor = stored[self.entrance]
        return found

    # -- asking the model ----------------------------------------------------------------------------------------

    def measure(self, features: Float[Tensor, "rows place d_model"]) -> Float[Tensor, " rows"]:
        """`question.measure(features)`: [rows], The number for features of the batch, or of several copies of the batch
        one after another.
        """
        copies = len(features) // len(self.features)
        mask = self.batch.mask
        value = self.batch.value.repeat(copies, *[1] * (self.batch.value.ndim - 1))
        batch = Batch(value, None if mask is None else mask.repeat(copies, 1))
        with self.model.hooks([(self.entrance, lambda x, hook: features.to(x))]):
            logits = self.model(batch)
        return torch.cat([per_row(self.target.metric, Logits.of(part, mask)) for part in logits.chunk(copies)])

    def gradients(self, *names: str) -> dict[str, Tensor]:
        """`question.gradients("blocks.3.hook_mixer_out")`: d number / d activation of some points, each row that of its
        own number. Parameters' .grad stay untouched.
        """
        values: dict[str, Tensor] = {}
        with torch.enable_grad(), self.model.hooks([(name, Capture(values)) for name in names]):
            total = self.measure(self.features.clone().requires_grad_()).sum()
        if not total.requires_grad:
            raise InputError("The metric does not depend on the input: it has no gradient. Does it detach, or count?")
        with exact(total):
            found = torch.autograd.grad(total, [values[name] for name in names], allow_unused=True)
        return {n: torch.zeros_like(values[n]) if g is None else g for n, g in zip(names, found, strict=True)}

    def gradient(self) -> Float[Tensor, "batch place d_model"]:
        """`question.gradient()`: [batch, place, d_model], d number / d features."""
        return self.gradients(self.entrance)[self.entrance]

    def rows(self) -> Iterator[Question]:
        """`for one in question.rows(): ...`: each row as a question of its own, without padding."""
        for r in range(len(self.features)):
            real = None if self.real is None else self.real[r]
            kept = slice(None) if real is None else real
            value, features = self.batch.value[r : r + 1], self.features[r : r + 1][:, kept]
            batch = Batch(value if real is None else value[:, real])
            logits = self.logits[r : r + 1] if real is None else self.logits[r : r + 1][:, real]
            target = self.target.row(r, self.logits, real)
            explained, read = self.explained[r : r + 1], self.model.reads_from(batch)
            yield Question(self.model, batch, target, features, logits, explained, read)

    def spread(self, rows: list[Tensor]) -> Float[Tensor, "batch place"]:
        """`question.spread(rows)`: [batch, place], What was found for each of `rows()`, back in its place in the batch; 0
        at padding.
        """
        out = rows[0].new_zeros(self.features.shape[:2])
        for r, row in enumerate(rows):
            out[r, slice(None) if self.real is None else self.real[r]] = row[0]
        return out

    # -- answering -----------------------------------------------------------------------------------------------

    def answer(
        self,
        scores: Float[Tensor, "batch place"],
        method: str,
        value: str,
        layers: tuple[int, ...] | None = None,
        **facts: Any,
    ) -> Attribution:
        """`question.answer(scores, "lrp", "relevance")`: the Attribution of scores of the positions (or, of an image, of
        the patches alone).
        """
        grid, real = self.model.grid, self.real
        scores = at_least_float32(scores.detach())
        labels: dict[str, Any] = {}
        if grid is None:
            scores = scores if real is None else scores.masked_fill(~real, 0)
            facts["tokens"] = self._tokens()
            if len(scores) == 1:
                labels["pos"] = facts["tokens"][0]
        elif scores.shape[1] == grid.length:
            scores = grid.fold(scores)
        else:
            scores = scores.unflatten(1, (grid.rows, grid.columns))
        return Attribution(
            scores,
            TEXT if grid is None else IMAGE,
            labels,
            title=f"{method} of {self.model.cfg.model_name}",
            value=value,
            facts={
                "method": method,
                "model": self.model.cfg.model_name,
                "target": self.target.said,
                "explained": self.explained.tolist(),
                "layers": list(range(self.model.cfg.n_layers) if layers is None else layers),
                "real": None if real is None else real.tolist(),
                **facts,
            },
            images=None if grid is None else self.batch.value,
            grid=grid,
        )

    def _tokens(self) -> list[list[str]]:
        """Each row's tokens as text; their ids where the model has no tokenizer."""
        ids = self.batch.value
        if self.model.tokenizer is None:
            return [[str(i) for i in row] for row in ids.tolist()]
        return [self.model.to_str_tokens(row) for row in ids]


def _entrance(model: HookedModel) -> str:
    return "blocks.0.hook_resid_pre" if model.grid is None else next(iter(model.names))
