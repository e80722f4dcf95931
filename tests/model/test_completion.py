"""What an editor completes: the types that a checker finds of what a user writes down, by mypy's `reveal_type`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gatedlens as gl

SNIPPET = """
import torch
import gatedlens as gl

model = gl.from_pretrained("gatedlens/mamba-moby")
reveal_type(model)  # gatedlens.model.vision.HookedVisionModel
reveal_type(gl.wrap(torch.nn.Linear(1, 1)))  # gatedlens.model.language.HookedLanguageModel
reveal_type(model("Call me"))  # torch._tensor.Tensor
reveal_type(model("Call me", return_type="loss"))  # torch._tensor.Tensor
reveal_type(model("Call me", return_type="both"))  # gatedlens.model.batch.Output
reveal_type(model.run_with_cache("Call me", names_filter="blocks.*.mixer.*")[1])  # gatedlens.model.cache.ActivationCache
reveal_type(model.run_with_cache("Call me")[0])  # torch._tensor.Tensor
reveal_type(model.run_with_cache("Call me", return_type=None)[0])  # None
reveal_type(model.run_with_cache("Call me", return_cache_object=False)[1])  # dict[str, torch._tensor.Tensor]
reveal_type(model.run_with_cache("Call me")[1]["dt", 3])  # torch._tensor.Tensor
reveal_type(model.run_with_hooks("Call me", fwd_hooks=[]))  # torch._tensor.Tensor
reveal_type(model.hook_table(layer=None))  # gatedlens.address.table.HookTable
with model.hooks() as same:
    reveal_type(same)  # gatedlens.model.vision.HookedVisionModel

mamba = gl.HookedMamba.tiny()
reveal_type(mamba)  # gatedlens.hooks.mamba.HookedMamba
reveal_type(mamba([[1, 2]], return_state=True)[1])  # gatedlens.model.state.RecurrentState
reveal_type(mamba.generate("Call me", max_new_tokens=3))  # str
reveal_type(mamba.generate(torch.zeros(1, 2), 3))  # torch._tensor.Tensor
reveal_type(mamba.to_str_tokens("Call me"))  # list[str]
gl.from_pretraned  # type: ignore[attr-defined]  # that a misspelt name is seen: an ignore without use is an error
reveal_type(gl.HookedViM.tiny()(torch.zeros(1, 3, 12, 12), return_type="both", labels=[1]))  # gatedlens.model.batch.Output
"""


@pytest.mark.slow
def test_an_editor_completes_what_calls_return(tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api")
    root = Path(gl.__file__).parent.parent
    monkeypatch.chdir(root)  # where pyproject.toml tells mypy what the package's annotations are written in
    monkeypatch.setenv("MYPYPATH", str(root))
    (tmp_path / "snippet.py").write_text(SNIPPET, encoding="utf-8")
    cache = ["--cache-dir", str(tmp_path / "cache")]
    told, failed, _ = api.run([*cache, "--follow-imports", "silent", str(tmp_path / "snippet.py")])
    found = {int(line): kind for line, kind in re.findall(r':(\d+): note: Revealed type is "(.*)"', told)}
    wanted = {
        number: line.rpartition("# ")[2] for number, line in enumerate(SNIPPET.split("\n"), 1) if "reveal_type(" in line
    }
    assert found.keys() == wanted.keys(), told + failed
    assert not {line: (kind, found[line]) for line, kind in wanted.items() if kind not in found[line]}
    assert "error:" not in told, told
