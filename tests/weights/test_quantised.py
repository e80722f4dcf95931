"""Quantised weights, dequantised as they are read: against each package's own numbers, and against the formats' equations."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import gatedlens as gl
from gatedlens.weights.quantised import from_blocks
from tests.helpers import relative

TOKENS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
PLACES = [(layer, name) for layer in (0, 1) for name in ("in_proj", "x_proj", "out_proj")]
pytestmark = pytest.mark.filterwarnings("ignore")


def mamba(**sizes):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 40, "state_size": 14, **sizes}
    return MambaForCausalLM(MambaConfig(**sizes, tie_word_embeddings=False)).eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    mamba().save_pretrained(folder)
    return folder


def matrix(model, layer: int, name: str):
    return getattr(model.backbone.layers[layer].mixer, name)


def dequantised(quantised, weight_of):
    """The model with the numbers that `weight_of` gives for each quantised matrix, in plain modules."""
    plain = mamba()
    for path, module in quantised.named_modules():
        own = plain.get_submodule(path)
        state = {n: p for n, p in module.named_parameters(recurse=False) if n in own._parameters and n != "weight"}
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            state["weight"] = weight_of(module)
        elif "weight" in own._parameters:
            state["weight"] = module.weight
        own.load_state_dict({n: p.detach().float() for n, p in state.items()}, strict=False)
    return plain


def check(hooked, plain, told: str, caplog) -> None:
    """That `hooked` is `plain`, in all that reads weights, and that the log says what was dequantised."""
    want = gl.wrap(plain)
    with torch.no_grad():
        assert relative(hooked(TOKENS), want(TOKENS)) < 1e-6
        assert gl.implicit_attention(hooked, TOKENS, layer=1).check().relative < 1e-5
        _, state = hooked(TOKENS[:, :4], return_state=True)
        assert relative(hooked(TOKENS[:, 4:], state=state), want(TOKENS)[:, 4:]) < 1e-5
        zero = [("blocks.0.mixer.hook_gate", lambda gate, hook: gate * 0)]
        options = {"fwd_hooks": zero}
        assert relative(hooked.run_with_hooks(TOKENS, **options), want.run_with_hooks(TOKENS, **options)) < 1e-6
        assert torch.equal(copy.deepcopy(hooked)(TOKENS), hooked(TOKENS))
    seen = []
    for one in (hooked, want):
        resid = torch.ones(1, 5, 64, requires_grad=True)
        one(resid, start_at_layer=0).sum().backward()
        seen.append(resid.grad)
    assert relative(*seen) < 1e-5, "gradients of activations go through"
    lines = [r.getMessage() for r in caplog.records if r.name == "gatedlens" and "dequantised" in r.getMessage()]
    assert len(lines) == 1 and told in lines[0], lines


# -- bitsandbytes -----------------------------------------------------------------------------------------------------

BNB = {
    "nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8 of bitsandbytes 4 bit (nf4)"),
    "nf4 twice": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "8 of bitsandbytes 4 bit (nf4, double quantised)",
    ),
    "fp4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "8 of bitsandbytes 4 bit (fp4)"),
    "int8": ({"load_in_8bit": True}, "8 of bitsandbytes 8 bit"),
}


@pytest.mark.parametrize("kind", BNB)
def test_bitsandbytes(kind, base, tmp_path, caplog):
    pytest.importorskip("accelerate")
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options, told = BNB[kind]
    quantised = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options)
    )

    def weight_of(module):
        if kind == "int8":
            return bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)

    plain = dequantised(quantised, weight_of)
    assert relative(matrix(plain, 0, "in_proj").weight, matrix(mamba(), 0, "in_proj").weight) > 1e-3
    caplog.set_level(logging.INFO, "gatedlens")
    check(gl.wrap(quantised), plain, told, caplog)
    quantised.save_pretrained(tmp_path)
    caplog.clear()
    check(gl.from_pretrained(tmp_path, device="cpu"), plain, told, caplog)
    assert gl.inspect(tmp_path).parameters == sum(p.numel() for p in plain.parameters())


def test_bitsandbytes_by_its_equations():
    """nf4: code[q] absmax, blocks of 64 along a row, the higher nibble first; int8: q scale / 127."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    W = torch.randn(6, 64)
    four = bnb.nn.Linear4bit(64, 6, bias=False, quant_type="nf4", compress_statistics=False)
    four.weight = bnb.nn.Params4bit(W, requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")
    packed = four.weight.data.flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long().view(6, 64)
    state = four.weight.quant_state
    literal = torch.stack([torch.stack([state.code[q] * state.absmax[i] for q in row]) for i, row in enumerate(codes)])
    from gatedlens.weights import AsRead, reader_of

    assert torch.equal(AsRead(four).whole.weight, literal) and reader_of(torch.nn.Linear(2, 2)) is None
    eight = bnb.nn.Linear8bitLt(64, 6, bias=False, has_fp16_weights=False)
    eight.weight = bnb.nn.Int8Params(W, requires_grad=False, has_fp16_weights=False).to("cpu")
    literal = eight.weight.data.float() * eight.weight.SCB[:, None] / 127
    assert torch.allclose(AsRead(eight).whole.weight, literal, rtol=1e-6) and relative(literal, W) < 0.01
    eight.eval()(torch.randn(2, 64))  # from its first forward on the scale is elsewhere
    assert torch.allclose(AsRead(eight).whole.weight, literal, rtol=1e-6)


def test_an_adapter_over_quantised_weights_trains():
    """QLoRA: gradients reach A and B; the base is what it was."""
    bnb, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    model = mamba()
    for layer, name in PLACES:
        old = matrix(model, layer, name)
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
        setattr(model.backbone.layers[layer].mixer, name, new)
    outer = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False)).eval()
    hooked = gl.wrap(outer)
    layer = outer.base_model.model.backbone.layers[0].mixer.in_proj
    W = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.allclose(hooked.blocks[0].mixer.weights.in_proj.weight, W + layer.scaling["default"] * B @ A)
    hooked(TOKENS, return_type="loss").backward()
    assert all(p.grad is not None and bool(p.grad.any()) for name, p in outer.named_parameters() if "lora_" in name)


