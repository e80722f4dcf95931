"""Qwen4: every row against its literal equation, transformers' models, what an indexer chooses, padding, documents, states."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import gatedlens as gl
from gatedlens.formats.qwen4_exp import TINY
from gatedlens.hooks.qwen4_exp import ROWS, HookedQwen4Exp
from gatedlens.model.tiny import Tiny
from tests.conftest import EVERY
from tests.helpers import padded, relative
from tests.hooks import battery
from tests.hooks.literal import linear, norm_rows, rms, silu
from tests.hooks.test_qwen3_next import attention, delta_net, experts, frequencies_of, turned

pytestmark = pytest.mark.skipif("qwen4_exp" not in EVERY, reason="this transformers has no Qwen4Exp")

TOKENS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
CHOOSING = {"indexer_budget": 4, "rms_norm_eps": 1e-6}  # two of up to five blocks of two
NGRAMS = {  # the token 0 ends a text
    "ple_layer_ids": [1], "eos_token_id": 0, "ngram_vocab_size_base": 20, "heads_per_ngram": 2, "ple_embed_dim": 8,
    "ple_conv_kernel_size": 2, "make_ngram_vocab_size_divisible_by": 4, "split_ngram_parts": 4,
}  # fmt: skip
VARIANTS = {
    "chooses": CHOOSING,
    "three copies, one block, n-grams": {
        "hc_count": 3, "indexer_budget": 3, "indexer_compress_ratio": 3, "num_experts": 3, **NGRAMS,
    },
    "biases, a sigmoid gate, n-grams later": {
        "attention_bias": True, "output_gate_type": "sigmoid", "linear_num_key_heads": 4, "indexer_budget": 2,
        "layer_types": ["indexed_attention", "linear_attention", "linear_attention"], "num_hidden_layers": 3,
        "norm_topk_prob": False, "num_experts": 3, **NGRAMS, "ple_layer_ids": [3], "ngram_size": 2, "heads_per_ngram": 4,
        "ple_conv_kernel_size": 4,
    },
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.75, "mrope_section": [1, 1, 1]}
EYES = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8, "out_hidden_size": 8, "patch_size": 4}


def tiny(variant: str = "chooses", dtype: torch.dtype = torch.float64, seed: int = 1, **sizes) -> HookedQwen4Exp:
    model = HookedQwen4Exp.tiny(seed=seed, dtype=dtype, **{**VARIANTS[variant], **sizes})
    if variant.startswith("biases"):  # transformers makes them 0
        for name, bias in model.wrapped.named_parameters():
            if name.endswith("proj.bias"):
                torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(len(name)))
    return model


def of_images(dtype: torch.dtype = torch.float64) -> HookedQwen4Exp:
    """The language model inside a model of images and text; six numbers of a head are turned, a pair by each axis."""
    from transformers import Qwen4ExpConfig, Qwen4ExpForConditionalGeneration, Qwen4ExpTextConfig

    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}

    def make(config):
        text = Qwen4ExpTextConfig(**config, **special)
        eyes = {**EYES, "num_position_embeddings": 16}
        return Qwen4ExpForConditionalGeneration(Qwen4ExpConfig(text_config=text.to_dict(), vision_config=eyes))

    own = {**CHOOSING, "rope_parameters": ROPE}
    return gl.wrap(Tiny(TINY.name, make, TINY.config, TINY.draws).module(1, own).to(dtype))


@pytest.fixture(params=VARIANTS, scope="module")
def model(request):
    return tiny(request.param)


@torch.no_grad()
def theirs(model: HookedQwen4Exp, tokens: torch.Tensor, **options) -> torch.Tensor:
    """transformers' logits, wholly in float64."""
    model.wrapped.config.get_text_config()._experts_implementation = "eager"
    with battery.true_float64():
        return model.wrapped(tokens, use_cache=False, **options).logits


