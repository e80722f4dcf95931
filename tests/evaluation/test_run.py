"""Whole runs: tables, going on after an interruption, refusals, the report, explainers by name."""

from __future__ import annotations

import dataclasses
import json
import re
import time

import pytest
import torch

import gatedlens as gl
from gatedlens import attribution, evaluation
from gatedlens.evaluation import Listed, Prompt, Sample, ScoreTable, evaluate, explainer, report
from gatedlens.evaluation import run as measurement
from gatedlens.evaluation.records import LINES, RUN
from gatedlens.runs.fingerprints import checksum, fingerprint, settings
from tests.helpers import example

METHODS = ["lrp", "rollout:factors=hidden,sign=abs"]


def samples_of(model, n=3):
    inputs = example(model, n)
    if model.grid is None:
        return Listed("mine", [Sample(f"s{i}", row.tolist(), i, truth=(i,)) for i, row in enumerate(inputs)])
    mask = torch.zeros(model.image_shape[1:], dtype=torch.long)
    mask[:4] = 1
    return Listed("mine", [Sample(f"s{i}", row, i, mask) for i, row in enumerate(inputs)])


def run(model, samples=None, methods=METHODS, **options):
    nothing = 9 if model.grid is None else None
    return evaluate(
        model,
        samples_of(model) if samples is None else samples,
        methods,
        **{"progress": False, "nothing": nothing, "batch_size": 2, **options},
    )


def test_a_run_is_the_functions_put_together(model):
    found, input = run(model), example(model, 3)
    labels, option = [0, 1, 2], {"nothing": 9} if model.grid is None else {}
    for name, method in zip(METHODS, (attribution.lrp, attribution.rollout), strict=True):
        scores = method(model, input, torch.tensor(labels), **explainer(name).options)
        for protocol in found.protocols:
            want = evaluation.curve(
                evaluation.PROTOCOLS[protocol], model, input, scores, labels, progress=False, **option
            )
            assert torch.allclose(found.curve(name, protocol).values, want.values, rtol=1e-5, atol=1e-9)
            assert found.curve(name, protocol).facts["nothing"] == want.facts["nothing"]
        if model.grid is None:
            truth = torch.eye(3, input.shape[1], dtype=torch.bool)
            free = torch.ones_like(truth)
            free[:, -1] = False
            want = evaluation.located(scores, truth, free)
            assert [row["truth"]["rank"] for row in found.rows(name)] == want.rank.tolist()
        else:
            masks = torch.stack([s.mask for s in samples_of(model)])
            want = evaluation.segmentation(scores, masks)
            assert found.segmentation(name).mean_iou.value == pytest.approx(want.mean_iou.value, abs=1e-5)
    table = found.table()
    area = found.curve("lrp", "negative", "probability").area
    assert table["lrp", "negative probability"] == area and len(table) == 2
    assert ("mIoU" in table.columns) == (model.grid is not None) and ("rank" in table.columns) == (model.grid is None)
    assert not model.list_hooks()


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    model = gl.HookedMamba.tiny(seed=0, dtype=torch.float64)
    want = run(model).to_dict()
    real, calls = measurement._measure, []

    def failing(model, one, items, shown, nothing):
        calls.append((one.name, [item.sample.name for item in items]))
        for i, row in enumerate(real(model, one, items, shown, nothing)):
            if len(calls) == 2 and i == 1:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(measurement, "_measure", failing)
    with pytest.raises(KeyboardInterrupt):
        run(model, out=tmp_path)
    assert len((tmp_path / LINES).read_text().splitlines()) == 3 and not model.list_hooks()
    with (tmp_path / LINES).open("a") as file:
        file.write('{"sample": "s1", "meth')  # cut off while it was written
    calls.clear()
    calls.append(("", []))
    calls.append(("", []))
    found = run(model, out=tmp_path)
    assert calls[2:] == [(METHODS[0], ["s2"]), (METHODS[1], ["s1", "s2"])], "nothing is measured twice"
    assert len((tmp_path / LINES).read_text().splitlines()) == 6
    assert found.to_dict() == want
    calls.clear()
    assert len(run(model, out=tmp_path, limit=2).names) == 2 and not calls, "fewer samples are no other run"
    more = run(model, out=tmp_path, methods=[*METHODS, "random"])
    assert {name for name, _ in calls} == {"random"} and len(more.table()) == 3


