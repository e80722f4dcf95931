# %% [markdown]
# # 7. Attribution in images: which patches make it a 3?
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/7-attribution-vision.ipynb)
#
# One idea: **delete what the explanation calls important, and watch the prediction.** If it was important, the class is gone
# after a few patches; deleting what was called unimportant changes nothing. That test (perturbation, in both directions) needs
# no known truth, is how the papers rank methods, and takes ten lines.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import torch

import gatedlens as gl

torch.set_grad_enabled(False)
model = gl.from_pretrained("gatedlens/vim-digits")
images, labels = gl.data.digits()["test"]
one = images[(labels == 3).nonzero()[0]]  # [1, 1, 8, 8]
found = gl.attribution.occlusion(model, one, progress=False)
print(found)  # a score for each patch: 4 x 4 patches of 2 x 2 pixels
assert found.target == [3] and found.shape == (1, 4, 4)
found.plot().savefig("7-one.png", dpi=120, bbox_inches="tight")

# %% [markdown]
# ## Another class
#
# `target` is any class, so one image can be asked about several. Against what a 3 might have been, ask for a difference:
# red patches make it a 3 and no 8; blue ones speak for the 8. (`found.plot()` lays a map over the image; side by side on
# images as small as these, maps with an outline are easier to read.)


# %%
def draw(ax, scores, image, title=""):
    """A map, red for and blue against, with the outline of the ink."""
    bound = scores.abs().max()
    ax.imshow(scores, cmap="RdBu_r", vmin=-bound, vmax=bound, extent=(-0.5, 7.5, 7.5, -0.5))
    ax.contour(image[0], levels=[-0.1], colors="black", linewidths=0.9, linestyles="solid")
    ax.set_title(title, fontsize=10)
    ax.set_axis_off()


three, eight, both = (gl.attribution.occlusion(model, one, t, progress=False) for t in (3, 8, (3, 8)))
assert torch.allclose(both.scores, three.scores - eight.scores, atol=1e-4), "occlusion is linear in the target"
figure, axes = gl.plot.panels(1, 4, size=3.0)
gl.plot.image(one[0], "the image", ax=axes[0][0])
for ax, (title, shown) in zip(axes[0][1:], {"for 3": three, "for 8": eight, "for 3, not 8": both}.items(), strict=True):
    draw(ax, shown.scores[0], one[0], title)
figure.suptitle("What each patch costs when it is made black (vim-digits)")
figure.savefig("7-classes.png", dpi=120, bbox_inches="tight")

# %% [markdown]
# ## Maps by several methods
#
# `mode="official"` does what the papers' code does, which is not what their formulas say: the gradient's largest positive
# channel instead of the mean, min-max steps, and only layers from 15/24 of the depth on. Both are here, and they differ.

# %%
METHODS = {
    "occlusion": ("occlusion", {"progress": False}),
    "integrated gradients": ("integrated_gradients", {"n_steps": 20}),
    "lrp": ("lrp", {}),
    "secant": ("secant", {}),
    "raw attention": ("raw_attention", {}),
    "raw attention, abs": ("raw_attention", {"sign": "abs"}),
    "gradient attention": ("gradient_attention", {}),
    "gradient attention, official": ("gradient_attention", {"mode": "official"}),
    "random": ("random", {}),
}
few = 80
x = images[:few]
said = {name: gl.attribution.method(m)(model, x, **options) for name, (m, options) in METHODS.items()}
shown = [(labels[:few] == digit).nonzero()[0].item() for digit in (0, 2, 3, 7)]
figure, axes = gl.plot.panels(len(shown), 1 + len(said), size=2.2)
for row, at in zip(axes, shown, strict=True):
    gl.plot.image(x[at], "image" if at == shown[0] else "", ax=row[0])
    for ax, (name, attribution) in zip(row[1:], said.items(), strict=True):
        draw(ax, attribution.scores[at], x[at], name.replace(" ", "\n", 1) if at == shown[0] else "")
figure.suptitle("Which patches make it what it is? (vim-digits; each map on its own scale)")
figure.savefig("7-maps.png", dpi=120, bbox_inches="tight")
official, paper = said["gradient attention, official"], said["gradient attention"]
print("layers:", paper.layers, "in the formulas,", official.layers, "in the code")
assert official.layers == (1, 2) and not torch.allclose(official.scores, paper.scores)

