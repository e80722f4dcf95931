"""Causal tracing: corrupt the subject, put clean states back one at a time, and see where the prediction returns.

    metric = gl.metrics.probability(model.to_single_token(" Rome"))
    trace = gl.tracing.causal_trace(model, "The Colosseum is in the city of", metric, subject=range(1, 5))
    trace.plot()                                              # layer x pos, subject tokens marked with *
    gl.tracing.causal_trace(model, prompt, metric, subject=[3], window=5, point="mixer.hook_scan")
    gl.tracing.causal_trace(model, prompt, metric, corrupt=other_prompt)      # a counterfactual instead of noise

    effect[l, p] = metric(corrupted, with `point` of layers l - w // 2 .. l + ceil(w / 2) - 1 at p as in the clean run)
                   - metric(corrupted)

the indirect effect, mean over noise samples and rows; windows end where the model does. Meng et al. 2022 (arXiv
2202.05262); for Mamba Sharma, Atkinson and Bau 2024 (arXiv 2404.03646). Many restorations run in one batch, from the
layer and position on at which they are made.
"""

from gatedlens.tracing.corruption import Corruption
from gatedlens.tracing.trace import Positions, causal_trace

# fmt: off
__all__ = [
    "Corruption", "Positions", "causal_trace",
]
# fmt: on
