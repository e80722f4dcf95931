"""Blocks as data: branches one after the other and in parallel, a norm behind a branch, and what is derived of them."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.address.point import block_rows
from gatedlens.hooks.mamba import MIXER_ROWS, HookedMamba, MambaMixer
from gatedlens.model import Block, Norm, NormOfNarrow, Sub, SubRows, norm_rows, residual_rows, rows_of
from tests.helpers import relative

TOKENS = torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(0))


def sub_rows(name: str, ln: str) -> SubRows:
    return SubRows(name, block_rows(name, MIXER_ROWS), "out_proj(gated)", norm_rows(ln, f"{name}_in", "here"))


ROWS = residual_rows(
    (sub_rows("mixer", "ln1"), sub_rows("other", "ln2")),
    SubRows("third", block_rows("third", MIXER_ROWS), "post", after=norm_rows("ln3_post", "third.out", "here")),
)


class Twin(HookedMamba):
    """Two mixers side by side in every block, the second at half its size, and a third with a norm behind it, none before."""

    block_points, aliases, views = ROWS, (), ()

    def make_block(self, layer):
        w = self.wrapped.backbone.layers[layer]
        mixers = {name: MambaMixer(w.mixer, rows_of(name, ROWS), layer) for name in ("mixer", "other", "third")}
        ln1, ln2 = (NormOfNarrow(w.norm, rows_of(ln, ROWS), 1e-5) for ln in ("ln1", "ln2"))
        after = Norm(w.norm, rows_of("ln3_post", ROWS), 1e-5)
        return Block(
            w,
            ROWS,
            (Sub("mixer", mixers["mixer"], ln1), Sub("other", mixers["other"], ln2, ln="ln2", scale=0.5)),
            Sub("third", mixers["third"], after=after, after_ln="ln3_post"),
        )


@pytest.fixture(scope="module")
def plain():
    return HookedMamba.tiny(dtype=torch.float64)


@pytest.fixture(scope="module")
def twin(plain):
    return Twin(plain.wrapped)


@torch.no_grad()
def test_the_forward_is_the_sum_of_its_branches(plain, twin):
    cache = twin.run_with_cache(TOKENS, names_filter=lambda name: True)[1]
    assert list(cache.keys()) == list(twin.names)  # in firing order
    for layer, block in enumerate(plain.blocks):
        stem = f"blocks.{layer}.hook_"
        mixed = block.mixer(block.ln1(cache[stem + "resid_pre"]), plain.begin(plain.prepare(TOKENS)[0], None, False))
        assert relative(cache[stem + "mixer_out"], mixed) < 1e-12
        assert relative(cache[stem + "other_out"], 0.5 * mixed) < 1e-12
        mid = cache[stem + "resid_pre"] + 1.5 * mixed
        assert relative(cache[stem + "resid_mid"], mid) < 1e-12
        third = block.ln1(block.mixer(mid, plain.begin(plain.prepare(TOKENS)[0], None, False)))
        assert relative(cache[stem + "third_out"], third) < 1e-12
        assert relative(cache[stem + "resid_post"], mid + third) < 1e-12
    assert twin.names.points["blocks.0.hook_resid_mid"].equation == "resid_pre + mixer_out + other_out"
    assert twin.names.points["blocks.1.hook_third_in"].equation == "resid_mid (a copy: edits reach the third only)"


def test_the_residual_graph_knows_which_branches_are_parallel(twin):
    assert twin.names.branches(0) == (("mixer", "other"), ("third",))
    graph = gl.circuits.Graph.of(twin)
    assert graph.names == ("embed", "0.mixer", "0.other", "0.third", "1.mixer", "1.other", "1.third", "logits")
    assert [node.name for node in graph.before(graph.find("1.other"))] == ["embed", "0.mixer", "0.other", "0.third"]
    with pytest.raises(
        gl.InputError, match="'1.mixer' does not reach '1.other': .* After '1.mixer' come 1.third, logits"
    ):
        graph.check_order(graph.find("1.mixer"), [graph.find("1.other")])


@torch.no_grad()
def test_what_was_written_into_the_stream_sums_to_it(twin):
    cache = twin.run_with_cache(TOKENS)[1]
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels[:4] == ["embed", "0_mixer_out", "0_other_out", "0_third_out"]
    assert relative(parts.sum(0), cache["resid_post", 1]) < 1e-12
    shares = gl.lens.logit_attribution(twin, TOKENS, 3)
    assert relative(shares.values.sum(-1), twin(TOKENS)[:, -1, 3]) < 1e-10
    nothing = gl.ablation.remove_layer(0)
    with nothing.on(twin):
        removed = twin.run_with_cache(TOKENS)[1]
    assert torch.equal(removed["resid_post", 0], removed["resid_pre", 0])


@torch.no_grad()
def test_path_patching_into_one_of_two_parallel_branches(twin):
    """Against the run by hand: what the sender writes in the clean run reaches one reader alone, and its twin nothing."""
    other = TOKENS.flip(1)
    clean, corrupted = (twin.run_with_cache(t, names_filter="blocks.0.hook_third_out")[1] for t in (TOKENS, other))
    moved = clean["blocks.0.hook_third_out"] - corrupted["blocks.0.hook_third_out"]
    metric = gl.metrics.logit(torch.tensor([5, 6]))
    patched = twin.run_with_hooks(other, fwd_hooks=[("blocks.1.hook_other_in", lambda x, hook: x + moved)])
    want = metric(patched) - metric(twin(other))
    found = gl.circuits.path_patch(twin, TOKENS, other, metric, "0.third", "1.other")
    assert relative(found, want) < 1e-10 and want.abs().min() > 1e-6


def test_two_states_of_one_name_are_refused(twin):
    with pytest.raises(gl.InputError, match="Two parts of block 0 leave a state 'conv'"):
        twin(TOKENS, return_state=True)
