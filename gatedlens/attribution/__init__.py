"""Attribution: which tokens or patches a prediction comes from, by eleven methods with one signature.

    found = gl.attribution.gradient_attention(model, "The cat sat on the mat")     # explains the predicted token
    found = gl.attribution.lrp(model, images, target=3)                            # explains class 3
    found.scores, found.plot()

    for name, method in gl.attribution.METHODS.items():
        method(model, input, target)

method(model, input, target=None, *, attention_mask=None, ...) -> Attribution. What may be a target: `target.py`; what a
method is and which options it has: its docstring. A method of your own is a function with this signature.
"""

from collections.abc import Callable

from gatedlens.attribution.by_attention import gradient_attention, raw_attention, rollout
from gatedlens.attribution.by_gradients import grad_x_input, integrated_gradients, smoothgrad
from gatedlens.attribution.by_perturbation import occlusion, random
from gatedlens.attribution.by_relevance import lrp
from gatedlens.attribution.by_secant import mix, relevance_at, secant, secant_by_head, secant_by_layer
from gatedlens.attribution.question import Question
from gatedlens.attribution.scores import Attribution
from gatedlens.errors import InputError, did_you_mean
from gatedlens.runs.relevance_rules import Rules

Method = Callable[..., Attribution]
METHODS: dict[str, Method] = {
    method.__name__: method
    for method in (
        raw_attention,
        rollout,
        gradient_attention,
        lrp,
        secant,
        mix,
        grad_x_input,
        integrated_gradients,
        smoothgrad,
        occlusion,
        random,
    )
}


def method(name: str) -> Method:
    """`method("rollout")`: a method by its name."""
    if name not in METHODS:
        raise InputError(
            f"{name!r} is no attribution method; they are {', '.join(METHODS)}.{did_you_mean(name, METHODS)}"
        )
    return METHODS[name]


__all__ = [
    "METHODS",
    "Attribution",
    "Method",
    "Question",
    "Rules",
    "grad_x_input",
    "gradient_attention",
    "integrated_gradients",
    "lrp",
    "method",
    "mix",
    "occlusion",
    "random",
    "raw_attention",
    "relevance_at",
    "rollout",
    "secant",
    "secant_by_head",
    "secant_by_layer",
    "smoothgrad",
]
