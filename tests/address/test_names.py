"""Names: look-up, shorthand, globs, near misses; rows that hold together."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.address.names import Names
from gatedlens.hooks.mamba import HookedMamba

MODEL = HookedMamba.tiny()


def test_shorthand_prefers_our_own_points():
    """MambaLens calls the scan's readout `blocks.0.hook_y`; ("y", 0) is our y all the same."""
    assert MODEL.names.short("y", 0).name == "blocks.0.mixer.hook_y"
    assert MODEL.names.find("blocks.0.hook_y").name == "blocks.0.mixer.hook_scan"
    assert MODEL.names.short("delta", 1).name == "blocks.1.mixer.hook_dt"
    assert MODEL.names.short("scale", None, "ln_final").name == "ln_final.hook_scale"
    assert MODEL.names.short("attn_out", 0).name == "blocks.0.hook_mixer_out"


def test_unknown_names_name_the_nearest():
    for wrong, hint in (
        ("blocks.0.mixer.hook_decy", "Did you mean 'blocks.0.mixer.hook_decay'"),
        ("blocks.9.mixer.hook_decay", "It has layers 0 to 1"),
        ("hook_embd", "Did you mean 'hook_embed'"),
        ("completely different", r"hook_table\(\)"),
    ):
        with pytest.raises(gl.PointError, match=hint) as error:
            MODEL.names.find(wrong)
        assert repr(wrong) in str(error.value) and "tiny-mamba" in str(error.value)


def test_points_of_another_architecture_are_recognised():
    names = Names(
        {"hook_embed": MODEL.names["hook_embed"]},
        elsewhere=lambda leaf: ["Griffin"] if leaf == "hook_log_decay" else [],
    )
    with pytest.raises(gl.PointError, match="Griffin has such a point"):
        names.find("mixer.hook_log_decay")


def test_ambiguous_shorthand_is_refused():
    with pytest.raises(gl.PointError, match=r"ambiguous: it may be blocks.0.a.hook_k, blocks.0.b.hook_k"):
        point = MODEL.names["hook_embed"]
        Names({"blocks.0.a.hook_k": point, "blocks.0.b.hook_k": point}, n_layers=1).short("k", 0)


def test_rows_hold_together(hooked):
    """Names are unique, axes begin with batch, every equation but the first block's input is written, sources are named."""
    for rows in hooked.kinds().values():
        assert len({row.name for row in rows}) == len(rows)
        for row in rows:
            assert row.dims[0] == "batch" and row.equation and row.source and row.leaf.startswith("hook_"), row
    sizes = hooked.tiny().cfg.sizes
    known = {"batch", "pos", "key_pos", *sizes}
    assert all(set(row.dims) <= known for rows in hooked.kinds().values() for row in rows)


def test_a_row_knows_its_axes():
    point = MODEL.names["blocks.0.mixer.hook_state"]
    assert point.axis("state") == 3 and point.shape(MODEL.cfg.sizes) == ("batch", "pos", 32, 4)
    with pytest.raises(gl.PointError, match="no axis 'head'; its axes are: batch pos channel state"):
        point.axis("head")


@torch.no_grad()
def test_aliases_only_name_points_that_exist(model):
    for alias, target in model.names.aliases.items():
        assert target in model.names.points and alias not in model.names.points