def test_another_run_is_refused(tmp_path):
    model, other = gl.HookedMamba.tiny(seed=0), gl.HookedMamba.tiny(seed=1)
    run(model, out=tmp_path, methods=["random"])
    with pytest.raises(gl.InputError, match="holds another run: weights was"):
        run(other, out=tmp_path, methods=["random"])
    mine = Listed("others", [Sample("s0", [1, 2, 3])])
    with pytest.raises(gl.InputError, match="data was 'mine' and is now 'others'"):
        run(model, mine, out=tmp_path, methods=["random"])
    with pytest.raises(gl.InputError, match="nothing was 9 and is now 3"):
        run(model, out=tmp_path, nothing=3)
    (tmp_path / LINES).write_text('{"sample": 1}\n')
    with pytest.raises(gl.InputError, match=r"records\.jsonl, line 1 is broken: it is no record"):
        run(model, out=tmp_path)
    (tmp_path / RUN).write_text("{")
    with pytest.raises(gl.InputError, match=r"run\.json is broken"):
        run(model, out=tmp_path)
    (tmp_path / RUN).unlink()
    with pytest.raises(gl.InputError, match=r"holds records\.jsonl but no run\.json"):
        run(model, out=tmp_path)
    with pytest.raises(gl.InputError, match="is a file"):
        run(model, out=tmp_path / LINES)


def edited(records, line, *edits):
    """The folder's records with one line edited."""
    lines = records.read_text().splitlines(keepends=True)
    for old, new in edits:
        assert old in lines[line]
        lines[line] = lines[line].replace(old, new, 1)
    records.write_text("".join(lines))


def test_every_number_of_the_weights_is_compared(hooked):
    """The first and the last of every parameter and buffer, and what a module computes by besides them."""
    model = hooked.tiny(seed=0)
    before, same = fingerprint(model), settings(model)
    assert fingerprint(hooked.tiny(seed=0)) == before and settings(hooked.tiny(seed=0)) == same
    for tensor in [*model.wrapped.parameters(), *model.wrapped.buffers()]:
        for place in (0, -1):
            flat = tensor.detach().reshape(-1)
            if not tensor.is_floating_point() or flat.data_ptr() != tensor.data_ptr():
                continue
            kept = flat[place].clone()
            flat[place] = kept + 1
            assert fingerprint(model) != before
            flat[place] = kept
    assert fingerprint(model) == before
    assert fingerprint(hooked.tiny(seed=0, dtype=torch.float64)) != before
    found = {
        name: module
        for name, module in model.wrapped.named_modules()
        if {"eps", "variance_epsilon"} & vars(module).keys()
    }
    name, module = next(iter(found.items()))
    eps = "eps" if "eps" in vars(module) else "variance_epsilon"
    vars(module)[eps] *= 2
    assert settings(model) != same and fingerprint(model) == before
    vars(module)[eps] /= 2
    assert settings(model) == same
    holder, _, last = name.rpartition(".")
    setattr(model.wrapped.get_submodule(holder), last, torch.nn.Identity())
    assert settings(model) != same


def test_a_large_model_is_compared_in_no_time():
    weights = torch.zeros(30_000_000)
    start = time.perf_counter()
    one = checksum(weights)
    assert time.perf_counter() - start < 2
    weights[29_999_999] = 1e-30
    assert checksum(weights) != one != checksum(weights.reshape(2, -1)) and checksum(weights[:0]) != one
    assert checksum(torch.tensor(1.0)) != checksum(torch.tensor([1.0])) != checksum(torch.tensor([1.0]).bfloat16())