# -- torchao ----------------------------------------------------------------------------------------------------------

AO = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig")


@pytest.mark.parametrize("kind", AO)
def test_torchao(kind, base, tmp_path, caplog):
    ao = pytest.importorskip("torchao.quantization")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    asked = TorchAoConfig(getattr(ao, kind)())
    quantised = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=asked)
    plain, told = dequantised(quantised, lambda module: module.weight.dequantize()), "8 of torchao ("
    caplog.set_level(logging.INFO, "gatedlens")
    check(gl.wrap(quantised), plain, told, caplog)
    quantised.save_pretrained(tmp_path)
    caplog.clear()
    check(gl.from_pretrained(tmp_path, device="cpu"), plain, told, caplog)


# -- compressed-tensors -----------------------------------------------------------------------------------------------

WEIGHTS = {
    "int4 in groups": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    "int4 with zero points": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    "int8 by rows": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "fp8 by rows": {"num_bits": 8, "type": "float", "strategy": "channel"},
}


def compressed(kind, folder):
    """(the model that compressed-tensors compresses, its numbers before) saved in `folder` as its users save it."""
    ct = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    model = mamba()
    scheme = ct.QuantizationScheme(targets=["Linear"], weights=ct.QuantizationArgs(**WEIGHTS[kind]))
    ct.apply_quantization_config(
        model, ct.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head", "re:.*dt_proj"])
    )
    numbers = {}
    for path, module in model.named_modules():
        if vars(module).get("quantization_scheme") is None:
            continue
        W, args = module.weight.detach(), module.quantization_scheme.weights
        parts = W.unflatten(1, (-1, args.group_size or W.shape[1]))
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
        module.weight_scale.data.copy_(scale)
        if "weight_zero_point" in module._parameters:
            module.weight_zero_point.data.copy_(zero)
        own = {name: p.data for name, p in module._parameters.items() if name in ("weight_scale", "weight_zero_point")}
        numbers[path] = fake_quantize(W, own["weight_scale"], own.get("weight_zero_point"), args)
        module.quantization_status = ct.QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return model, numbers


@pytest.mark.parametrize("kind", WEIGHTS)
def test_compressed_tensors(kind, tmp_path, caplog):
    model, numbers = compressed(kind, tmp_path)
    plain = mamba()
    for path, W in numbers.items():
        plain.get_submodule(path).weight.data.copy_(W)
    assert (
        len(numbers) == 6
        and relative(numbers["backbone.layers.0.mixer.in_proj"], mamba().backbone.layers[0].mixer.in_proj.weight) > 1e-3
    )
    caplog.set_level(logging.INFO, "gatedlens")
    check(gl.wrap(model), plain, "6 of compressed-tensors (", caplog)
    caplog.clear()
    told = "6 matrices were dequantised while loading, compressed-tensors into float32"
    check(gl.from_pretrained(tmp_path, device="cpu"), plain, told, caplog)