# -- every row ------------------------------------------------------------------------------------------------------


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    w, out, cfg = model.wrapped.model.layers[layer], {}, model.cfg

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    if layer > 0:
        out["hook_resid_pre"] = cache["resid_post", layer - 1]
    else:
        embedded = model.wrapped.model.embed_tokens.weight[TOKENS]
        assert torch.equal(cache["hook_embed"], torch.cat([embedded] * cfg.n_copies, dim=-1))
        out["hook_resid_pre"] = cache["hook_embed"]
    stream = "hook_resid_pre"
    if w.ple is not None:
        ngrams(out, c, w.ple, cfg)
        stream = "hook_resid_mid1"
    later = "hook_resid_mid" if w.ple is None else "hook_resid_mid2"
    out["hook_mixer_in"] = c(stream)
    read(out, c, "ln1", c("hook_mixer_in"), w.attn_hyper_connection, cfg)
    if "delta net" in cfg.kinds[layer]:
        delta_net(out, c, w, cfg)
    else:
        indexer(out, c, w.self_attn.indexer, cfg)
        attention(out, c, w, cfg, share=2, attended=c("attn.hook_chosen") != 0)
    inject(out, c, "mixer", "inject1", "ln1", w.attn_hyper_connection, cfg)
    out[later] = c(stream) + c("hook_mixer_out")
    out["hook_mlp_in"] = c(later)
    read(out, c, "ln2", c("hook_mlp_in"), w.mlp_hyper_connection, cfg)
    experts(out, c, w.mlp, cfg)
    inject(out, c, "mlp", "inject2", "ln2", w.mlp_hyper_connection, cfg)
    out["hook_resid_post"] = c(later) + c("hook_mlp_out")
    return out


