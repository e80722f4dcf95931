# %% [markdown]
# # 9. The activation store: a probe and a sparse autoencoder on a whole corpus
#
# One idea: **run the model over the corpus once, then work on what it left.** A store is a folder that is read lazily, that
# can be gone on with after any interruption, and whose values are those of `run_with_cache`, to the bit. We ask two
# questions of a Mamba that has read Moby-Dick byte by byte: what does its state remember, and into which parts does its
# output fall apart?

# %%
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import gatedlens as gl
from gatedlens import store as gl_store

torch.manual_seed(0)
torch.set_num_threads(1)
folder = Path(tempfile.mkdtemp())
model = gl.from_pretrained("gatedlens/mamba-moby", device="cpu")
train, held_out = gl.data.text()

# %% [markdown]
# ## Harvest
#
# First what it would take: a state is large. So it gets its own, smaller harvest. The same call again, after a crash or a
# power cut, goes on where it stopped; `gatedlens harvest` does it from a shell.

# %%
print(gl_store.estimate(model, train, "blocks.*.mixer.hook_state", folder, context=128))
options = {"context": 128, "batch_size": 16, "progress": False}
states = gl_store.harvest(
    model, train, "blocks.1.mixer.hook_state", folder / "states", max_tokens=12_800, dtype="float16", **options
)
outputs = gl_store.harvest(model, train, "blocks.1.mixer.hook_gated", folder / "outputs", max_tokens=51_200, **options)
print(states, outputs, sep="\n")
print(outputs["gated", 1][7].shape, outputs["gated", 1][7, -1].shape, repr(model.to_string(outputs.tokens(7)[:30])))

# %% [markdown]
# ## A probe of the state
#
# Does the state remember how the word began? The label of each byte: whether the word that it is in has a capital first
# letter, which may be many bytes ago. A label is a function of the sample's tokens.


# %%
def in_capitalised_word(ids):
    """For each byte: the first letter of its word is a capital (of a word that began before the row, we know nothing)."""
    letters = ((ids >= 65) & (ids <= 90)) | ((ids >= 97) & (ids <= 122))
    begins = letters & ~F.pad(letters[:-1], (1, 0))
    first = torch.cummax(torch.where(begins, torch.arange(len(ids)), 0), 0).values  # where the last word began
    inside = letters & ~begins  # the first letter itself would be too easy
    return torch.where(inside, ((ids[first] >= 65) & (ids[first] <= 90)).long(), -1)


def probe(store, key, steps=200):
    """Balanced accuracy, on the last fifth, of a linear probe trained on the first four fifths."""
    loader = store.with_labels(in_capitalised_word).loader(key, batch_size=2048)
    pairs = [(x.flatten(1).float(), y) for x, y in loader]
    x, y = (torch.cat(side) for side in zip(*pairs, strict=True))
    x, y = x[y >= 0], y[y >= 0]
    x = (x - x.mean(0)) / (x.std(0) + 1e-3)
    cut = int(0.8 * len(x))
    weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.01)
    balance = torch.where(y == 1, 0.5 / (y == 1).float().mean(), 0.5 / (y == 0).float().mean())
    for step in range(steps):
        some = torch.arange(step * 512, (step + 1) * 512) % cut
        loss = F.binary_cross_entropy_with_logits(x[some] @ weight + bias, y[some].float(), balance[some])
        optimizer.zero_grad()
        (loss + 1e-3 * weight.square().sum()).backward()
        optimizer.step()
    right = ((x[cut:] @ weight + bias > 0) == y[cut:].bool()).float()
    return torch.stack([right[y[cut:] == label].mean() for label in (0, 1)]).mean().item()


remembered = probe(states, ("state", 1))
print(f"the state tells how its word began in {remembered:.0%} of the cases, chance is 50%")
print(f"what the layer puts out at that byte: {probe(outputs, ('gated', 1)):.0%}")
assert remembered > 0.7

# %% [markdown]
# ## A sparse autoencoder of the output
#
# A TopK autoencoder (Gao et al. 2024): 16 of 640 directions for each token. The loader shuffles over the whole store.


# %%
class Autoencoder(torch.nn.Module):
    """x ~ decoder(top k of encoder(x - b)) + b"""

    def __init__(self, d: int, width: int, k: int, mean: torch.Tensor):
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(d, width), torch.nn.Linear(width, d, bias=False)
        self.b, self.k = torch.nn.Parameter(mean), k
        with torch.no_grad():
            self.decoder.weight /= self.decoder.weight.norm(dim=0)
            self.encoder.weight.copy_(self.decoder.weight.T)

    def features(self, x):
        pre = self.encoder(x - self.b)
        top = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())

    def forward(self, x):
        return self.decoder(self.features(x)) + self.b


statistics = gl_store.harvest(
    model, train, "blocks.1.mixer.hook_gated", folder / "statistics", max_tokens=51_200, reduce=["mean", "variance"], **options
).statistics["gated", 1]
variance = statistics["variance"].sum().item()
sae = Autoencoder(160, 640, 16, statistics["mean"].float())
optimizer = torch.optim.Adam(sae.parameters(), lr=2e-3)
for epoch in range(6):
    for x in outputs.loader(("gated", 1), batch_size=512, shuffle=True, seed=epoch):
        loss = (sae(x) - x).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: {1 - loss.item() / variance:.1%} of the variance explained")

# %% [markdown]
# ## Spliced back in
#
# What counts is whether the model still works with the reconstruction in place of its own output: the *loss recovered* is
# the share of the damage of a zero ablation that the autoencoder avoids, on text that neither has seen.

# %%
tokens = held_out[: 40 * 128].view(40, 128)


@torch.no_grad()
def loss_with(hook=None):
    hooks = [] if hook is None else [("blocks.1.mixer.hook_gated", hook)]
    return model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="loss").item()


clean, spliced = loss_with(), loss_with(lambda x, hook: sae(x))
zero = loss_with(lambda x, hook: torch.zeros_like(x))
recovered = (zero - spliced) / (zero - clean)
print(f"loss: {clean:.3f} as it is, {spliced:.3f} spliced, {zero:.3f} ablated: {recovered:.1%} recovered")
assert recovered > 0.8

# %% [markdown]
# Which text makes a direction fire most? The store has the tokens beside the activations.

# %%
with torch.no_grad():
    fires = torch.stack([sae.features(x) for x in outputs["gated", 1]])  # sample pos feature
often = (fires > 0).float().mean((0, 1))
for feature in often.argsort(descending=True)[20:24].tolist():
    best = fires[..., feature].flatten().topk(4).indices
    shown = [model.to_string(outputs.tokens(i // 128)[max(0, i % 128 - 12) : i % 128 + 1]) for i in best.tolist()]
    print(f"feature {feature} fires at {often[feature]:.1%} of the bytes, most behind {shown}")
