# %% [markdown]
# # 8. An architecture of yours
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/8-a-fifth-architecture.ipynb)
#
# One idea: **an architecture is one file: its rows, the path of its content, and how it fills the one recurrence. Everything
# else follows.** We walk through `fifth/my_mamba2.py`, which adds Mamba-2 (Dao and Gu 2024, arXiv 2405.21060) as if gatedlens did
# not have it: heads with matrix states, a decay a head, B and C shared by groups of heads, a norm behind the gate.
#
#     state_t = exp(dt_t A) state_{t-1} + dt_t u_t B_t^T        scan_t = state_t C_t        o = RMSNorm((scan + D u) SiLU(z))
#
# gatedlens has it, so everything can be held against `gl.HookedMamba2` at the end. The whole contract, with a smaller example, is
# one page: `docs/architecture.md`. The code in this text is quoted from the file; a test sees to it that it stays so.

# %% [markdown]
# ## Rows
#
# A hook point is a row: its name, its axes, its equation in the words of other rows and of your parameters, and where the
# equation comes from. Use the shared words for the shared roles (`hook_x`, `hook_u`, `hook_decay`, `hook_scan`, ...) and
# your own for the rest, in the order in which they fire. The last `True` makes a row lazy: built only when somebody listens.
#
# ```python
#     Point("hook_dt", "batch pos head", "softplus(dt_pre)", PAPER),
#     Point("hook_reset", "batch pos one", "1 where a document begins, else 0", PAPER),
#     Point("hook_state_start", "batch head value state", "state before the first position", PAPER, True),
#     Point("hook_decay", "batch pos head value state", "exp(dt * A) * (1 - reset)", PAPER, True),
#     Point("hook_write", "batch pos head value state", "dt * u * B", PAPER, True),
#     Point("hook_state", "batch pos head value state", "decay * state[pos - 1] + write", PAPER, True),
#     Point("hook_scan", "batch pos channel", "sum over state of C * state", PAPER),
# ```
#
# The rows of the residual stream and of the norm come from functions: `residual_rows`, `norm_rows`.

# %% [markdown]
# ## The path
#
# What the content passes on its way from x to o, stage by stage. A stage runs, and it says what it is with its coefficients
# held; so the forward and the implicit attention are both read off this one line, and no code for `A x + r` is yours.
#
# ```python
#         norm = GroupNorm(cfg.n_groups, weights.norm.eps)
#         self.path = (Conv("conv1d", ("x", "B", "C")), SiLU(("B", "C")), Skip(Scan()), Gate(F.silu, "product"), norm)
# ```
#
# x goes through the convolution side by side with B and C. Of these three only x is the content: what B and C are made of is
# held, as everything is that multiplies the content.

# %% [markdown]
# ## Streams
#
# `project` is the input projection, over parameters that stay where they are (`w`, which is `self.weights`). It gives the
# streams by name, and fires their points; `pad.zero` keeps padding out of the convolution.
#
# ```python
#         return {
#             "gate_pre": self.hook_gate_pre(z),
#             "x": self.hook_x(pad.zero(x)),
#             "B": pad.zero(self.hook_B_pre(pad.zero(B).unflatten(-1, groups))),
#             "C": pad.zero(self.hook_C_pre(pad.zero(C).unflatten(-1, groups))),
#             "dt_pre": self.hook_dt_pre(dt + w.dt_bias),
#         }
# ```
#
# `select` prepares what the recurrence is made of, right before the scan. At a masked position dt is 0: decay 1, write 0.
#
# ```python
#         streams["B"] = self.hook_B(streams["B"])
#         streams["C"] = self.hook_C(streams["C"])
#         # 0 at a masked position: the state passes unchanged, whatever a hook did there
#         streams["dt"] = run.padding.zero(self.hook_dt(run.padding.zero(F.softplus(streams["dt_pre"]))))
# ```

