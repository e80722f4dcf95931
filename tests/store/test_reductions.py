"""Statistics equal those of all entries at once, far from zero too, whatever the batches, and merge in any way."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import store as gl_store
from gatedlens.store.statistics import REDUCTIONS, by_name, sample
from tests.helpers import example

MOMENTS = ["mean", "variance", "kurtosis", "max", "covariance", "second_moment"]


def literal(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each statistic of [n, d] from its definition."""
    mean = x.mean(0)
    centred = x - mean
    return {
        "mean": mean,
        "variance": (centred**2).mean(0),
        "kurtosis": (centred**4).mean(0) / (centred**2).mean(0) ** 2,
        "max": x.amax(0),
        "covariance": torch.stack([torch.stack([(a * b).mean() for b in centred.T]) for a in centred.T]),
        "second_moment": torch.stack([torch.stack([(a * b).mean() for b in x.T]) for a in x.T]),
    }


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("sizes", [(100,), (1, 99), (30, 30, 40), (1,) * 100])
def test_merged_parts_are_the_whole(offset, sizes):
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.tensor([1.0, 0.1, 5.0]) + x.roll(1, 1) ** 2 + offset
    wanted = literal(x)
    for name in MOMENTS:
        reduction, first, total = REDUCTIONS[name], 0, None
        for size in sizes:
            part = reduction.of(x[first : first + size], first)
            total = part if total is None else reduction.merge(total, part)
            first += size
        # a deviation of 1 around 1e6 has ten digits left in float64
        assert torch.allclose(reduction.result(total), wanted[name], rtol=1e-10 if offset == 0 else 1e-7), name


def test_naive_sums_of_squares_would_fail_here():
    x = 1e9 + torch.arange(1000.0, dtype=torch.float64).remainder(2)
    part = REDUCTIONS["variance"].of(x[:500].unsqueeze(1), 0)
    part = REDUCTIONS["variance"].merge(part, REDUCTIONS["variance"].of(x[500:].unsqueeze(1), 500))
    assert REDUCTIONS["variance"].result(part).item() == pytest.approx(0.25, rel=1e-6)
    assert abs((x**2).mean() - x.mean() ** 2 - 0.25) > 1


def test_maximum_remembers_where():
    x = torch.tensor([[1.0, 5.0], [7.0, 2.0], [3.0, 9.0]])
    reduction = REDUCTIONS["max"]
    part = reduction.merge(reduction.of(x[:2], 0), reduction.of(x[2:], 2))
    assert part["max"].tolist() == [7, 9] and part["at"].tolist() == [1, 2]


def test_a_sample_is_even_and_does_not_depend_on_the_batches():
    x = torch.arange(1000.0).unsqueeze(1)
    reduction = sample(50, seed=1)
    whole = reduction.of(x, 0)
    for size in (1, 7, 300):
        total = None
        for first in range(0, 1000, size):
            part = reduction.of(x[first : first + size], first)
            total = part if total is None else reduction.merge(total, part)
        assert all(torch.equal(total[name], whole[name]) for name in whole)
    assert whole["values"].unique().numel() == 50 and torch.equal(whole["values"][:, 0], whole["at"].float())
    drawn = torch.cat([sample(50, seed=seed).of(x, 0)["at"] for seed in range(400)])
    counts = torch.bincount(drawn, minlength=1000).double()  # each entry: binomial(400, 1 / 20), mean 20, deviation 4.4
    assert counts.sum() == 20_000 and abs(counts.std() - (400 * 0.05 * 0.95) ** 0.5) < 0.5
    assert abs(counts[:500].sum() - 10_000) < 500 and counts.max() < 45
    with pytest.raises(gl.InputError, match="Give each its own seed"):
        sample(5).merge(sample(5).of(x, 0), sample(5).of(x, 0))


@torch.no_grad()
def test_harvested_statistics_are_those_of_the_activations(model, tmp_path):
    data = example(model, 6)
    names = ["blocks.0.hook_mixer_out", *[n for n in model.names if n.endswith("hook_state") and "blocks.1" in n]]
    store = gl_store.harvest(
        model, data, names, tmp_path, batch_size=4, reduce=[*MOMENTS[:4], sample(5)], progress=False
    )
    caches = [
        model.run_with_cache(part, names_filter=names)[1] for part in data.split(4)
    ]  # as it was harvested, to the bit
    for name in names:
        entries = torch.cat([cache[name] for cache in caches]).flatten(0, 1)
        found, flat = store.statistics[name], entries.flatten(1)
        wanted = literal(flat[:, :8])
        for reduction in MOMENTS[:4]:
            assert torch.allclose(found[reduction].flatten()[:8], wanted[reduction], rtol=1e-9), (name, reduction)
        assert found["mean"].shape == entries.shape[1:] and len(found["sample(5, seed=0)"]) == 5
        assert all((row == entries).flatten(1).all(1).any() for row in found["sample(5, seed=0)"])
    assert list(store.statistics) == store.names and store.verify() == []
    with pytest.raises(gl.InputError, match="holds statistics and no activations"):
        store[names[0]]


def test_statistics_of_two_corpora_merge(tmp_path):
    model = gl.HookedMamba.tiny(dtype=torch.float64)
    data, name = example(model, 8), "blocks.0.mixer.hook_gated"
    parts = [
        gl_store.harvest(model, half, name, tmp_path / str(i), reduce=["kurtosis", "covariance"], progress=False)
        for i, half in enumerate((data[:3], data[3:]))
    ]
    whole = gl_store.harvest(model, data, name, tmp_path / "w", reduce=["kurtosis", "covariance"], progress=False)
    merged = parts[0].statistics.merge(parts[1].statistics)
    for reduction, value in whole.statistics[name].items():
        assert torch.allclose(merged["gated", 0][reduction], value, rtol=1e-9)
    other = gl_store.harvest(model, data, name, tmp_path / "o", reduce="mean", progress=False)
    with pytest.raises(gl.InputError, match="only one of them holds"):
        merged.merge(other.statistics)


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        ("men", "Did you mean 'mean'"),
        (5, "reduce=5: it is mean"),
        ("sample(0)", "at least 1"),
        (["mean", "median"], "reduce='median': it is mean"),
    ],
)
def test_mistakes(reduce, message, tmp_path):
    with pytest.raises(gl.InputError, match=message):
        gl_store.harvest(gl.HookedMamba.tiny(), [[1]], "blocks.0.hook_mixer_out", tmp_path, reduce=reduce)
    assert by_name("sample(7, seed=2)").name == "sample(7, seed=2)" and by_name("sample").name == sample(1024).name
