"""Probes: what can be read off an activation by a linear map, what that is worth, and whether the model uses it.

    cache = model.run_with_cache(tokens, names_filter="blocks.*.hook_resid_post")[1]
    found = gl.probes.sweep(cache, labels, "blocks.*.hook_resid_post", pos=[3, -1])       # measure x layer x pos
    found.at(measure="accuracy").plot()
    probe = gl.probes.fit(cache, labels, ("resid_post", 1), pos=-1)                      # a Probe
    with probe.ablate(pos=-1, labels=labels, of="1").on(model): ...                      # take it away, in the rows of one class
    with probe.placebo(seed=1).ablate(pos=-1).on(model): ...                             # as far, another way

A store (`gl.store.open`) goes where a cache does. Controls: shuffled labels (always), `untrained` (a model that has learnt
nothing), `Probe.placebo` and `matched_rows` (as large, at random). scikit-learn fits: `pip install "gatedlens[probes]"`."""

from gatedlens.probes.probe import Probe, matched_rows
from gatedlens.probes.sweeping import fit, sweep
from gatedlens.runs.untrained import untrained

# fmt: off
__all__ = [
    "Probe", "fit", "matched_rows", "sweep", "untrained",
]
# fmt: on
