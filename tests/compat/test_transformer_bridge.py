"""TransformerLens's bridge over our forward: names, numbers, edits, layers, gradients, generation; opt-in and undone."""

from __future__ import annotations

import pytest
import torch
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES, ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, FalconMambaConfig, FalconMambaForCausalLM, Mamba2Config, Mamba2ForCausalLM

import gatedlens as gl
from gatedlens.compat import transformer_bridge as bridging
from gatedlens.loading import BUNDLED
from tests.helpers import relative

NAMES = ["mamba-moby", "griffin-moby", "rwkv-moby"]
TOKENS = torch.tensor([[67, 97, 108, 108, 32, 109], [101, 46, 32, 73, 115, 104]])


@pytest.fixture(scope="module")
def registered():
    assert ArchitectureAdapterFactory._adapters == SUPPORTED_ARCHITECTURES, "importing gatedlens.bridge registered it"
    bridging.register()
    yield
    bridging.unregister()


@pytest.fixture(params=NAMES, scope="module")
def pair(request, registered):
    """(a bridge of a bundled folder, the same model as ours), float64."""
    bridge = TransformerBridge.boot_transformers(str(BUNDLED / request.param), device="cpu", dtype=torch.float64)
    return bridge, gl.from_pretrained(f"gatedlens/{request.param}", device="cpu", dtype=torch.float64)


def test_registering_is_undone(registered):
    names = bridging.bridged()
    ours = {
        "MambaForCausalLM",
        "FalconMambaForCausalLM",
        "Mamba2ForCausalLM",
        "RecurrentGemmaForCausalLM",
        "RwkvForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
        "RWKV7ForCausalLM",
        "BambaForCausalLM",
        "FalconH1ForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "JambaForCausalLM",
        "Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM",
        "NemotronHForCausalLM",
        "OlmoHybridForCausalLM",
        "Zamba2ForCausalLM",
    }
    assert ours == set(names)
    adapters = ArchitectureAdapterFactory._adapters
    assert {name for name in adapters if adapters[name] is not SUPPORTED_ARCHITECTURES[name]} == set(names)
    bridging.unregister()
    assert adapters == SUPPORTED_ARCHITECTURES
    bridging.register()


@torch.no_grad()
def test_its_points_are_ours_and_all_fire(pair):
    bridge, ours = pair
    logits, cache = bridge.run_with_cache(TOKENS)
    want, truth = ours.run_with_cache(TOKENS, names_filter=lambda name: True)
    assert relative(logits, want) < 1e-12
    assert set(cache.keys()) == set(bridge.hook_dict), "a point that is listed fires"
    blocks = {f"blocks.{layer}.hook_{end}" for layer in range(ours.cfg.n_layers) for end in ("in", "out")}
    assert set(bridge.hook_dict) == set(ours.names) | blocks | {"embed.hook_out"}
    assert all(relative(cache[name], truth[name]) < 1e-12 for name in ours.names)
    assert [point.name for point in bridge.gated.hook_dict.values()] == list(bridge.gated.names)
    assert list(bridge.gated.run_with_cache(TOKENS)[1]) == list(ours.run_with_cache(TOKENS)[1])


@torch.no_grad()
def test_parameters_are_shared(pair):
    bridge, _ = pair
    assert {id(p) for p in bridge.parameters()} == {id(p) for p in bridge.gated.parameters()}
    assert bridge.W_E is bridge.gated.embedding.weight and torch.equal(bridge.W_U, bridge.gated.W_U)


@torch.no_grad()
def test_edits_act_as_ours(pair):
    bridge, ours = pair
    lazy = [name for name, point in ours.names.points.items() if point.lazy and "blocks.1." in name]
    for name in ("hook_embed", "blocks.0.hook_mixer_in", "blocks.1.hook_mixer_out", "ln_final.hook_scale", *lazy):
        hooks = [(name, lambda x, hook: x * 0.9)]
        got, want = bridge.run_with_hooks(TOKENS, fwd_hooks=hooks), ours.run_with_hooks(TOKENS, fwd_hooks=hooks)
        assert relative(got, want) < 1e-12, name
    assert relative(bridge(TOKENS), ours(TOKENS)) < 1e-12, "the hooks are gone"
    with pytest.raises(KeyError, match="hook_nothing"):
        bridge.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_nothing", lambda x, hook: x)])


