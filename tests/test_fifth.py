"""Another architecture costs one file: HGRN, `tests/hgrn.py`, keeps every general promise as it stands.

It is registered, and nothing else is touched. Then every test of the other files that takes a `model`, a language model or an
architecture runs here on it: they are imported, with the fixtures below in place of conftest's. What follows is what those
tests cannot know: the equations themselves.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import gatedlens as gl
from gatedlens import catalogue
from gatedlens.hooks import architectures, shipped, unregister
from tests import test_amplify, test_metrics, test_steering
from tests.ablation import test_ablation, test_components
from tests.address import test_names
from tests.attention import test_contributions, test_layer, test_profiles, test_stack
from tests.attention.test_layer import case  # noqa: F401  a fixture
from tests.attribution import (
    test_by_attention,
    test_by_gradients,
    test_by_perturbation,
    test_by_relevance,
    test_question,
    test_scores,
)
from tests.circuits import test_attribution_patching, test_circuit, test_edge_scores, test_graph, test_path_patching
from tests.circuits.test_circuit import circuit  # noqa: F401  a fixture
from tests.comparing import test_grafting
from tests.comparing.test_grafting import another  # noqa: F401  a fixture
from tests.compat import test_circuitsvis, test_transformer_lens
from tests.compat.test_transformer_lens import tuned, tuned_model  # noqa: F401  fixtures
from tests.conftest import EVERY
from tests.evaluation import test_protocol, test_run
from tests.helpers import example, relative
from tests.knockout import test_sweeping as test_knockout
from tests.knockout.test_sweeping import kind  # noqa: F401  a fixture
from tests.lens import test_early_logits, test_fitted_lens, test_logit_shares, test_state_readout
from tests.lens.test_state_readout import clean_lm  # noqa: F401  a fixture
from tests.model import test_base, test_cache, test_hookpoint, test_language
from tests.model import test_run as test_documents
from tests.model.test_turns import impatient  # noqa: F401  a fixture
from tests.model.test_watch import own, speaking  # noqa: F401  fixtures
from tests.patching import test_sweeping as test_patching
from tests.probes import test_probes
from tests.recurrence import test_transforms
from tests.states import test_optimising, test_surgery
from tests.store import test_harvest, test_reductions
from tests.subspaces import test_interchange
from tests.test_amplify import speaker  # noqa: F401  a fixture
from tests.tracing import test_trace


@pytest.fixture(scope="module")
def hooked():
    """HGRN, registered for the time of this module."""
    gl.register(
        importlib.import_module("tests.hgrn").HookedHGRN
    )  # late: an error of another test names whatever there is
    yield architectures()["hgrn"]
    unregister("hgrn")
    assert architectures() == shipped()


@pytest.fixture(scope="module")
def _model(hooked):
    return hooked.tiny(seed=0, dtype=torch.float64)


@pytest.fixture(scope="module")
def _language_model(_model):
    return _model


# -- every promise --------------------------------------------------------------------------------------------------

GENERAL = [
    test_attribution_patching,
    test_circuit,
    test_edge_scores,
    test_graph,
    test_path_patching,
    test_base,
    test_ablation,
    test_hookpoint,
    test_knockout,
    test_language,
    test_early_logits,
    test_fitted_lens,
    test_state_readout,
    test_grafting,
    test_optimising,
    test_logit_shares,
    test_metrics,
    test_layer,
    test_cache,
    test_components,
    test_circuitsvis,
    test_contributions,
    test_names,
    test_profiles,
    test_stack,
    test_surgery,
    test_steering,
    test_trace,
    test_patching,
    test_probes,
    test_interchange,
    test_transformer_lens,
    test_harvest,
    test_reductions,
    test_scores,
    test_by_attention,
    test_by_gradients,
    test_by_perturbation,
    test_question,
    test_by_relevance,
    test_protocol,
    test_run,
    test_amplify,
    test_transforms,
    test_documents,
]
if importlib.util.find_spec("nnsight") is not None:
    from tests.compat import test_nnsight, test_traced
    from tests.compat.test_nnsight import wrapped  # noqa: F401  a fixture
    from tests.compat.test_traced import traced  # noqa: F401  a fixture

    GENERAL += [test_nnsight, test_traced]
if importlib.util.find_spec("captum") is not None:
    from tests.compat import test_captum

    GENERAL.append(test_captum)


def general(module) -> dict:
    """The tests of a file that run on whatever architecture they are given."""
    given = {"model", "lm", "hooked", "wrapped", "traced", "tuned", "tuned_model", "speaker"}
    tests = {name: value for name, value in vars(module).items() if name.startswith("test_") and callable(value)}
    return {name: test for name, test in tests.items() if given & set(inspect.signature(test).parameters)}


for _module in GENERAL:  # by name and file: two files may each have a test_padding
    _file = _module.__name__.replace("tests.", "").replace(".", "_")
    globals().update({f"{name}__{_file}": test for name, test in general(_module).items()})


def test_the_general_tests_are_here():
    """The collection above is what it is meant to be: a promise of each kind is among it."""
    for name in (
        "test_every_declared_point_fires_with_its_declared_shape_in_order",
        "test_gradients_of_edits_are_exact_at_every_point",
        "test_lazy_points_are_built_only_for_listeners",
        "test_prefix_and_suffix_equal_the_whole_at_every_split",
        "test_a_padded_batch_equals_its_rows_alone",
        "test_greedy_generation_is_the_argmax_of_the_whole_each_time",
        "test_attention_and_remainder_are_the_layers_output",
        "test_every_view_of_the_operator_is_the_dense_matrix",
        "test_keys",
        "test_packed_documents_are_as_if_each_stood_alone",
        "test_rows_hold_together",
    ):
        assert any(found.startswith(f"{name}__") for found in globals())


# -- its own equations ----------------------------------------------------------------------------------------------


def by_hand(w, tokens):
    """Logits by the equations of the paper, one step after another, with none of the package's functions."""
    shares = w.lower_bounds.softmax(0)
    bounds = shares.cumsum(0) - shares[0]
    resid = w.embedding.weight[tokens]
    for bound, layer in zip(bounds, w.layers, strict=True):
        n, mixer = layer["ln1"](resid), layer["mixer"]
        decay = bound + (1 - bound) * torch.sigmoid(mixer.f_proj(n))
        u, gate = F.silu(mixer.i_proj(n)), F.silu(mixer.g_proj(n))
        state, states = torch.zeros_like(u[:, 0]), []
        for t in range(tokens.shape[1]):
            state = decay[:, t] * state + (1 - decay[:, t]) * u[:, t]
            states.append(state)
        resid = resid + mixer.out_proj(torch.stack(states, 1) * gate)
        m, mlp = layer["ln2"](resid), layer["mlp"]
        resid = resid + mlp.down_proj(F.silu(mlp.gate_proj(m)) * mlp.up_proj(m))
    return w.head(w.norm(resid))


