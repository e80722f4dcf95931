"""Lenses: what the model would predict if it stopped after each layer, read in four ways; and what wrote a logit.

    lens = gl.lens.logit_lens(model, "The cat sat on the mat")     # or logit_lens(model, cache)
    lens.plot()                                # layer by position, the likeliest token in each cell
    lens.words(), lens.top()                   # these tokens; their probabilities, a Result layer x pos
    lens.probability(token), lens.rank(token)  # of one token, Results layer x pos
    lens.divergence()                          # from the model's own prediction, a Result layer x pos
    lens.logits(3)                             # batch pos d_vocab after layer 3; "embed": before the first

    logits_l = unembed(ln_final(resid_post_l))

with the final norm computed anew from each residual stream, and with a soft cap where the model has one: the last layer's
logits are the model's (nostalgebraist 2020). A Vision Mamba reads classes off the class token only; here off every patch.

    lens = gl.lens.jacobian_lens(model, texts)      # fitted: the mean Jacobian of the last layer's stream (`mean_jacobian.py`)
    lens = gl.lens.relevance_lens(model, texts)     # the same, with a gradient that follows the rules of relevance
    lens = gl.lens.tuned_lens(model, texts)         # trained to predict what the model predicts (`translators.py`)
    lens.read(model, "The cat sat").plot()          # as above, of the streams that it has carried on
    lens.save("j.safetensors"); gl.lens.FittedLens.load("j.safetensors")

    gl.lens.state_lens(model, source, reader, pos=3)  # what a state would say if another prompt read it (`state_readout.py`)

`logit_attribution`, `token_attribution` (see `logit_shares.py`), `head_attribution` and `head_token_attribution` (see
`head_shares.py`) decompose a logit instead.
"""

from gatedlens.lens.early_logits import LogitLens, logit_lens
from gatedlens.lens.fitted_lens import FittedLens
from gatedlens.lens.head_shares import head_attribution, head_token_attribution
from gatedlens.lens.logit_shares import logit_attribution, token_attribution
from gatedlens.lens.mean_jacobian import jacobian_lens, relevance_lens
from gatedlens.lens.state_readout import StateLens, state_lens
from gatedlens.lens.translators import losses, tuned_lens

# fmt: off
__all__ = [
    "FittedLens", "LogitLens", "StateLens", "head_attribution", "head_token_attribution", "jacobian_lens", "logit_attribution",
    "logit_lens", "losses", "relevance_lens", "state_lens", "token_attribution", "tuned_lens",
]
# fmt: on