# -- fp8 in blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (4, 6), (3, 9, 5)])
def test_blocks_by_their_equation(shape):
    torch.manual_seed(0)
    rows, columns = 2, 3
    q = torch.randn(shape).to(torch.float8_e4m3fn)
    tiles = (-(-shape[-2] // rows), -(-shape[-1] // columns))
    scale = torch.rand(*shape[:-2], *tiles)
    literal = torch.zeros(shape)
    for place in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        *expert, i, j = place
        literal[tuple(place)] = q.float()[tuple(place)] * scale[(*expert, i // rows, j // columns)]
    assert torch.equal(from_blocks(q, scale, (rows, columns)), literal)
    assert torch.equal(from_blocks(q, torch.tensor(0.5), None), q.float() * 0.5)


def fp8(W, block: int = 32):
    """(q, scale) of W in square tiles, as DeepSeek-V3 makes them: the largest of a tile is 448."""
    rows, columns = (-(-n // block) for n in W.shape)
    scale = torch.stack([torch.stack([W[i * block : (i + 1) * block, j * block : (j + 1) * block].abs().max()
                                      for j in range(columns)]) for i in range(rows)]) / 448  # fmt: skip
    wide = scale.repeat_interleave(block, 0)[: W.shape[0]].repeat_interleave(block, 1)[:, : W.shape[1]]
    return (W / wide).to(torch.float8_e4m3fn), scale


def test_fp8_modules_and_folders(base, tmp_path, caplog):
    """transformers' FP8Linear, and a folder in DeepSeek's layout, which transformers dequantises where there is no GPU."""
    pytest.importorskip("accelerate")
    fine = pytest.importorskip("transformers.integrations.finegrained_fp8")
    model, plain, state = mamba(), mamba(), load_file(base / "model.safetensors")
    for layer, name in PLACES:
        old = matrix(model, layer, name)
        q, scale = fp8(old.weight.detach())
        new = fine.FP8Linear(old.in_features, old.out_features, block_size=(32, 32))
        new.weight, new.weight_scale_inv = (torch.nn.Parameter(x, requires_grad=False) for x in (q, scale))
        setattr(model.backbone.layers[layer].mixer, name, new)
        matrix(plain, layer, name).weight.data.copy_(from_blocks(q, scale, (32, 32)))
        stem = f"backbone.layers.{layer}.mixer.{name}.weight"
        state[stem], state[f"{stem}_scale_inv"] = q, scale
    caplog.set_level(logging.INFO, "gatedlens")
    check(gl.wrap(model), plain, "6 matrices are dequantised as read, into float32: 6 of fp8 in blocks", caplog)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    asked = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    asked["modules_to_not_convert"] = ["dt_proj", "lm_head"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": asked}))
    caplog.clear()
    if torch.cuda.is_available():
        pytest.skip("a GPU keeps fp8 as it is")
    check(
        gl.from_pretrained(tmp_path, device="cpu"), plain, "6 matrices were dequantised while loading, fp8 into", caplog
    )


@torch.no_grad()
def test_fp8_experts():
    """Experts that stand in one tensor, of a model with a router."""
    fine = pytest.importorskip("transformers.integrations.finegrained_fp8")
    model = gl.HookedQwen3Next.tiny().wrapped
    plain, config = copy.deepcopy(model), model.config
    sparse = {layer: block for layer, block in enumerate(model.model.layers) if "experts" in block.mlp._modules}
    for layer, block in sparse.items():
        old = block.mlp.experts
        new = fine.FP8Experts(config, block_size=(8, 8))
        for name in ("gate_up_proj", "down_proj"):
            parts = [fp8(W, 8) for W in getattr(old, name)]
            q, scale = (torch.stack([part[i] for part in parts]) for i in (0, 1))
            setattr(new, name, torch.nn.Parameter(q, requires_grad=False))
            setattr(new, f"{name}_scale_inv", torch.nn.Parameter(scale, requires_grad=False))
            getattr(plain.model.layers[layer].mlp.experts, name).data.copy_(from_blocks(q, scale, (8, 8)))
        block.mlp.experts = new
    hooked, want = gl.wrap(model), gl.wrap(plain)
    assert sparse and "fp8 in blocks, of all experts" in hooked.as_read.told()
    tokens = torch.randint(hooked.cfg.d_vocab, (2, 7))
    names = lambda name: True  # noqa: E731
    got, wanted = (one.run_with_cache(tokens, names_filter=names)[1] for one in (hooked, want))
    assert all(torch.allclose(got[name], wanted[name], atol=1e-5) for name in wanted)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "aqlm", "quanto"])
def test_other_methods_are_refused_by_name(method, base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    for open_ in (gl.from_pretrained, gl.inspect):
        with pytest.raises(
            gl.CheckpointError, match=f"quantization_config is .*{method}.*null, or of bitsandbytes, torchao"
        ):
            open_(tmp_path)


def test_a_missing_package_names_the_extra(base, tmp_path, monkeypatch):
    from gatedlens.formats import quantisation

    monkeypatch.setitem(quantisation.PACKAGES, "bitsandbytes", "no_such_package")
    with pytest.raises(ImportError, match=r"needs no_such_package, .*gatedlens\[quantised\]"):
        quantisation.need({"load_in_8bit": True})
    quantisation.need({"quant_method": "fp8"})
