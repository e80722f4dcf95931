# %% [markdown]
# # 8. A fifth architecture
#
# One idea: **an architecture is one file: its rows, the forward that fires them, and how it fills the one recurrence.
# Everything else follows.** We walk through `fifth/hgrn.py`, which adds HGRN (Qin, Yang and Zhong 2023, arXiv 2311.04823),
# a recurrence whose forget gate has a floor that rises from layer to layer:
#
#     decay = bound + (1 - bound) sigmoid(f)      state_t = decay_t state_{t-1} + (1 - decay_t) u_t      u = SiLU(x)
#
# The code in this text is quoted from that file; a test sees to it that it stays so.

# %% [markdown]
# ## Rows
#
# A hook point is a row: its name, its axes, its equation in the words of other rows and of your parameters, and where the
# equation comes from. Use the shared words for the shared roles (`hook_x`, `hook_u`, `hook_decay`, `hook_scan`, ...) and
# your own for the rest, in the order in which they fire. The last `True` makes a row lazy: built only when somebody listens.
#
# ```python
#     Point("hook_log_decay", "batch pos channel", "log(bound + (1 - bound) * sigmoid(forget_pre))", GATES),
#     Point("hook_state_start", "batch channel", "state before the first position (zero without one)", HGRU, True),
#     Point("hook_decay", "batch pos channel", "exp(log_decay)", HGRU, True),
#     Point("hook_write", "batch pos channel", "(1 - exp(log_decay)) * u", HGRU, True),
#     Point("hook_state", "batch pos channel", "decay * state[pos - 1] + write", HGRU, True),
#     Point("hook_scan", "batch pos channel", "state", HGRU),
# ```
#
# The residual stream, the norms and the channel mixer come from functions: `mlp_residual_rows`, `norm_rows`.

# %% [markdown]
# ## The recurrence
#
# One function gives decay, write and read for any slice of positions. `Mixer.recur` runs it in segments, forward and
# backward, and fires the four lazy points.
#
# ```python
# def hgrn_terms(log_decay: Tensor, u: Tensor) -> tuple[Tensor, Tensor, None]:
#     """decay, write = (1 - decay) u, read = 1 (the state itself), for any slice of positions."""
#     return torch.exp(log_decay), -torch.expm1(log_decay) * u, None
# ```

# %% [markdown]
# ## The open forward
#
# Written as the paper writes it, over parameters that stay where they are (`w`, which is `self.weights`). What is not in the
# paper: `run.start` takes the state that the call before left, `run.leave` hands on the last one, and `pad.zero` makes a
# masked position a step that changes nothing.
#
# ```python
#         x = self.hook_x(pad.zero(w.i_proj(n)))
#         f = self.hook_forget_pre(w.f_proj(n))
#         z = self.hook_gate_pre(w.g_proj(n))
#         u = pad.zero(self.hook_u(F.silu(x)))
#         # log decay 0 at a masked position: decay is 1 and write 0, the state passes unchanged
#         log_decay = self.hook_log_decay(pad.zero(self.bound.log_decay(at_least_float32(f))))
#         log_decay = pad.zero(log_decay)  # whatever a hook did there
#
#         wide = at_least_float32(u)
#         start = run.start("scan", self.layer, (u.shape[0], u.shape[2]), wide)
#         scan, last = self.recur(hgrn_terms, (log_decay, wide), (), start, pad)
#         run.leave("scan", self.layer, last)
#
#         y = self.hook_y(self.hook_scan(scan.to(u.dtype)))
#         gate = self.hook_gate(F.silu(z))
#         return w.out_proj(self.hook_gated(y * gate))
# ```

# %% [markdown]
# ## The implicit attention
#
# `factors` says which cached points are the gate, the scan and the activation of `A x + r`. A factor that you do not have
# (HGRN has no convolution and no skip) you leave out. `time` is the running sum of log decays, in float64.
#
# ```python
#         x, log_decay, gate, o = (padding.pack(at_least_float32(cached(name))) for name in self.attention_points)
#         one = x.new_ones(*x.shape[:2], 1)
#         rate = x.new_ones(x.shape[2], 1)
#         return Factors(
#             x=x,
#             o=o,
#             scan=DecayScan(log_decay.double().cumsum(1), rate, read=one, amount=-torch.expm1(log_decay), key=one),
#             gate=gate,
#             act=torch.sigmoid(x),
#             start=None if state is None else state["scan", self.layer].to(x).unsqueeze(-1),
#         )
# ```

