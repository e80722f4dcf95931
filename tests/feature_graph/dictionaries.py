"""Random, untrained dictionaries for tests."""

from __future__ import annotations

import torch

from gatedlens.dictionaries import Dictionary, TopK


def random_dictionary(model, tokens, point, out_point=None, n=12, seed=0, skip=False, **options):
    """A dictionary of n features that fits the points, in the model's dtype."""
    names = [point, out_point or point]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=names)
    d_in, d_out = (cache[name].flatten(2).shape[-1] for name in names)
    draw, dtype = torch.Generator().manual_seed(seed), cache[point].dtype

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    W_skip = normal(d_in, d_out) / d_in if skip else None
    weights = normal(d_in, n) / d_in**0.5, normal(n, d_out) / d_out**0.5, 0.1 * normal(n), 0.1 * normal(d_out)
    return Dictionary(*weights, W_skip, point=point, out_point=out_point, **options)


def three(model, tokens):
    """An autoencoder of the stream, one of a mixer's output with a norm of its own, and a transcoder with a W_skip."""
    last = model.cfg.n_layers - 1
    return [
        random_dictionary(model, tokens, "blocks.0.hook_resid_post", activation=TopK(3)),
        random_dictionary(
            model, tokens, model.blocks[1].writers[-1].output_name, seed=1, centred=True, normalise="layer_norm"
        ),
        random_dictionary(
            model,
            tokens,
            f"blocks.{last}.hook_resid_pre",
            f"blocks.{last}.hook_resid_post",
            seed=2,
            skip=True,
        ),
    ]