def test_logits_and_gradients_are_those_of_the_equations(hooked):
    model = hooked.tiny(dtype=torch.float64)
    tokens, parameters = example(model, pos=9), list(model.wrapped.parameters())
    ours, theirs = model(tokens), by_hand(model.wrapped, tokens)
    assert relative(ours, theirs) < 1e-12
    weight = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for got, want in zip(
        torch.autograd.grad((ours * weight).sum(), parameters),
        torch.autograd.grad((theirs * weight).sum(), parameters),
        strict=True,
    ):
        assert relative(got, want) < 1e-10


@torch.no_grad()
def test_the_bound_rises_with_the_layer_and_gates_may_saturate(hooked):
    model = hooked.tiny(dtype=torch.float64, num_hidden_layers=3)
    bounds = [block.mixer.bound.log_decay(torch.full((1, 1, 24), -math.inf)) for block in model.blocks[1:]]
    assert (bounds[0] < bounds[1]).all() and (bounds[1] < 0).all()
    tokens = example(model)
    for value in (-200.0, 200.0):
        hooks = [("blocks.*.mixer.hook_forget_pre", lambda f, hook, value=value: torch.full_like(f, value))]
        with model.hooks(hooks):
            logits, cache = model.run_with_cache(tokens)
            wide = model.to(torch.float32)(tokens)
            model.to(torch.float64)
        assert torch.isfinite(logits).all() and torch.isfinite(wide).all()
        assert all(gl.implicit_attention(cache, layer=layer).check().relative < 1e-10 for layer in range(3))