# %% [markdown]
# ## The class
#
# `HookedHGRN` subclasses `HookedLanguageModel` and says where things are in your module: `describe` (the sizes),
# `make_block`, `make_final_norm`, `embedding`, `unembedding`, and `tiny` for tests. `wraps = ("HGRN",)` is the name of the
# class that `gl.wrap` hands over. One call makes it known (a package of yours can name it under the entry point group
# `gatedlens.architectures` instead):

# %%
import sys
from pathlib import Path

import torch

import gatedlens as gl
from gatedlens import catalogue
from gatedlens.hooks import architectures

sys.path.append(str(Path(globals().get("__file__", "here")).resolve().parent / "fifth"))
from hgrn import HGRN, HookedHGRN

gl.register(HookedHGRN)
print(list(architectures()))

# %% [markdown]
# ## What follows from it
#
# A module of our own becomes a hooked model; here is the table of the points of one block.

# %%
torch.manual_seed(0)
sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 8, "intermediate_size": 32}
model = gl.wrap(HGRN(sizes))
print(model.hook_table(layer=1))

# %% [markdown]
# Gradients flow to its parameters, so it can be trained as it is. The task: tokens 0 to 3 are values, 4 to 7 noise; say the
# last value. A gated recurrence should learn to forget at values and to keep through noise.


# %%
def latch(n, seed, length=16):
    """(tokens, the last value, its position)"""
    generator = torch.Generator().manual_seed(seed)
    is_value = torch.rand(n, length, generator=generator) < 0.2
    is_value[:, 0], is_value[:, -1] = True, False
    values, noise = torch.randint(4, (2, n, length), generator=generator)
    tokens = torch.where(is_value, values, noise + 4)
    place = (is_value * torch.arange(length)).amax(1)
    return tokens, tokens[torch.arange(n), place], place


optimiser = torch.optim.AdamW(model.wrapped.parameters(), lr=1e-2)
for step in range(200):
    tokens, answers, _ = latch(64, seed=step)
    loss = torch.nn.functional.cross_entropy(model(tokens)[:, -1], answers)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

# %%
torch.set_grad_enabled(False)
tokens, answers, place = latch(1000, seed=10**6)
logits, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
print(f"right: {(logits[:, -1].argmax(-1) == answers).float().mean():.1%}")
decay = cache["decay", 1]
print(f"layer 1 keeps {decay[tokens < 4].mean():.2f} of its state at values, {decay[tokens >= 4].mean():.2f} at noise")
assert decay[tokens < 4].mean() < decay[tokens >= 4].mean()

# %% [markdown]
# Its implicit attention is exact, and the last position (itself left out) mostly reads the last value.

# %%
attention = gl.implicit_attention(cache, layer=1)
row = attention.row(-1).abs().mean(1)
print(attention.check())
print(f"the strongest source is the last value: {(row[:, :-1].argmax(-1) == place).float().mean():.1%}")
assert attention.check().relative < 1e-5 and (row[:, :-1].argmax(-1) == place).float().mean() > 0.5

# %% [markdown]
# An edit of the write propagates: without what the last value wrote, in both layers, the answer is little better than a
# guess among four.


# %%
def forget(write, hook):
    write[torch.arange(len(write)), place] = 0


cut = model.run_with_hooks(tokens, fwd_hooks=[("blocks.*.mixer.hook_write", forget)])
print(f"right without it: {(cut[:, -1].argmax(-1) == answers).float().mean():.1%}")
assert (cut[:, -1].argmax(-1) == answers).float().mean() < 0.6

# %% [markdown]
# State, generation and the catalogue's page with its diagram came along. `tests/test_fifth.py` runs every general test of
# the project on this file: edits and gradients exact at every point, padding, state at every split, nnsight.

# %%
whole = model(tokens)
first, state = model(tokens[:, :9], return_state=True)
print("continued from a state:", torch.allclose(model(tokens[:, 9:], state=state), whole[:, 9:], atol=1e-4))
print("generated:", model.generate(tokens[:1], max_new_tokens=4, temperature=0, verbose=False)[0, -4:].tolist())
print(catalogue.page("hgrn", type(model))[:700])
