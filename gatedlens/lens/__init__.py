"""Logit lens: what the model would predict if it stopped after each layer (nostalgebraist 2020).

    lens = gl.lens.logit_lens(model, "The cat sat on the mat")     # or logit_lens(model, cache)
    lens.plot()                                # layer by position, the likeliest token in each cell
    lens.words(), lens.top()                   # these tokens; their probabilities, a Result layer x pos
    lens.probability(token), lens.rank(token)  # of one token, Results layer x pos
    lens.logits(3)                             # batch pos d_vocab after layer 3; "embed": before the first

    logits_l = unembed(ln_final(resid_post_l))

with the final norm computed anew from each residual stream, and with a soft cap where the model has one: the last layer's
logits are the model's. A Vision Mamba reads classes off the class token only; here they are read off every patch.
`logit_attribution`, `token_attribution` (see `logit_shares.py`), `head_attribution` and `head_token_attribution` (see
`head_shares.py`) decompose a logit instead.
"""

from gatedlens.lens.early_logits import LogitLens, logit_lens
from gatedlens.lens.head_shares import head_attribution, head_token_attribution
from gatedlens.lens.logit_shares import logit_attribution, token_attribution

# fmt: off
__all__ = [
    "LogitLens", "head_attribution", "head_token_attribution", "logit_attribution", "logit_lens", "token_attribution",
]
# fmt: on