# %% [markdown]
# ## The recurrence
#
# `terms` fills it, from the streams that `selection` names: the log of the decay (the last axis is 1: a head decays as one), what
# is written (a key, B, for each amount dt of the content) and what reads (C). It is asked twice: in the forward, by chunks, and
# for the matrix of the scan.
#
# ```python
#         A = -at_least_float32(self.weights.A_log).exp()
#         return Terms((dt * A.to(dt)).unsqueeze(-1), key=B, read=C, amount=dt)
# ```

# %% [markdown]
# ## The class
#
# `MyMamba2` subclasses `HookedLanguageModel` and says where things are in your module: `describe` (the sizes), `make_block`,
# `make_final_norm`, `embedding`, `unembedding`. `wraps = ("Mamba2Weights",)` is the name of the class that `gl.wrap` hands over.
# One call makes it known (a package of yours can name it under the entry point group `gatedlens.architectures` instead):

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import sys
from pathlib import Path

import torch

import gatedlens as gl
from gatedlens import catalogue

sys.path.append(str(Path(globals().get("__file__", "here")).resolve().parent / "fifth"))
from my_mamba2 import MyMamba2

gl.register(MyMamba2)
torch.set_grad_enabled(False)

# %% [markdown]
# ## What follows from it
#
# A module becomes a hooked model; here is the table of the points of one block. The module is the shipped tiny Mamba-2's, so
# that both run over the same parameters.

# %%
shipped = gl.HookedMamba2.tiny(dtype=torch.float64)
model = gl.wrap(shipped.wrapped)
print(type(model).__name__, "over", type(model.wrapped).__name__)
print(model.hook_table(layer=1))

# %% [markdown]
# Every point of it has the shipped architecture's value, and its implicit attention is exact.

# %%
tokens = torch.randint(40, (2, 24), generator=torch.Generator().manual_seed(0))
logits, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
theirs, their_cache = shipped.run_with_cache(tokens, names_filter=lambda name: True)
assert torch.allclose(logits, theirs, rtol=0, atol=1e-12)
assert all(torch.allclose(cache[name], their_cache[name], rtol=0, atol=1e-12) for name in their_cache)
attention = gl.implicit_attention(cache, layer=1)
print(attention.check())
assert attention.check().relative < 1e-12
print("the matrix of head 2, channel 0 of its values:", list(attention.dense(channels=[2 * 8])[0, 0].shape))

# %% [markdown]
# An edit of the write propagates, exactly: nothing later can read what a position did not write. And one index selects a head
# everywhere, by the axes that the rows say.

# %%
with gl.ablation.zero("blocks.0.mixer.hook_write", pos=5, head=2).on(model):
    cut = model(tokens)
assert torch.allclose(cut[:, :5], logits[:, :5], rtol=0, atol=1e-12)
assert not torch.allclose(cut[:, 5:], logits[:, 5:])

# %% [markdown]
# State, documents and generation came along: a text goes on at any split, and documents that are packed in a row are as if each
# stood alone.

# %%
first, state = model(tokens[:, :9], return_state=True)
assert torch.allclose(model(tokens[:, 9:], state=state), logits[:, 9:], rtol=0, atol=1e-12)
places = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
packed = model(tokens, position_ids=places)
assert torch.allclose(packed[:, 10:], model(tokens[:, 10:]), rtol=0, atol=1e-12)
print("generated:", model.generate(tokens[:1], max_new_tokens=4, temperature=0, verbose=False)[0, -4:].tolist())

# %% [markdown]
# So did gradients, and with them everything that is built on hooks. Which head of which layer matters for an answer?

# %%
answer = int(logits[0, -1].argmax())
for layer in range(model.cfg.n_layers):
    for head in range(model.cfg.n_heads):
        with gl.ablation.no_scan(layer, head=head).on(model):
            less = model(tokens[:1])
        print(f"without the scan of head {layer}.{head}: {less[0, -1, answer] - logits[0, -1, answer]:+.3f}")

# %% [markdown]
# And the catalogue's page, with a diagram drawn from your equations. `tests/test_fifth.py` runs every general test of the
# project on an architecture that gatedlens does not ship: edits and gradients exact at every point, padding, state at every
# split, nnsight. Put yours in its place.

# %%
print(catalogue.page("my_mamba2", type(model))[:700])