def test_another_model_data_or_record_is_refused(tmp_path):
    """Whatever decides the numbers: all of the weights, settings, hooks, the version, the samples, the records themselves."""
    model = gl.HookedMamba.tiny(seed=0)
    run(model, out=tmp_path, methods=["random"])
    assert len(run(model, out=tmp_path, methods=["random"]).table()) == 1

    hooks = [("blocks.0.hook_mixer_out", lambda x, hook: x * 2)]
    with (
        model.hooks(hooks),
        pytest.raises(gl.InputError, match=r"hooks was None and is now \['blocks.0.hook_mixer_out'\]"),
    ):
        run(model, out=tmp_path, methods=["random"])
    with model.hooks(hooks):
        run(model, out=tmp_path / "hooked", methods=["random"])
        with pytest.raises(gl.InputError, match="hooks at blocks.0.hook_mixer_out: whether they do what they did"):
            run(model, out=tmp_path / "hooked", methods=["random"])
    with torch.no_grad():
        model.W_U[-1, -1] += 1
    with pytest.raises(gl.InputError, match="weights was"):
        run(model, out=tmp_path, methods=["random"])
    with torch.no_grad():
        model.W_U[-1, -1] -= 1
    held = samples_of(model).samples
    for change in (
        {"input": [*held[1].input[:-1], (held[1].input[-1] + 1) % model.cfg.d_vocab]},
        {"label": 5},
        {"truth": (2,)},
    ):
        other = Listed("mine", [held[0], dataclasses.replace(held[1], **change), held[2]])
        with pytest.raises(gl.InputError, match="holds another s1: the sample is not what it was"):
            run(model, other, out=tmp_path, methods=["random"])
    assert len(run(model, out=tmp_path, methods=["random", "lrp"]).table()) == 2, "the refused calls spoilt nothing"

    edited(tmp_path / LINES, 1, ('"correct": false', '"correct":  true'))
    with pytest.raises(gl.InputError, match=r"records\.jsonl, line 2 is broken: it is not as it was written"):
        run(model, out=tmp_path, methods=["random"])
    edited(tmp_path / LINES, 1, ('"correct":  true', '"correct": false'))
    for key, value in (
        ("gatedlens", "0.0.1"),
        ("format", 1),
        ("settings", "0"),
        ("hooks", ["blocks.0.hook_mixer_out"]),
    ):
        text = (tmp_path / RUN).read_text()
        (tmp_path / RUN).write_text(json.dumps({**json.loads(text), key: value}))
        with pytest.raises(gl.InputError, match=f"holds another run: {key} was"):
            run(model, out=tmp_path, methods=["random"])
        (tmp_path / RUN).write_text(text)


def test_another_image_or_mask_of_one_name_is_refused(tmp_path):
    model = gl.HookedViM.tiny(seed=0)
    run(model, out=tmp_path, methods=["random"])
    held = samples_of(model).samples
    for change in ({"input": held[1].input + 1e-9}, {"mask": 1 - held[1].mask}):
        other = Listed("mine", [held[0], dataclasses.replace(held[1], **change), held[2]])
        with pytest.raises(gl.InputError, match="holds another s1"):
            run(model, other, out=tmp_path, methods=["random"])


@pytest.mark.parametrize("cut", [1, 2, 4, 5])
def test_it_goes_on_in_other_batches(model, cut, tmp_path):
    """Stopped after any record, and continued in batches of another size: the same numbers."""
    methods = ["lrp", "gradient_attention"]
    want = run(model, methods=methods, batch_size=3)
    run(model, methods=methods, out=tmp_path, batch_size=1)
    lines = (tmp_path / LINES).read_text().splitlines(keepends=True)
    (tmp_path / LINES).write_text("".join(lines[:cut]))
    found = run(model, methods=methods, out=tmp_path)
    assert found.to_dict()["samples"] == want.to_dict()["samples"]
    for method in methods:
        for protocol in found.protocols:
            a, b = (one.curve(method, protocol).values for one in (found, want))
            assert torch.allclose(a, b, rtol=2e-5, atol=1e-12), "six figures are kept"
            clean = {"pruning": 0, "deletion": 0, "activation": -1, "insertion": -1}.get(protocol)
            assert clean is None or torch.equal(a[:, clean], b[:, clean]), "an unchanged input is no other input"


def test_a_call_that_measured_nothing_binds_nobody(tmp_path):
    model = gl.HookedMamba.tiny(seed=0)
    with pytest.raises(gl.InputError, match="nothing=999"):
        run(model, out=tmp_path, methods=["random"], nothing=999)
    assert len(run(model, out=tmp_path, methods=["random"]).records) == 3


