# %% [markdown]
# # 9. The activation store: a probe and a sparse autoencoder on a whole corpus
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/9-activation-store.ipynb)
#
# One idea: **run the model over the corpus once, then work on what it left.** A store is a folder that is read lazily, that
# can be gone on with after any interruption, and whose values are those of `run_with_cache`, to the bit. We ask two
# questions of a Mamba that has read Moby-Dick byte by byte: what does its state remember, and into which parts does its
# output fall apart?

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import gatedlens as gl
from gatedlens import store

torch.manual_seed(0)
torch.set_num_threads(1)
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
model = gl.from_pretrained("gatedlens/mamba-moby", device="cpu")
train, held_out = gl.data.text()

# %% [markdown]
# ## Harvest
#
# First what it would take: a state is large. So it gets its own, smaller harvest. The same call again, after a crash or a
# power cut, goes on where it stopped; `gatedlens harvest` does it from a shell.

# %%
print(store.estimate(model, train, "blocks.*.mixer.hook_state", folder, context=128))
options = {"context": 128, "batch_size": 16, "progress": False}
states = store.harvest(
    model, train, "blocks.1.mixer.hook_state", folder / "states", max_tokens=12_800, dtype="float16", **options
)
outputs = store.harvest(model, train, "blocks.1.mixer.hook_gated", folder / "outputs", max_tokens=51_200, **options)
print(states, outputs, sep="\n")
print(outputs["gated", 1][7].shape, outputs["gated", 1][7, -1].shape, repr(model.to_string(outputs.tokens(7)[:30])))

# %% [markdown]
# ## A probe of the state
#
# Does the state remember how a word began, three letters on? The label of a byte: whether the word that it is in has a
# capital first letter; -1 where the byte is not at least the fourth letter of a word. A label may be a function of the
# sample's tokens. The probe is a ridge regression on labels +-1, both classes weighing the same, solved in closed form.


# %%
def begins_with_a_capital(ids):
    letter = ((ids >= 65) & (ids <= 90)) | ((ids >= 97) & (ids <= 122))
    begins = letter & ~F.pad(letter[:-1], (1, 0))
    place = torch.arange(len(ids))
    first = torch.cummax(torch.where(begins, place, 0), 0).values  # where the last word began
    capital = (ids[first] >= 65) & (ids[first] <= 90)
    return torch.where(letter & (place >= first + 3) & (first > 0), capital.long(), -1)


def probe(held, key, ridge=0.1):
    """Balanced accuracy, on the last fifth, of a linear probe fitted to the first four fifths."""
    pairs = list(held.with_labels(begins_with_a_capital).loader(key, batch_size=2048))
    x, y = (torch.cat(side) for side in zip(*pairs, strict=True))
    x, y = x[y >= 0].flatten(1).float(), y[y >= 0]
    cut = int(0.8 * len(x))
    x = (x - x[:cut].mean(0)) / (x[:cut].std(0) + 1e-3)
    x = F.pad(x, (0, 1), value=1.0)
    share = torch.where(y == 1, (y[:cut] == 1).float().mean(), (y[:cut] == 0).float().mean())[:cut, None]
    weighed = x[:cut] / share
    weight = torch.linalg.solve(
        weighed.T @ x[:cut] + ridge * cut * torch.eye(x.shape[1]), weighed.T @ (2.0 * y[:cut] - 1)
    )
    right = (x[cut:] @ weight > 0) == (y[cut:] == 1)
    return (right[y[cut:] == 1].float().mean() + right[y[cut:] == 0].float().mean()).item() / 2


state_tells, output_tells = probe(states, ("state", 1)), probe(outputs, ("gated", 1))
print(f"the state tells how the word began in {state_tells:.0%} of the cases (chance is 50%)")
print(f"what the layer puts out at that byte tells it in {output_tells:.0%}: it remembers more than it shows")
assert state_tells > 0.85 > output_tells

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


def train_autoencoder(held, name, mean, variance, epochs=6):
    """A TopK autoencoder of one point of a store; the variance explained is that of the last batch of an epoch."""
    sae = Autoencoder(len(mean), 640, 16, mean.float())
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-3)
    for epoch in range(epochs):
        for x in held.loader(name, batch_size=512, shuffle=True, seed=epoch):
            loss = (sae(x) - x).square().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"{name}, epoch {epoch}: {1 - loss.item() / variance.sum().item():.1%} of the variance explained")
    return sae


name, options = "blocks.1.mixer.hook_gated", {**options, "max_tokens": 51_200}
statistics = store.harvest(model, train, name, folder / "statistics", reduce=["mean", "variance"], **options).statistics
sae = train_autoencoder(outputs, name, **statistics[name])

# %% [markdown]
# ## Spliced back in
#
# What counts is whether the model still works with the reconstruction in place of its own output: the *loss recovered* is
# the share of the damage of a zero ablation that the autoencoder avoids, on text that neither has seen.

# %%
tokens = held_out[: 40 * 128].view(40, 128)


@torch.no_grad()
def loss_recovered(model, name, sae):
    def loss_with(hook):
        return model.run_with_hooks(tokens, fwd_hooks=[(name, hook)], return_type="loss").item()

    clean, spliced = loss_with(lambda x, hook: x), loss_with(lambda x, hook: sae(x))
    zero = loss_with(lambda x, hook: torch.zeros_like(x))
    share = (zero - spliced) / (zero - clean)
    print(f"{name}: loss {clean:.3f} as it is, {spliced:.3f} spliced, {zero:.3f} ablated: {share:.1%} recovered")
    return share


assert loss_recovered(model, name, sae) > 0.8

# %% [markdown]
# ## A sparse autoencoder of a state
#
# The same of what a layer remembers. Griffin's recurrent layers have no way round their state, so all they do goes through
# it. An edit of `hook_state` changes what is read from the state at that position and not how it goes on, so splicing at
# every position replaces each reading, and the recurrence beneath stays the model's own.

# %%
griffin = gl.from_pretrained("gatedlens/griffin-moby", device="cpu")
name = "blocks.0.mixer.hook_state"
remembered = store.harvest(griffin, train, name, folder / "griffin", **options)
statistics = store.harvest(
    griffin, train, name, folder / "of-griffin", reduce=["mean", "variance"], **options
).statistics
of_state = train_autoencoder(remembered, name, **statistics[name])
assert loss_recovered(griffin, name, of_state) > 0.8

# %% [markdown]
# ## What the directions are
#
# Which text makes a direction of the output fire most? The store has the tokens beside the activations.

# %%
with torch.no_grad():
    fires = torch.stack([sae.features(x) for x in outputs["gated", 1]])  # sample pos feature
often = (fires > 0).float().mean((0, 1))
for feature in often.argsort(descending=True)[20:24].tolist():
    best = fires[..., feature].flatten().topk(4).indices
    shown = [model.to_string(outputs.tokens(i // 128)[max(0, i % 128 - 12) : i % 128 + 1]) for i in best.tolist()]
    print(f"feature {feature} fires at {often[feature]:.1%} of the bytes, most behind {shown}")
