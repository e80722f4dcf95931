"""Attribution by gradients, through captum: gradient x input, integrated gradients, SmoothGrad.

    gl.attribution.grad_x_input(model, text)
    gl.attribution.integrated_gradients(model, text, target=(7, 3), baseline="<unk>", n_steps=100)
    gl.attribution.smoothgrad(model, images, n_samples=50, noise=0.1, seed=0)

The input x is the embedded tokens; of an image its pixels, summed to patches (see `question.py`). Scores are signed and
summed over d_model. captum is an extra: pip install 'gatedlens[attribution]'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gatedlens.attribution.empty_input import Baseline, Keep, baseline_of, keep_said, kept_places
from gatedlens.attribution.question import Question
from gatedlens.attribution.scores import Attribution
from gatedlens.attribution.target import Asked
from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.options import checked
from gatedlens.result.rounding import total

# A number of steps, or of samples. For type checkers: what is none gets an InputError of its own.
if TYPE_CHECKING:
    Count: TypeAlias = int
else:
    Count = Any


def _captum() -> Any:
    try:
        import captum.attr  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("This attribution needs captum: pip install 'gatedlens[attribution]'.") from error
    return captum.attr


@checked
def grad_x_input(
    model: HookedModel, input: Input, target: Asked = None, *, attention_mask: Tensor | None = None
) -> Attribution:
    """`gl.attribution.grad_x_input(model, text)`: x . d number / d x: the first-order share of each token. Shrikumar et
    al. 2016 (arXiv 1605.01713).
    """
    captum = _captum()
    question = Question.of(model, input, target, attention_mask)
    gradient = _saliency(captum, question, question.features)
    scores = total(question.content * gradient)
    return question.answer(scores, "grad_x_input", "gradient x input")


@checked
def integrated_gradients(
    model: HookedModel,
    input: Input,
    target: Asked = None,
    *,
    baseline: Baseline = None,
    keep: Keep = "nothing",
    n_steps: Count = 50,
    batch_size: int = 32,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """`gl.attribution.integrated_gradients(model, text, n_steps=50)`: (x - x0) . mean of d number / d x on the way from
    the baseline x0 to x. Sundararajan et al. 2017 (arXiv 1703.01365).

    Complete: the scores of a row sum to the number at x minus that at x0, up to facts["error"], which falls with `n_steps`.
    baseline, keep: see `empty_input.py`; by the paper's definition nothing is kept, and keep="read" is more faithful. The nodes
    are
    Gauss and Legendre's, so a few are enough where the way is smooth: n_steps=3 comes near 50. batch_size: how many inputs one
    forward holds.
    """
    _positive(n_steps=n_steps, batch_size=batch_size)
    captum = _captum()
    question = Question.of(model, input, target, attention_mask)
    start, said = baseline_of(question, baseline)
    start = torch.where(kept_places(question, keep).unsqueeze(-1), question.features, start)
    method, rows = captum.IntegratedGradients(question.measure), len(start)
    with torch.enable_grad():
        found = method.attribute(
            question.features.clone().requires_grad_(),
            baselines=start.clone(),
            n_steps=n_steps,
            internal_batch_size=rows * max(1, batch_size // rows),
        )
    scores = total(found.detach())
    with torch.no_grad():
        error = scores.sum(1) - (question.explained - question.measure(start))
    facts: dict[str, Any] = {"baseline": said, "keep": keep_said(keep), "n_steps": n_steps, "error": error.tolist()}
    return question.answer(scores, "integrated_gradients", "integrated gradients", **facts)


@checked
def smoothgrad(
    model: HookedModel,
    input: Input,
    target: Asked = None,
    *,
    n_samples: Count = 25,
    noise: int | float = 0.1,
    seed: int = 0,
    batch_size: int = 32,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """`gl.attribution.smoothgrad(model, text, n_samples=25)`: x . mean of d number / d x at x + Gaussian noise. Smilkov et
    al. 2017 (arXiv 1706.03825), times the input.

    noise: its standard deviation, as a share of the range (max - min) of a row's features. Each row is drawn by itself
    from the same `seed`, so a row's scores do not depend on the batch that it is in.
    """
    _positive(n_samples=n_samples, batch_size=batch_size)
    if not noise > 0:
        raise InputError(f"noise={noise}: a share of the features' range, above 0; without noise it is grad_x_input.")
    captum = _captum()
    question = Question.of(model, input, target, attention_mask)
    scores = []
    for row in question.rows():
        x, tunnel = row.features.clone().requires_grad_(), captum.NoiseTunnel(captum.Saliency(row.measure))
        std = float(noise * (row.features.max() - row.features.min()))
        with torch.enable_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(seed)
            mean = tunnel.attribute(
                x, nt_samples=n_samples, nt_samples_batch_size=min(batch_size, n_samples), stdevs=std, abs=False
            )
        scores.append(total(row.content * mean.detach()))
    facts: dict[str, Any] = {"n_samples": n_samples, "noise": noise, "seed": seed}
    return question.answer(question.spread(scores), "smoothgrad", "smoothed gradient x input", **facts)


def _saliency(captum: Any, question: Question, features: Tensor) -> Tensor:
    """d number / d features."""
    with torch.enable_grad():
        found: Tensor = captum.Saliency(question.measure).attribute(features.clone().requires_grad_(), abs=False)
    return found


def _positive(**numbers: Any) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise InputError(f"{name}={number!r}: a whole number is meant.")
        if number < 1:
            raise InputError(f"{name}={number}: give at least 1.")