# %% [markdown]
# ## The test
#
# Make 10, 20, ... 90 % of the patches black, most relevant first (positive: a good method makes the class go *soon*) or last
# (negative: a good method keeps it *long*), and count how often the prediction stays.

# %%
predicted = model(x).argmax(-1)
steps = [share / 10 for share in range(1, 10)]


def blackened(scores, share, first):
    """The images without the `share` of patches that score most (first=True) or least."""
    flat = scores.flatten(1)
    gone = flat.argsort(dim=1, descending=first, stable=True)[:, : round(share * flat.shape[1])]
    kept = torch.ones_like(flat).scatter(1, gone, 0).reshape(scores.shape)
    pixels = kept.repeat_interleave(2, 1).repeat_interleave(2, 2).unsqueeze(1)  # a patch is 2 x 2
    return torch.where(pixels > 0, x, -1.0)  # black is -1


def curve(scores, first):
    """How often the prediction stays, at each step."""
    return [(model(blackened(scores, s, first)).argmax(-1) == predicted).double().mean().item() for s in steps]


curves = {name: (curve(one.scores, True), curve(one.scores, False)) for name, one in said.items()}
mean = {name: [sum(values) / len(steps) for values in pair] for name, pair in curves.items()}
print(f"{'stays, mean over steps':30} positive  negative")
for name, (positive, negative) in sorted(mean.items(), key=lambda item: item[1][0] - item[1][1]):
    print(f"{name:30} {positive:8.2f}  {negative:8.2f}")

figure, axes = gl.plot.panels(1, 2, size=5.0)
colours = ["#b2182b", "#ef8a62", "#2166ac", "#762a83", "#999999", "#555555", "#a6dba0", "#1b7837", "black"]
for ax, side, title in zip(
    axes[0], (0, 1), ("positive: most relevant first", "negative: least relevant first"), strict=True
):
    for (name, pair), colour in zip(curves.items(), colours, strict=True):
        ax.plot([100 * s for s in steps], pair[side], label=name, color=colour, ls=":" if name == "random" else "-")
    ax.set(title=title, xlabel="% of patches made black", ylabel="predictions that stay", ylim=(0, 1.03))
axes[0][0].legend(fontsize=7)
figure.suptitle(f"Perturbation of {few} digits (vim-digits)")
figure.savefig("7-perturbation.png", dpi=120, bbox_inches="tight")

# %% [markdown]
# ## What it shows, and what not
#
# Occlusion, integrated gradients and secant are far ahead of the rest: they compare with black, and the test puts black in
# (a test that favours its own kind). Occlusion takes 17 forwards for it, integrated gradients 20 forwards and backwards,
# secant two forwards and one backward: of the black image it knows the one run. Of the others, lrp and the official gradient
# attention are clearly better than chance; raw attention without signs beats its signed mean, which is no better than
# chance: in this model it shows where layers look, whatever the class. The order may differ in a model of 24 layers and 196
# patches: run it there.

# %%
chance = mean["random"]
for name in ("occlusion", "integrated gradients", "secant", "lrp", "gradient attention, official"):
    assert mean[name][0] < chance[0] - 0.05 and mean[name][1] > chance[1] + 0.05, name
assert mean["raw attention, abs"][0] < mean["raw attention"][0]
assert all(
    mean["occlusion"][0] < positive
    for name, (positive, _) in mean.items()
    if name not in ("occlusion", "integrated gradients", "secant")
)

# %% [markdown]
# ## Does it look at the ink?
#
# A digit's segmentation is exact: ink is where pixels are bright. But a good explanation is no ink detector: where there is
# none also tells a 3 from an 8. Occlusion, the most faithful map of these, follows the ink only in part.

# %%
ink = ((x + 1) / 2).squeeze(1).unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4))  # share of white in each patch
for name in ("occlusion", "lrp", "gradient attention, official", "random"):
    pairs = zip(said[name].scores.flatten(1).cpu(), ink.flatten(1), strict=True)
    follows = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).nanmean().item()
    print(f"{name:30} correlation with the ink {follows:+.2f}")
    assert name != "occlusion" or 0.3 < follows < 0.8

# %% [markdown]
# An image of your own goes in as PIL (`model.preprocess` is applied) or as a tensor as the model reads it.
# `found.plot(row=3)` draws row 3 of a batch; `gl.plot.over_image(scores, image, model.grid)` draws any map.