@torch.no_grad()
def test_starting_and_stopping_at_a_layer(pair):
    bridge, ours = pair
    resid = bridge(TOKENS, stop_at_layer=1)
    assert relative(resid, ours(TOKENS, stop_at_layer=1)) < 1e-12
    assert relative(bridge(resid, start_at_layer=1), ours(TOKENS)) < 1e-12
    stopped, cache = bridge.run_with_cache(TOKENS, stop_at_layer=1)
    assert relative(stopped, resid) < 1e-12 and not any(name.startswith("blocks.1") for name in cache)


def test_losses_and_gradients(pair):
    bridge, ours = pair
    name = "blocks.1.hook_resid_pre"
    loss, cache = bridge.run_with_cache(TOKENS, return_type="loss", incl_bwd=True, names_filter=[name])
    want, truth = ours.run_with_cache(TOKENS, return_type="loss", incl_bwd=True, names_filter=[name])
    assert relative(loss, want) < 1e-12 and relative(cache[f"{name}_grad"], truth[f"{name}_grad"]) < 1e-10
    bridge.zero_grad()


@torch.no_grad()
def test_text_padding_and_generation(pair):
    bridge, ours = pair
    texts = ["Call me Ishmael", "Whale"]
    got, want = (model(texts, padding_side="left")[:, -1] for model in (bridge, ours))
    assert relative(got, want) < 1e-12
    options = {"max_new_tokens": 6, "do_sample": False, "verbose": False}
    assert bridge.generate("Call me", **options) == ours.generate("Call me", **options)


@torch.no_grad()
def test_its_cache_has_transformer_lens_methods(pair):
    bridge, ours = pair
    logits, cache = bridge.run_with_cache(TOKENS)
    _, truth = ours.run_with_cache(TOKENS)
    assert relative(cache.accumulated_resid(apply_ln=True), truth.accumulated_resid(apply_ln=True)) < 1e-6
    lens = cache.logit_lens(positions=None, return_type="logits")
    assert relative(lens.values[-1], logits) < 1e-6


def test_what_its_design_rules_out_raises(pair):
    bridge, _ = pair
    with pytest.raises(RuntimeError, match="does not support compatibility mode"):
        bridge.enable_compatibility_mode()
    with pytest.raises(TypeError, match="state"):
        bridge(TOKENS, state=None)
    with pytest.raises(gl.InputError, match="start_at_layer"):
        bridge(torch.zeros(1, 3, bridge.cfg.d_model, dtype=torch.float64))


FALCON = FalconMambaConfig(vocab_size=257, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=3)
HEADS = {"num_heads": 4, "head_dim": 8, "n_groups": 1}
MAMBA2 = Mamba2Config(vocab_size=257, hidden_size=16, state_size=4, num_hidden_layers=2, **HEADS)


@torch.no_grad()
@pytest.mark.parametrize(
    ("cls", "config", "state"),
    [(FalconMambaForCausalLM, FALCON, (32, 4)), (Mamba2ForCausalLM, MAMBA2, (4, 8, 4))],
    ids=["FalconMamba", "Mamba-2"],
)
def test_a_model_that_exists(registered, cls, config, state):
    """A random one, from an object."""
    torch.manual_seed(0)
    config.architectures = [cls.__name__]
    model = cls(config).eval()
    want = model(TOKENS).logits
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "mamba-moby")
    bridge = TransformerBridge.boot_transformers("mine", hf_model=model, tokenizer=tokenizer, device="cpu")
    logits, cache = bridge.run_with_cache(TOKENS, names_filter="blocks.1.mixer.hook_state")
    assert relative(logits, want) < 1e-5 and cache["blocks.1.mixer.hook_state"].shape == (2, 6, *state)