@torch.no_grad()
def test_attention_is_the_product_of_forget_gates(hooked):
    """S[i, j] = decay_i ... decay_{j+1} (1 - decay_j), one number at a time."""
    model = hooked.tiny(dtype=torch.float64)
    tokens = example(model)
    _, cache = model.run_with_cache(tokens, names_filter="blocks.1.mixer.*")
    decay, x, gate = cache["decay", 1], cache["x", 1], cache["gate", 1]
    A = gl.implicit_attention(cache, layer=1).dense()
    for i in range(7):
        for j in range(i + 1):
            s = decay[:, j + 1 : i + 1].prod(1) * (1 - decay[:, j])
            assert torch.allclose(A[:, :, i, j], gate[:, i] * s * torch.sigmoid(x[:, j]), atol=1e-14)


# -- found by whatever looks for architectures ----------------------------------------------------------------------


@torch.no_grad()
def test_wrap_shares_the_parameters(hooked):
    weights = hooked.tiny().wrapped
    model = gl.wrap(weights)
    assert type(model) is hooked and model.cfg.architecture == "hgrn"
    assert model.W_E is weights.embedding.weight
    before = model(example(model))
    weights.lower_bounds.add_(torch.randn(weights.lower_bounds.shape))
    assert not torch.equal(model(example(model)), before)
    with pytest.raises(gl.CheckpointError, match=r"does not know HGRNModel.*HGRN \(HGRN\)"):
        gl.wrap(type("HGRNModel", (torch.nn.Module,), {})())


@torch.no_grad()
def test_a_folder_loads_and_a_bad_one_is_explained(hooked, tmp_path):
    model = hooked.tiny()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hgrn", **model.wrapped.config}))
    tensors = model.wrapped.state_dict()
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = gl.from_pretrained(tmp_path, device="cpu")
    assert type(loaded) is hooked and torch.equal(loaded(example(model)), model(example(model)))
    save_file({k: v for k, v in tensors.items() if k != "lower_bounds"}, tmp_path / "model.safetensors")
    with pytest.raises(gl.CheckpointError, match="is missing 1 weights: lower_bounds"):
        gl.from_pretrained(tmp_path, device="cpu")


def test_other_architectures_points_are_told_apart(hooked):
    with pytest.raises(gl.PointError, match="hook_forget_pre"):
        EVERY["mamba"].tiny().run_with_cache([[1, 2]], names_filter="blocks.0.mixer.hook_forget_pre")
    with pytest.raises(gl.PointError, match="Mamba"):
        hooked.tiny().run_with_cache([[1, 2]], names_filter="blocks.0.mixer.hook_dt_rank")


def test_the_catalogue_has_its_page(hooked):
    page = catalogue.pages()["hgrn.md"]
    table, drawn = page.split("| point |", 1)[1], page.split("```mermaid", 1)[1]
    for row in hooked.block_points:
        assert f"`blocks.{{l}}.{row.name}`" in table and f"{row.leaf}]" in drawn
    arrows = set(catalogue.arrows(hooked.block_points))
    for pair in (
        ("ln1.hook_out", "mixer.hook_x"),
        ("mixer.hook_forget_pre", "mixer.hook_log_decay"),
        ("mixer.hook_log_decay", "mixer.hook_decay"),
        ("mixer.hook_u", "mixer.hook_write"),
        ("mixer.hook_write", "mixer.hook_state"),
        ("mixer.hook_gated", "hook_mixer_out"),
        ("mlp.hook_post", "hook_mlp_out"),
    ):
        assert pair in arrows
    for term, here in hooked.recurrence.items():
        assert f"| {term} | {here} |" in page
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(code, "hgrn.md", "exec"), {})
    assert "[HGRN](hgrn.md)" in catalogue.pages()["README.md"] and "hgrn" in catalogue.data(architectures())
    assert "hgrn.md" in catalogue.stale(), "the shipped catalogue has no page of it"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(hooked, dtype):
    model = hooked.tiny()
    tokens = example(model)
    want = model(tokens)
    model.to(dtype)
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    assert relative(cache["logits"], want) < 0.05 and cache["decay", 0].dtype == torch.float32
    assert cache["gated", 0].dtype == dtype
    assert gl.implicit_attention(cache, layer=1).check().relative < 0.02