def ngrams(out, c, w, cfg) -> None:
    """The n-grams of each position, token by token: none goes across an end of text (0), and what is missing counts as one."""
    table, K, D = w.ple_embedding, cfg.n_copies, cfg.d_hidden
    batch, length = TOKENS.shape
    out["hook_ple_in"] = c("hook_resid_pre")
    embed = torch.zeros(batch, length, cfg.d_ngram, dtype=torch.float64)
    for b in range(batch):
        for t in range(length):
            seen = [int(TOKENS[b, t])]
            for s in range(1, table.ngram_size):
                ended = t - s < 0 or 0 in TOKENS[b, t - s : t].tolist()
                seen.append(0 if ended else int(TOKENS[b, t - s]))
            rows = []
            for head, size in enumerate(table.head_vocab_sizes):
                mixed = 0
                for token, by in zip(
                    seen[: 2 + head // table.heads_per_ngram], table.layer_multipliers.tolist(), strict=False
                ):
                    mixed ^= token * by
                rows.append(table.ngram_embedding.weight[mixed % size + table.head_offsets[head]])
            embed[b, t] = torch.cat(rows)
    out["ple.hook_embed"] = embed

    def normed(x, norm):
        return (1 + norm.weight) * torch.cat([copy / rms(copy, cfg.eps) for copy in x.split(D, dim=-1)], dim=-1)

    out["ple.hook_value"] = c("ple.hook_embed") @ w.value_proj.weight.T
    out["ple.hook_key"] = normed(c("ple.hook_embed") @ w.key_proj.weight.T, w.norm_key)
    out["ple.hook_query"] = normed(c("hook_ple_in"), w.norm_query)
    dots = torch.stack([one.sum(-1) for one in (c("ple.hook_key") * c("ple.hook_query")).split(D, dim=-1)], -1) / D**0.5
    out["ple.hook_gate_pre"] = torch.sign(dots) * dots.abs().clamp(min=1e-6).sqrt()
    out["ple.hook_gate"] = torch.sigmoid(c("ple.hook_gate_pre"))
    out["ple.hook_gated"] = torch.cat([c("ple.hook_gate")[..., k, None] * c("ple.hook_value") for k in range(K)], -1)
    out["ple.hook_normed"] = normed(c("ple.hook_gated"), w.norm_conv)
    conv, weight, step = torch.zeros_like(c("ple.hook_normed")), w.conv1d.weight[:, 0], w.conv1d.dilation[0]
    for t in range(length):
        for tap in range(weight.shape[1]):
            if t - step * tap >= 0:
                conv[:, t] += weight[:, -1 - tap] * c("ple.hook_normed")[:, t - step * tap]
    out["ple.hook_conv"] = conv
    out["hook_ple_out"] = c("ple.hook_gated") + silu(c("ple.hook_conv"))
    out["hook_resid_mid1"] = c("hook_resid_pre") + c("hook_ple_out")


def read(out, c, part, x, w, cfg) -> None:
    each = x.split(cfg.d_hidden, dim=-1)
    out[f"{part}.hook_scale"] = torch.cat([rms(copy, cfg.eps) for copy in each], dim=-1)
    parts = [copy / c(f"{part}.hook_scale")[..., k, None] for k, copy in enumerate(each)]
    out[f"{part}.hook_normalized"] = torch.cat(parts, dim=-1)
    out[f"{part}.hook_wide"] = (1 + w.hc_norm.weight) * c(f"{part}.hook_normalized")
    out[f"{part}.hook_low"] = silu(c(f"{part}.hook_wide") @ w.input_mix_weight_down.weight.T / cfg.n_copies)
    out[f"{part}.hook_gate"] = torch.sigmoid(c(f"{part}.hook_low") @ w.input_mix_weight_up.weight.T)
    gated = c(f"{part}.hook_gate") * c(f"{part}.hook_wide")
    out[f"{part}.hook_out"] = sum(gated.split(cfg.d_hidden, dim=-1)) / cfg.n_copies


def inject(out, c, branch, part, norm, w, cfg) -> None:
    out[f"{part}.hook_in"] = out[f"hook_{branch}_out"]  # what the part before has put there
    out[f"{part}.hook_gate"] = 2 * torch.sigmoid(c(f"{norm}.hook_wide") @ w.block_inject_weight.weight.T / cfg.n_copies)
    parts = [c(f"{part}.hook_gate")[..., k, None] * c(f"{part}.hook_in") for k in range(cfg.n_copies)]
    out[f"hook_{branch}_out"] = torch.cat(parts, dim=-1)


def indexer(out, c, m, cfg) -> None:
    n, H, D, R = c("ln1.hook_out"), cfg.n_index_heads, cfg.d_index, m.compress_ratio
    both = linear(n, m.index_qk_proj).unflatten(-1, (H + 1, D))
    out["attn.hook_index_q"], out["attn.hook_index_k"] = both[:, :, :H], both[:, :, H]
    norm_rows(out, c, "attn.index_q_norm", c("attn.hook_index_q"), 1 + m.q_layernorm.weight, cfg.eps)
    batch, length = TOKENS.shape
    frequencies = frequencies_of(cfg.d_head // 2)
    out["attn.hook_index_rot_q"] = turned(c("attn.index_q_norm.hook_out"), range(length), frequencies)
    scores = torch.zeros(batch, length, length, dtype=torch.float64)
    chosen = torch.zeros_like(scores)
    for b in range(batch):
        for i in range(length):
            seen = list(range(i + 1))
            blocks = [seen[s : s + R] for s in range(0, len(seen) // R * R, R)]
            found = []
            for block in blocks:
                key = sum(c("attn.hook_index_k")[b, j] for j in block) / R
                key = (1 + m.k_layernorm.weight) * key / rms(key, cfg.eps)
                key = turned(key[None, None], [block[0]], frequencies)[0, 0]
                dots = [(c("attn.hook_index_rot_q")[b, i, h] * key).sum().clamp(min=0) for h in range(H)]
                scores[b, i, block] = sum(dots) / D**0.5
                found.append(c("attn.hook_index_scores")[b, i, block[0]])
            behind = seen[len(blocks) * R :]
            kept = torch.stack(found).topk(min(m.block_topk, len(found))).indices.tolist() if found else []
            chosen[b, i, behind + [j for k in kept for j in blocks[k]]] = 1
    out["attn.hook_index_scores"], out["attn.hook_chosen"] = scores, chosen


def test_every_row_is_its_equation(model):
    battery.rows_are_their_equations(model, literal, TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1], ids=["delta net", "attention"])
def test_after_an_edit_every_row_downstream_is_its_equation(layer):
    """An edit of the indexer's may leave the choice as it is."""
    model = tiny(**NGRAMS) if layer == 0 else tiny()
    battery.edits_reach_every_row(model, literal, layer, TOKENS, may_be_vain=("index",))


# -- transformers ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_transformers(model):
    tokens = torch.randint(8, (2, 90), generator=torch.Generator().manual_seed(4))  # more than a chunk; some end a text
    assert relative(model(tokens), theirs(model, tokens)) < 1e-10
    _, cache = model.run_with_cache(tokens, names_filter="*.hook_chosen")
    (layer,) = [layer for layer, kind in enumerate(model.cfg.kinds) if kind == "attention"]
    assert (
        cache["chosen", layer].sum(-1).max()
        == model.wrapped.config.indexer_budget + model.wrapped.config.indexer_compress_ratio - 1
    )


@torch.no_grad()
def test_equal_scores_are_told_apart_as_transformers_does():
    """Blocks that no head answers score 0: of these torch's topk takes which it will, so it is asked as transformers does."""
    model, tokens = tiny(), torch.randint(40, (2, 150), generator=torch.Generator().manual_seed(4))
    for share in (0.0, -1.0):  # all scores 0; those of one head alone, so that half of them are
        (indexer,) = [layer.self_attn.indexer for layer in model.wrapped.model.layers if "self_attn" in layer._modules]
        indexer.index_qk_proj.weight.data[:12].mul_(
            torch.tensor([share if share else 0.0, 0.0]).repeat_interleave(6)[:, None]
        )
        scores = model.run_with_cache(tokens, names_filter="*.hook_index_scores")[1]["index_scores", 1]
        assert (scores[:, -1, :148] == 0).float().mean() > 0.1
        assert relative(model(tokens), theirs(model, tokens)) < 1e-10
        model = tiny()


def test_gradients_are_transformers():
    """No gradient goes through a choice: an indexer gets none."""
    ours = tiny(dtype=torch.float32, **NGRAMS)
    weight = torch.randn(*TOKENS.shape, 40, generator=torch.Generator().manual_seed(1))
    params = dict(ours.wrapped.named_parameters())
    found = torch.autograd.grad((ours(TOKENS) * weight).sum(), list(params.values()), allow_unused=True)
    logits = ours.wrapped(TOKENS, use_cache=False).logits
    wanted = torch.autograd.grad((logits * weight).sum(), list(params.values()), allow_unused=True)
    assert relative(ours(TOKENS), logits) < 1e-5
    for name, a, b in zip(params, found, wanted, strict=True):
        assert (a is None) == (b is None) == (".indexer." in name), name
        assert a is None or relative(a, b) < 1e-4, name


@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_transformers_is():
    model = tiny(dtype=torch.bfloat16)
    model.wrapped.config._experts_implementation = "eager"
    want = model.wrapped(TOKENS, use_cache=False).logits
    battery.half_precision_is_as_close_as_transformers_is(tiny(dtype=torch.float32), model, want, TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("images", [False, True], ids=["", "with images"])
def test_a_folder_is_read(images, tmp_path):
    given = of_images(torch.float32) if images else tiny(dtype=torch.float32, **NGRAMS)
    given.wrapped.save_pretrained(tmp_path)
    model = gl.from_pretrained(tmp_path, device="cpu")
    assert isinstance(model, HookedQwen4Exp) and type(model.wrapped).__name__.endswith("ForCausalLM")
    assert relative(model(TOKENS), given(TOKENS)) < 1e-6
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "block_inject_weight" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(gl.CheckpointError, match=r"is missing 1 weights: .*block_inject_weight"):
        gl.from_pretrained(tmp_path, device="cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    config.get("text_config", config)["hc_count"] = "two"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(gl.CheckpointError, match="hc_count"):
        gl.from_pretrained(tmp_path, device="cpu")


def test_a_config_says_what_a_large_model_takes(tmp_path):
    from transformers import Qwen4ExpForCausalLM, Qwen4ExpTextConfig

    index = {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 16,
    }
    config = Qwen4ExpTextConfig(num_hidden_layers=8, **index, **{**NGRAMS, "ple_layer_ids": [2]})
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Qwen4ExpForCausalLM(config).parameters())
    found = gl.inspect(tmp_path, tokens=2048, dtype="bfloat16")
    assert found.parameters == parameters and found.d_model == 4 * 2048 and len(found.layers) == 8
    assert list(found.layers[1::2]) == ["recurrent, experts", "attention, experts"] * 2


WHERE = torch.tensor(  # a token of text, a picture of 2 x 2, more text; and another
    [
        [[0, 1, 1, 1, 1, 3, 4, 5], [0, 1, 1, 2, 2, 3, 4, 5], [0, 1, 2, 1, 2, 3, 4, 5]],
        [[0, 1, 2, 2, 2, 2, 4, 5], [0, 1, 2, 2, 3, 3, 4, 5], [0, 1, 2, 3, 2, 3, 4, 5]],
    ]
).transpose(0, 1)


@torch.no_grad()
def test_positions_of_three_axes_are_transformers_at_every_split():
    model, tokens = of_images(), TOKENS[:, :8]
    whole = model(tokens, position_ids=WHERE)
    assert relative(whole, theirs(model, tokens, position_ids=WHERE)) < 1e-10
    assert relative(model(tokens), whole) > 1e-4
    for at in range(1, 8):
        first, state = model(tokens[:, :at], position_ids=WHERE[:, :, :at], return_state=True)
        rest = model(tokens[:, at:], position_ids=WHERE[:, :, at:], state=state)
        assert relative(torch.cat([first, rest], 1), whole) < 1e-12
    embeds = model.embedding(tokens).repeat(1, 1, model.cfg.n_copies)
    assert relative(model(embeds, start_at_layer=0, position_ids=WHERE), whole) < 1e-14


@torch.no_grad()
def test_of_a_padded_batch_each_row_is_transformers_of_the_row_alone():
    model, rows = tiny(**NGRAMS), [TOKENS[0], TOKENS[1, :5]]
    for side in ("left", "right"):
        given, mask = padded(rows, side)
        logits = model(given, attention_mask=mask)
        for i, row in enumerate(rows):
            assert relative(logits[i][mask[i]], theirs(model, row[None])[0]) < 1e-10


# -- the operator, what heads write, padding, documents, states -----------------------------------------------------


def test_the_implicit_attention_reconstructs_every_layer(model):
    battery.attention_reconstructs_every_layer(model, TOKENS)


@torch.no_grad()
def test_the_stream_is_the_sum_of_what_tokens_and_heads_write(model):
    _, cache = model.run_with_cache(TOKENS)
    for layer in range(model.cfg.n_layers):
        F, written = gl.implicit_attention(cache, layer=layer).contributions(), cache["mixer_out", layer]
        assert relative(F.output(), written) < 1e-12
        assert relative(F.row(-1).sum(1) + F.remainder()[:, -1], written[:, -1]) < 1e-12
        assert relative(sum(F.column(j) for j in range(11)) + F.remainder(), written) < 1e-12
        blocks = torch.cat(list(F.blocks(max_bytes=None)), dim=1)
        assert relative(blocks.sum(2) + F.remainder(), written) < 1e-12
        direction = torch.linspace(-1, 1, model.cfg.d_model, dtype=torch.float64)
        assert relative(F.along(direction), blocks @ direction) < 1e-12
        assert (
            relative(F.through(torch.tensor([7, 7]), direction.expand(2, -1)).sum(1), blocks[:, 7] @ direction) < 1e-12
        )
    parts = cache.get_full_resid_decomposition(expand_neurons=False)
    assert relative(parts.sum(0), cache["resid_post", -1]) < 1e-12
    shares = cache.logit_attrs(cache.decompose_resid(), tokens=3)
    assert relative(shares.sum(0), cache["hook_logits"][..., 3]) < 1e-12
    for by in (gl.lens.logit_attribution, gl.lens.token_attribution, gl.lens.head_token_attribution):
        assert by(model, cache, 3, 5).facts["error"] < 1e-12


@torch.no_grad()
def test_edges_from_heads_sum_to_that_of_their_mixer():
    model = tiny()
    clean, corrupted, metric = TOKENS, (TOKENS + 3) % 40, lambda logits: logits[:, -1, 3] - logits[:, -1, 5]
    (layer,) = [layer for layer, kind in enumerate(model.cfg.kinds) if kind != "attention"]
    given = (model, clean, corrupted, metric)
    for by_head, whole in (
        (gl.circuits.eap_heads(*given), gl.circuits.eap(*given)),
        (
            gl.circuits.eap_ig_heads(*given, steps=2, progress=False),
            gl.circuits.eap_ig(*given, steps=2, progress=False),
        ),
    ):
        want = whole.scores.at(sender=f"{layer}.mixer").values
        assert torch.allclose(by_head.at(layer=layer).values.sum(0), want, rtol=0, atol=1e-10, equal_nan=True)
    one = gl.circuits.path_patch_heads(*given, progress=False)
    assert one.values.shape == (1, 4) and one.values.abs().max() > 1e-4


@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_padding_and_holes_count_for_nothing(model, listening):
    battery.padding_and_holes_count_for_nothing(model, TOKENS, listening)


def test_what_a_hook_does_at_padding_reaches_nobody():
    points = ("q_pre", "k_pre", "k", "beta", "dt", "log_decay", "decay", "write", "erase", "probe")
    battery.what_a_hook_does_at_padding_reaches_nobody(tiny(), TOKENS, points)


@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_packed_documents_are_as_if_each_stood_alone(model, listening):
    battery.packed_documents_stand_alone(model, TOKENS, listening)


def test_every_split_continues(model):
    battery.every_split_continues(model, TOKENS)


def test_generation_is_that_of_the_whole_prompt():
    battery.generation_is_that_of_the_whole_prompt(tiny(), TOKENS)


def test_a_patched_state_is_a_fresh_start_from_it():
    battery.a_patched_state_is_a_fresh_start_from_it(tiny(), TOKENS, 3)


@torch.no_grad()
def test_who_listens_to_the_indexer_changes_nothing_and_an_edit_of_the_choice_is_heard():
    model = tiny()
    plain = model(TOKENS)
    for point in ("index_scores", "chosen"):
        with model.hooks([(f"blocks.1.attn.hook_{point}", lambda x, hook: x.clone())]):
            assert relative(model(TOKENS), plain) < 1e-14
    with model.hooks([("blocks.1.attn.hook_index_scores", lambda x, hook: -x)]):
        assert relative(model(TOKENS), plain) > 1e-4, "the worst blocks in place of the best"
    with model.hooks([("blocks.1.attn.hook_chosen", lambda x, hook: torch.ones_like(x))]):
        logits, cache = model.run_with_cache(TOKENS, names_filter="*.hook_pattern")
    assert relative(logits, plain) > 1e-4
    assert (cache["pattern", 1].tril() > 0).sum() == 2 * 3 * 66, (
        "every key before a query is attended to, and none behind it"
    )
    assert relative(logits, tiny(indexer_budget=128)(TOKENS)) < 1e-14


@torch.no_grad()
def test_ngrams_read_the_tokens_beside_the_stream():
    model = tiny(
        **{**NGRAMS, "ple_layer_ids": [1, 3]},
        num_hidden_layers=3,
        layer_types=["linear_attention", "indexed_attention", "linear_attention"],
    )
    logits, cache = model.run_with_cache(TOKENS)
    for start in (0, 2):
        stream = cache["resid_pre", start]
        for told in ({"tokens": TOKENS}, {"earlier": cache}):
            assert relative(model(stream, start_at_layer=start, **told), logits) < 1e-14
        with pytest.raises(gl.InputError, match=rf"reads blocks.{start}.ple.hook_embed beside the residual stream"):
            model(stream, start_at_layer=start)
    with pytest.raises(gl.InputError, match="reads tokens beside the stream: give tokens="):
        model(cache["resid_pre", 0], start_at_layer=0, earlier=cache, return_state=True)
    corrupted = (TOKENS + 3) % 40  # a sweep goes on from streams
    found = gl.patching.get_act_patch_resid_pre(model, corrupted, cache, lambda x: x[:, -1, 3], progress=False)
    with model.hooks([("blocks.2.hook_resid_pre", lambda x, hook: put(x, cache["resid_pre", 2], 9))]):
        assert relative(found[2, 9], model(corrupted)[:, -1, 3].mean()) < 1e-12


def put(x, value, pos):
    x = x.clone()
    x[:, pos] = value[:, pos]
    return x


# -- kinds, refusals ------------------------------------------------------------------------------------------------


def test_kinds_are_all_that_stand_in_a_model():
    seen = {kind for variant in VARIANTS for kind in tiny(variant).cfg.kinds}
    assert seen == set(ROWS) == set(HookedQwen4Exp.kinds())


def test_what_it_cannot_run_is_told_by_name():
    with pytest.raises(gl.CheckpointError, match="'gelu'"):
        HookedQwen4Exp.tiny(hidden_act="gelu", output_gate_type="silu")
