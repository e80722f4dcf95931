"""Untrained: a model of the same architecture that has learnt nothing, as a control of what is fitted to activations.

    nothing = untrained(model, seed=0)

Each parameter keeps its numbers and loses their order: the sizes of weights, decays and gains are those of the model, what is
written in them is not. What a fit finds here too, the method and the architecture have found, not what the model has learnt.
Source: Adebayo et al. 2018 (Sanity checks for saliency maps, arXiv 1810.03292); Zhang and Bowman 2018 (random encoders as a
baseline of probes, arXiv 1809.10040).
"""

from __future__ import annotations

import copy

import torch

from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel
from gatedlens.options import checked


@checked
@torch.no_grad()
def untrained(model: HookedModel, seed: int = 0) -> HookedModel:
    """`nothing = gl.probes.untrained(model, seed=0)`: a copy of the model whose parameters are in random order, each in itself.

    A tensor that two modules share stays shared. The model is left as it is. InputError for a model whose weights are not there
    to be copied (on "meta", quantised).

    Source: Adebayo et al. 2018 (arXiv 1810.03292); Zhang and Bowman 2018 (arXiv 1809.10040).
    """
    for name, parameter in model.wrapped.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            raise InputError(f"untrained: {name} of {model.cfg.model_name} holds no numbers to put in another order.")
    wrapped = copy.deepcopy(model.wrapped)
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))
    return type(model)(wrapped, model_name=f"{model.cfg.model_name}, untrained", tokenizer=model.tokenizer)