def test_another_image_of_nothing_is_another_run(tmp_path):
    model = gl.HookedViM.tiny(seed=0)
    nothing = torch.zeros(model.image_shape)
    run(model, out=tmp_path, methods=["random"], nothing=nothing)
    run(model, out=tmp_path, methods=["random"], nothing=nothing.clone())
    with pytest.raises(gl.InputError, match=r"nothing was 'a tensor, \w+' and is now"):
        run(model, out=tmp_path, methods=["random"], nothing=nothing + 1)


def test_methods_put_in_what_the_test_puts_in():
    model = gl.HookedViM.tiny(seed=0, dtype=torch.float64)
    black = -torch.tensor(model.cfg.image_mean) / torch.tensor(model.cfg.image_std)
    image = torch.full(tuple(model.image_shape), 0.7)
    for nothing, baseline in (("mean", 0.0), (0.5, 0.5), (image, image), ("blur", "black"), (None, "black")):
        found = run(model, methods=["occlusion"], nothing=nothing)
        want = attribution.occlusion(model, example(model, 3), torch.tensor([0, 1, 2]), baseline=baseline)
        got = torch.tensor([row["scores"] for row in found.rows("occlusion")], dtype=torch.float64)
        assert torch.allclose(got, want.scores, rtol=1e-5, atol=1e-9), nothing
    assert bool((black != 0).any()), "black is another nothing than the mean"


def test_samples_with_and_without_a_mask_or_a_truth():
    model = gl.HookedViM.tiny(seed=0, dtype=torch.float64)
    held = samples_of(model).samples
    bare = Listed("mine", [Sample("bare", example(model, 4)[3], 1), *held])
    want, found = run(model), run(model, bare)
    assert found.segmentation("lrp").mean_iou == want.segmentation("lrp").mean_iou
    assert "mIoU" in found.table().columns
    model = gl.HookedMamba.tiny(seed=0, dtype=torch.float64)
    some = Listed("mine", [Sample("bare", [3, 1, 2], 1), *samples_of(model).samples])
    assert found.run["samples"] == 4 and run(model, some).table()["lrp", "rank"] == run(model).table()["lrp", "rank"]
    with pytest.raises(gl.InputError, match=r"out: truth=\(9,\); give positions from 0 to 3"):
        run(model, Listed("mine", [Sample("out", [1, 2, 3, 4], 1, truth=(9,))]))


def test_prompts_are_measured_among_their_answers(moby_model):
    rows = [
        Sample(f"r{i}", Prompt(text, "It is ", " or not: ", ("yes", "no")), i)
        for i, text in enumerate(["good", "so very bad"])
    ]
    found = evaluate(moby_model, Listed("prompts", rows), ["lrp"], progress=False)
    alone = [evaluate(moby_model, Listed("prompts", [row]), ["lrp"], progress=False) for row in rows]
    for protocol in ("negative", "activation"):
        got = found.curve("lrp", protocol, "probability").values
        want = torch.cat([one.curve("lrp", protocol, "probability").values for one in alone])
        assert torch.allclose(got, want, atol=1e-4)
    p = {}
    with torch.no_grad():
        logits = moby_model("It is good or not: ")[0, -1]
    p = logits[[ord("y"), ord("n")]].softmax(-1)[0]
    assert found.curve("lrp", "activation").values[0, -1] == pytest.approx(float(p), abs=1e-5)
    assert found.rows("lrp")[1]["explained"] == ord("n")
    assert f"r1: explained is {ord('n')} (&#x27;n&#x27;)" in report(found, moby_model).page(), "a token in words"


def test_the_report_of_a_run_is_one_page(model, tmp_path):
    found = run(model)
    page = report(found, model).save(tmp_path / "r.html").read_text()
    assert "http" not in page and page.count("<polyline") == 2 * sum(
        len(evaluation.result.MEASURED[p]) for p in found.protocols
    )
    assert "rollout:factors=hidden,sign=abs" in page and "nan" not in page.lower().replace("nanmean", "")
    assert "s1: explained is 1" in page
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(images) == (0 if model.grid is None else 3 * 3)
    if images:
        import base64
        import io

        from PIL import Image

        pixels = Image.open(io.BytesIO(base64.b64decode(images[1])))
        scores = torch.tensor(found.rows("lrp")[0]["scores"])
        assert pixels.size == (model.grid.columns, model.grid.rows)
        at = divmod(int(scores.abs().argmax()), model.grid.columns)
        want = (214, 41, 41) if scores[at] > 0 else (28, 79, 217)
        assert all(abs(a - b) <= 1 for a, b in zip(pixels.getpixel((at[1], at[0])), want, strict=True))
    data = json.loads(found.save(tmp_path / "r.json").read_text())
    assert len(data["table"]["cells"]) == 2 * len(found.table().columns)
    assert len(data["curves"]["lrp"]["positive accuracy"]) == len(data["shares"]["positive"]) == 9


