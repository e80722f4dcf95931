"""Secant relevance: what each token is worth against a reference, completely, for two forwards and one backward.

    gl.attribution.secant(model, "The cat sat on the mat")
    gl.attribution.secant(model, tokens, target=(7, 3), baseline="<unk>", steps=2)
    gl.attribution.mix(model, text)                                  # of secant and lrp, each scaled to unit mass

    gl.attribution.relevance_at(model, text, "*.hook_resid_pre")     # at any points: {name: relevance of every entry}
    gl.attribution.secant_by_layer(model, text)                      # batch layer pos
    gl.attribution.secant_by_head(model, text)                       # batch layer head src

The model runs on the input x and on a reference x' at once: what `baseline` puts in at every position, while the position that is
read (and BOS) stay as they are. Backwards, the secant between the two runs stands where a derivative would: a relevance of
DeepLIFT's kind (Shrikumar et al. 2017, arXiv 1704.02685), with the midpoint rule for products, carried to gated scans, delta
rules, softmax and norms. Nothing is detached: gates, decays, keys and patterns get their own.

    scores_j = sum_d (x_j - x'_j) M_j            sum_j scores_j = number(x) - number(x')

It is complete: docs/secant.md says why, and `rules.py` in `gatedlens/secant/` which operation has which rule. It asks what
happens when all of that is taken away, so it leads where that is tested; where an answer stands, `lrp` points at better
(docs/results.md). Experts are those that the input chooses, in the reference's run as well.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.attribution.by_relevance import lrp
from gatedlens.attribution.empty_input import Baseline, Keep, keep_said
from gatedlens.attribution.question import Question
from gatedlens.attribution.scores import Attribution
from gatedlens.attribution.target import Asked
from gatedlens.attribution.two_runs import Traced, TwoRuns
from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.by_head import with_heads
from gatedlens.options import checked
from gatedlens.result.result import Result
from gatedlens.result.rounding import total

if TYPE_CHECKING:
    Names: TypeAlias = Any
else:
    Names = Any


@checked
def secant(
    model: HookedModel,
    input: Input,
    target: Asked = None,
    *,
    baseline: Baseline = None,
    keep: Keep = "read",
    steps: int = 1,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """`gl.attribution.secant(model, text)`: the share of each token or patch in number(x) - number(x'): see the head of this
    file.

    baseline, keep: what the reference holds, and where it is the input: see `empty_input.py`. steps: into so many parts the way
    from reference to input is cut, each with a secant of its own; steps + 1 forwards and as many backwards as steps.
    facts["reference"] is number(x'), facts["remainder"] what the scores do not sum to: rounding alone, for a logit or a
    difference of logits; of another metric what a sum of 16 nodes leaves of its integral.
    """
    question = Question.of(model, input, target, attention_mask)
    return _scored(question, TwoRuns.of(question, baseline, keep, steps), keep)


def _scored(question: Question, runs: TwoRuns, keep: Keep) -> Attribution:
    traced = runs.traced(question.entrance)
    seeds, logits = traced.seeds(), traced.logits
    relevance = traced.relevance()[question.entrance]
    scores = total(relevance)
    measured = [number.double() for number in traced.measured]
    eps = max(torch.finfo(weight.dtype).eps for weight in question.model.parameters() if weight.is_floating_point())
    if eps <= torch.finfo(torch.float32).eps:  # in half precision, rounding leaves as much as a rule that lacks would
        _complete(relevance, logits, seeds)
    scores = scores if question.real is None else scores.masked_fill(~question.real, 0)
    remainder = measured[-1] - measured[0] - scores.double().sum(1)
    return question.answer(
        scores,
        "secant",
        "secant relevance",
        baseline=runs.said,
        keep=keep_said(keep),
        steps=len(runs.nodes) - 1,
        reference=measured[0].tolist(),
        remainder=remainder.tolist(),
    )


def _complete(relevance: Tensor, logits: Any, seeds: list[Tensor]) -> None:
    """InputError where the scores are not what the logits moved: something in the forward had no rule and said nothing."""
    with torch.no_grad():
        found = relevance.double().flatten(1).sum(1)
        runs = [run.double() for run in logits.plain]
        steps = [after - before for before, after in pairwise(runs)]
        moved = torch.stack([(step * seed).flatten(1).sum(1) for step, seed in zip(steps, seeds, strict=True)]).sum(0)
        size = relevance.double().abs().flatten(1).sum(1) + sum(
            (r * s).abs().flatten(1).sum(1) for r, s in zip(runs[1:], seeds, strict=True)
        )
        allowed = torch.finfo(relevance.dtype).eps ** 0.5
        if not bool(((found - moved).abs() <= allowed * size.clamp(min=1e-30)).all()):
            off = float((found - moved).abs().max())
            raise InputError(
                f"Secant relevance is off by {off:.3g} of what it explains: an operation of this forward, or a hook on the "
                "model, has a gradient of its own (a torch.autograd.Function, a detached tensor), which no rule knows. A "
                "function of one number says so by `of_one_number` (gatedlens/recurrence/transforms.py)."
            )


@checked
def mix(
    model: HookedModel,
    input: Input,
    target: Asked = None,
    *,
    baseline: Baseline = None,
    keep: Keep = "read",
    attention_mask: Tensor | None = None,
) -> Attribution:
    """`gl.attribution.mix(model, text)`: the mean of `secant` and `lrp`, each scaled so that its sizes sum to 1.

    Of the two, secant is better at what a test takes away, lrp at where the answer stands; the mix is near the better of both,
    and not complete. Options as in `secant`; it costs what both cost.
    """
    found = secant(model, input, target, baseline=baseline, keep=keep, attention_mask=attention_mask)
    pointing = lrp(model, input, target, attention_mask=attention_mask)
    question = Question.of(model, input, target, attention_mask)
    scores = (_of_unit_mass(found.scores) + _of_unit_mass(pointing.scores)) / 2
    facts = {name: found.facts[name] for name in ("baseline", "keep", "steps")} | {"gates": pointing.facts["gates"]}
    answer = question.answer(torch.zeros_like(question.features[..., 0]), "mix", "mean of secant and lrp", **facts)
    return replace(answer, values=scores)


def _of_unit_mass(scores: Tensor) -> Tensor:
    mass = scores.abs().flatten(1).sum(1).reshape(-1, *[1] * (scores.ndim - 1))
    return scores / torch.where(mass == 0, 1.0, mass)


# -- inside -----------------------------------------------------------------------------------------------------------


@checked
def relevance_at(
    model: HookedModel,
    input: Input,
    names: Names,
    target: Asked = None,
    *,
    baseline: Baseline = None,
    keep: Keep = "read",
    steps: int = 1,
    attention_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """`gl.attribution.relevance_at(model, text, "*.hook_resid_pre")`: (a - a') M at hook points, by name, with the axes of each.

    At points that all of the difference passes (the residual stream before a layer) it sums to number(x) - number(x'). names: a
    name, a glob or a list, as in `run_with_cache`; RWKV-4's points inside its scan have no rule. Options as in `secant`.
    """
    wanted = dict.fromkeys(name for each in model.names.select(names) for name in each)
    question = Question.of(model, input, target, attention_mask)
    runs = TwoRuns.of(question, baseline, keep, steps)
    return {name: r.detach() for name, r in runs.relevance(*wanted).items()}


@checked
def secant_by_layer(
    model: HookedModel,
    input: Input,
    target: Asked = None,
    *,
    baseline: Baseline = None,
    keep: Keep = "read",
    steps: int = 1,
    attention_mask: Tensor | None = None,
) -> Result:
    """`gl.attribution.secant_by_layer(model, text)`: where the difference is before each layer, batch x layer x pos.

    Every layer sums to number(x) - number(x'): the relevance of the residual stream before it, and (layer "end") behind the last.
    What stands early at the token that matters stands late where the answer is read. What blocks hand on beside the stream
    (RWKV-7's values of layer 0, Zamba2's embeddings) is not in it: the fact "beside", batch x layer. Options as in `secant`.
    """
    question = Question.of(model, input, target, attention_mask)
    layers = range(model.cfg.n_layers)
    names = [*(f"blocks.{layer}.hook_resid_pre" for layer in layers), f"blocks.{layers[-1]}.hook_resid_post"]
    found = TwoRuns.of(question, baseline, keep, steps).relevance(*names)
    rows = [total(found[name].detach()) for name in names]
    values = torch.stack(rows, 1)
    facts = {
        "model": model.cfg.model_name,
        "target": question.target.said,
        "explained": question.explained.tolist(),
        "beside": (values[:, :1].sum(-1) - values.sum(-1)).tolist(),
    }
    labels = {"layer": [*map(str, layers), "end"]}
    title = f"secant of {model.cfg.model_name}, before each layer"
    return Result(values, ("batch", "layer", "pos"), labels, title, "secant relevance", facts)


@checked
def secant_by_head(
    model: HookedModel,
    input: Input,
    target: Asked = None,
    *,
    baseline: Baseline = None,
    keep: Keep = "read",
    steps: int = 1,
    attention_mask: Tensor | None = None,
) -> Result:
    """`gl.attribution.secant_by_head(model, text)`: what each source token is worth through each head, batch x layer x head x
    src.

    Of a head's output the relevance that its layer's mixer draws from the token src, by whatever way: value, key, decay, gate.
    Summed over src it is the head's relevance (fact "head"), over heads what the mixer draws from a token. What a mixer reads
    beside
    its own input (RWKV-7: the values of layer 0) is no token's: the fact "remainder", batch x layer x head. Layers without heads
    are not on the axis; PointError for a model without. Options as in `secant`; one backward through the layer a head.
    """
    outputs = with_heads(model)
    question = Question.of(model, input, target, attention_mask)
    inputs = {layer: _entrance(model, layer) for layer in outputs}
    traced = TwoRuns.of(question, baseline, keep, steps).traced(*outputs.values(), *inputs.values())
    flows, heads = traced.flows(*outputs.values()), model.cfg.sizes["head"]
    rows, whole = [], []
    for layer, name in outputs.items():
        of_head = traced.between(name, flows[name]).detach().flatten(2).unflatten(2, (heads, -1)).sum((1, 3))
        through = [_through(traced, name, inputs[layer], flows[name], head, heads) for head in range(heads)]
        rows.append(torch.stack(through, 1))
        whole.append(of_head)
    values, of_heads = torch.stack(rows, 1), torch.stack(whole, 1)
    facts = {
        "model": model.cfg.model_name,
        "target": question.target.said,
        "explained": question.explained.tolist(),
        "head": of_heads.tolist(),
        "remainder": (of_heads - values.sum(-1)).tolist(),
    }
    labels = {"layer": list(outputs), "head": list(range(heads))}
    title = f"secant of {model.cfg.model_name}, by head and source token"
    return Result(values, ("batch", "layer", "head", "src"), labels, title, "secant relevance", facts)


def _entrance(model: HookedModel, layer: int) -> str:
    """Where a layer's first mixer reads the residual stream."""
    block = model.blocks[layer]
    return f"blocks.{layer}.hook_{next(iter(block.mixing))}_in"


def _through(
    traced: Traced, output: str, entrance: str, flows: list[Tensor], head: int, heads: int
) -> Float[Tensor, "batch pos"]:
    """What a head's output is worth, by the token that its layer read it from."""
    own = []
    for flow in flows:
        of_heads = torch.zeros_like(flow).flatten(2).unflatten(2, (heads, -1))
        of_heads[:, :, head] = flow.flatten(2).unflatten(2, (heads, -1))[:, :, head]
        own.append(of_heads.reshape(flow.shape))
    steps = list(traced.values[output].runs[1:])  # type: ignore[attr-defined]
    back = traced.gradients(steps, own, entrance)[entrance]
    return total(traced.between(entrance, back).detach())