@pytest.mark.parametrize("name", ["mamba-recall", "griffin-recall", "rwkv-recall", "gdn-recall", "hybrid-recall"])
def test_the_recall_models_boot(registered, name):
    bridge = TransformerBridge.boot_transformers(str(BUNDLED / name), device="cpu")
    with torch.no_grad():
        want = gl.from_pretrained(f"gatedlens/{name}", device="cpu")("D 3 A 7 ? A")
        assert relative(bridge("D 3 A 7 ? A"), want) < 1e-5


def test_hooks_are_told_the_name_that_they_asked_for(pair):
    bridge, _ = pair
    told: list[str] = []
    names = ["blocks.0.hook_out", "blocks.1.hook_in", "embed.hook_out", "blocks.0.hook_resid_post"]
    with torch.no_grad(), bridge.hooks(fwd_hooks=[(name, lambda x, hook: told.append(hook.name)) for name in names]):
        bridge(TOKENS)
    assert sorted(told) == sorted(names)
    assert not any(point.fwd_hooks for point in bridge.gated.hook_dict.values()), "hooks are taken off"
    bridge.add_hook("blocks.0.hook_out", lambda x, hook: x * 0)
    with torch.no_grad():
        edited = bridge(TOKENS)
        bridge.reset_hooks()
        assert not torch.equal(bridge(TOKENS), edited)


def test_transformer_lens_s_jacobian_lens_is_the_mean_jacobian(pair):
    from transformer_lens.tools.analysis import JacobianLens

    bridge, ours = pair
    text, skipped = "Call me Ishmael.", 3
    lens = JacobianLens.fit(
        bridge, [text], corpus="a line", source_layers=[0], skip_first_positions=skipped, show_progress=False
    )
    tokens = bridge.to_tokens(text)
    stream = ours(tokens, stop_at_layer=1).detach()
    real = range(skipped, tokens.shape[1] - 1)

    def last(resid):  # summed over the positions that read: causality leaves out those before
        out: list[torch.Tensor] = []
        ours.run_with_hooks(
            resid,
            start_at_layer=1,
            return_type="logits",
            fwd_hooks=[(f"blocks.{ours.cfg.n_layers - 1}.hook_resid_post", lambda x, hook: out.append(x))],
        )
        return out[0][0, list(real)].sum(0)

    rows = torch.autograd.functional.jacobian(last, stream)[:, 0]  # d_model pos d_model
    want = rows[:, list(real)].mean(1)
    assert relative(lens.jacobians[0].double(), want) < 1e-6


def test_our_jacobian_lens_is_transformer_lens_s(pair):
    """Matrices, lens vectors and readouts, on our models and on the bridge's; theirs are float32."""
    from transformer_lens.tools.analysis import JacobianLens

    bridge, ours = pair
    if ours.cfg.architecture == "mamba":
        pytest.skip("two architectures are enough, and this one is the widest")
    text = "Call me Ishmael."
    theirs = JacobianLens.fit(
        bridge, [text], corpus="a line", skip_first_positions=3, dim_batch=64, show_progress=False
    )
    tokens = bridge.to_tokens(text)
    read = theirs.readout(bridge, text, return_full_logits=True)
    for model in (ours, bridge.gated):
        found = gl.lens.jacobian_lens(model, tokens, skip_first=3, dim_batch=64, progress=False)
        assert found.layers == ["embed", *theirs.source_layers]
        for layer in theirs.source_layers:
            assert relative(found.weights[layer], theirs.jacobians[layer].double()) < 1e-6
            vector = theirs.lens_vectors(bridge, 5, layer)[0].double()
            assert relative(found.direction(model, 5, layer), vector) < 1e-6
            assert relative(found.read(model, tokens).logits(layer)[0], read.lens_logits[layer].double()) < 1e-5