def test_a_single_sample_has_no_interval():
    model = gl.HookedMamba.tiny()
    found = run(model, limit=1, methods=["random"])
    cells = found.table().to_dict()["cells"]
    assert all(cell["low"] is None and cell["value"] is not None for cell in cells)
    assert "NaN" not in json.dumps(found.to_dict()) and "nan" not in report(found).page()


def test_tables(tmp_path):
    one = evaluation.Estimate
    rows = {"a": {"up": one(1, 0.5, 1.5), "down": one(2, 1, 3)}, "b<b>": {"up": one(3, 2, 4), "down": one(5.25, 4, 6)}}
    table = ScoreTable("title", rows, {"up": "up", "down": "down"})
    assert table.best("up") == "b<b>" and table.best("down") == "a"
    assert table.markdown().splitlines()[2] == "| a | 1 [0.5, 1.5] | **2 [1, 3]** |"
    assert "b&lt;b&gt;" in table._repr_html_() and "5.25" in str(table)
    frame = table.to_dataframe()
    assert list(frame.columns) == ["method", "metric", "better", "value", "low", "high"] and len(frame) == 4
    assert json.loads(table.save(tmp_path / "t.json").read_text())["cells"][3]["value"] == 5.25
    with pytest.raises(gl.InputError, match="Did you mean 'down'"):
        table["a", "dow"]


def test_explainers_by_name(lm):
    one = explainer("gradient_attention:factors=scan+gate,start_layer=1,own=True")
    assert one.options == {"factors": ("scan", "gate"), "start_layer": 1, "own": True}
    assert explainer("rollout:factors=scan+").options == {"factors": ("scan",)}
    assert explainer("smoothgrad:noise=0.2").options == {"noise": 0.2}
    tokens = example(lm)
    want = attribution.gradient_attention(lm, tokens, 3, factors=("scan", "gate"), start_layer=1, own=True)
    assert torch.equal(one(lm, tokens, 3, progress=False, baseline=9), want)
    for name, message in {
        "lpr": "Did you mean 'lrp'",
        "rollout:factor=hidden": "has no option 'factor'.*Did you mean 'factors'",
        "rollout:hidden": "has no option 'hidden'",
    }.items():
        with pytest.raises(gl.InputError, match=message):
            explainer(name)


def test_wrong_runs_are_explained(lm):
    samples = samples_of(lm)
    for options, message in (
        ({"methods": ["rolout"]}, "Did you mean 'rollout'"),
        ({"methods": "lrp"}, r"give a list, \['lrp'\]"),
        ({"methods": []}, "at least one method"),
        ({"batch_size": 0}, "at least 1"),
        ({"limit": 0}, "limit=0"),
        ({"nothing": 4000}, "is no token"),
    ):
        with pytest.raises(gl.InputError, match=message):
            run(lm, samples, **options)
    with pytest.raises(gl.InputError, match="holds no sample"):
        run(lm, Listed("empty", []))
    with pytest.raises(gl.InputError, match="two samples have one name"):
        run(lm, Listed("twice", [samples[0], samples[0]]), methods=["random"])
    found = run(lm, methods=["random"])
    for ask, message in (
        (lambda: found.curve("randon", "positive"), "Did you mean 'random'"),
        (lambda: found.curve("random", "negativ"), "Did you mean 'negative'"),
        (lambda: found.curve("random", "pruning", "accuracy"), "pruning has squared_error"),
    ):
        with pytest.raises(gl.InputError, match=message):
            ask()


def test_progress_can_be_switched_off(capsys):
    model = gl.HookedMamba.tiny()
    run(model, methods=["random"])
    assert capsys.readouterr().err == ""
    run(model, methods=["random"], progress=True)
    assert "evaluate" in capsys.readouterr().err
