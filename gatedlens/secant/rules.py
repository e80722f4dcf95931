"""The rules of secant relevance: a line for each operation, by its name. Where two runs differ by D, and mean is half their sum:

    elementwise   Dg = (g(z) - g(z')) / (z - z') Dz                                                      elementwise.py
    products      D(a b) = mean(b) Da + mean(a) Db            a norm is c * (1 / s), s = sqrt(mean c^2)      products.py
    shares        Dp_j = q_j (Ds_j - sum_i q_i Ds_i / sum_i q_i), q the logarithmic mean of p and p'          shares.py
    recurrences   Dh_t = mean(decay_t) Dh_{t-1} + mean(h_{t-1}) D decay_t + D write_t; delta rules likewise    scans.py
    wkv           a running mean whose weights are shares of two                                                wkv.py
    linear        as it is; so is whatever is chosen, by the input's own run: an expert, a comparison

    {**RULES, "my_function": rule}             a table of your own: `rule(call)`, see `Call` in contrast.py

No rule knows an architecture, and no architecture a rule: a stage is its forward, and that is made of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gatedlens.errors import InputError
from gatedlens.secant import scans, wkv
from gatedlens.secant.contrast import Call, Rule
from gatedlens.secant.elementwise import (
    elementwise,
    of_exp,
    of_exp2,
    of_reciprocal,
    of_relu,
    of_rsqrt,
    of_sqrt,
    of_square,
    power,
)
from gatedlens.secant.products import bilinear, divided, einsum, lerp, linear, logaddexp, normalize, times
from gatedlens.secant.shares import log_softmax, logsumexp, softmax


def _named(text: str) -> tuple[str, ...]:
    return tuple(text.split())


LINEAR = _named(
    "add sub rsub __rsub__ __radd__ neg sum mean cumsum cat concat stack view reshape flatten unflatten squeeze "
    "unsqueeze transpose permute movedim mT T H mH adjoint expand repeat repeat_interleave chunk split "
    "split_with_sizes tensor_split unbind flip roll __getitem__ select narrow index_select gather scatter index_add "
    "masked_fill where tril triu diagonal diag_embed pad clone contiguous float double half bfloat16 detach "
    "broadcast_to broadcast_tensors unfold take_along_dim masked_select __iter__ data"
)
LIKE = _named("to type type_as expand_as view_as reshape_as")  # another tensor, which says what form x shall have
PRODUCTS = _named("matmul __matmul__ __rmatmul__ bmm mm mv dot linear addcmul conv1d conv2d outer baddbmm addmm")
ELEMENTWISE = _named(
    "sigmoid silu tanh gelu softplus logsigmoid log_sigmoid mish hardswish hardsigmoid elu leaky_relu sin cos log "
    "log1p expm1 clamp clamp_min clamp_max abs erf logit of_one_number"
)
ASKED = _named(
    "size dim numel nelement stride is_floating_point is_complex is_contiguous element_size __len__ data_ptr tolist "
    "item __repr__ __format__ __bool__ __float__ eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ isfinite "
    "isnan isinf any all floor nonzero argmax argmin argsort allclose equal zeros_like ones_like empty_like full_like "
    "rand_like randn_like new_zeros new_ones new_full new_empty new_tensor get_device is_conj is_neg numpy "
    "storage_offset __hash__ is_same_size result_type"
)
OF_AUTOGRAD = _named("grad backward requires_grad_ retain_grad register_hook")


def asked(call: Call) -> Any:
    """A question, or what is chosen by values: by those of the input's own run. No relevance goes there."""
    return call.outcome(call.number - 1)


def itself(call: Call) -> Any:
    """What is asked of autograd: of the tensors themselves, in their graph."""
    args, kwargs = torch.utils._pytree.tree_unflatten(call.leaves, call.form)
    return call.func(*args, **kwargs)


def attribute(call: Call) -> Any:
    """`x.shape`, `x.mT`: a transposed one of every run, or a question."""
    name = call.func.__self__.__name__  # type: ignore[attr-defined]
    return linear(call) if name in LINEAR else asked(call)


def like(call: Call) -> Any:
    """`x.to(y)`, `x.expand_as(y)`: linear in x; of y only the form is read."""
    return linear(call) if call.places[0] == 0 else asked(call)


def chosen(call: Call) -> Any:
    """topk, sort: the entries that the input's own run chooses, of every run."""
    with torch.no_grad():
        found = call.outcome(call.number - 1)
    args, kwargs = torch.utils._pytree.tree_unflatten(call.leaves, call.form)
    which = {"topk": 2, "sort": 1}[call.name]
    dim = args[which] if len(args) > which else kwargs.get("dim", -1)
    with torch._C._EnableTorchFunction():
        return type(found)((args[0].gather(dim, found.indices), found.indices))


def reversed_division(call: Call) -> Any:
    """1 / x"""
    x, above = call.leaves
    with torch._C._EnableTorchFunction():
        return x.reciprocal() * above


def dropout(call: Call) -> Any:
    """Dropout that is off; where it is on, two runs are no contrast of inputs."""
    args, kwargs = torch.utils._pytree.tree_unflatten(call.leaves, call.form)
    given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    if given.get("training", True) and given.get("p", 0.5) > 0:
        raise InputError("Secant relevance compares two runs, and dropout differs between them: model.eval().")
    return given["input"]


def numerator_and_denominator(call: Call) -> Any:
    """Points inside RWKV-4's scan: as a quotient it has another rule, far worse, and scores must not hang on who listens."""
    raise InputError(
        "Secant relevance takes RWKV-4's scan as a running mean, and its numerator and denominator (hook_state_start, "
        "hook_decay, hook_write, hook_state, hook_num, hook_den, hook_max) have no relevance: ask for hook_k, hook_u or "
        "hook_scan."
    )


def in_place(name: str) -> Rule:
    """`in_place("mul")`: `x.mul_(y)`, `x[i] = y`: what the operation gives stands in the place of x, in every run."""

    def rule(call: Call) -> Any:
        if not call.places or call.places[0] != 0:
            raise InputError(
                f"Secant relevance: {call.name!r} writes into a tensor that is no part of the contrast, so what was written "
                "cannot be followed. Write it out of place (torch.cat, index_add)."
            )
        args, kwargs = torch.utils._pytree.tree_unflatten(call.leaves, call.form)
        if name in LINEAR or (name in ("mul", "div", "addcmul") and len(call.places) < 2):
            linear(call)
        else:
            with torch._C._EnableTorchFunction():
                found = getattr(torch, name)(*args, **kwargs)
            for run, own in enumerate(args[0].runs):
                with torch.set_grad_enabled(torch.is_grad_enabled() and run > 0):
                    own.copy_(found.runs[run])
        return args[0]

    return rule


def rules() -> Mapping[str, Rule]:
    """The whole table."""
    found: dict[str, Rule] = dict.fromkeys(ASKED, asked)
    found |= (
        dict.fromkeys(OF_AUTOGRAD, itself)
        | dict.fromkeys(LINEAR, linear)
        | dict.fromkeys(LIKE, like)
        | dict.fromkeys(PRODUCTS, bilinear)
    )
    found |= dict.fromkeys(ELEMENTWISE, elementwise())
    found |= {
        "mul": times,
        "__rmul__": times,
        "multiply": times,
        "div": divided,
        "true_divide": divided,
        "__rdiv__": reversed_division,
    }
    found |= {
        "einsum": einsum,
        "lerp": lerp,
        "normalize": normalize,
        "pow": power,
        "__pow__": power,
        "dropout": dropout,
    }
    found |= {
        "exp": elementwise(of_exp),
        "exp2": elementwise(of_exp2),
        "square": elementwise(of_square),
        "sqrt": elementwise(of_sqrt),
    }
    found |= {"rsqrt": elementwise(of_rsqrt), "reciprocal": elementwise(of_reciprocal), "relu": elementwise(of_relu)}
    found |= {"softmax": softmax, "log_softmax": log_softmax, "logsumexp": logsumexp, "logaddexp": logaddexp}
    found |= {"__get__": attribute, "__set__": asked, "topk": chosen, "sort": chosen}
    found |= {
        f"{name}_": in_place(name) for name in (*LINEAR, *ELEMENTWISE, "mul", "div", "exp", "exp2", "addcmul", "relu")
    }
    found |= {"__setitem__": in_place("__getitem__"), "copy_": in_place("clone")}
    found |= {"linear_scan": scans.every_state, "states_of_delta_rule": scans.every_state_of_delta_rule}
    found |= {"scan": scans.of_steps, "chunked": scans.of_heads, "wkv": wkv.running_mean}
    found |= {"OpenWkv": numerator_and_denominator}
    return found


RULES = rules()
