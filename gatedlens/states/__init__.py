"""State surgery: give a run another run's memory, from some position on, in chosen layers, channels or parts.

    patch = gl.states.patch(other_cache, pos=5, layers=2, channel=slow)      # as any intervention: patch.on(model), a + b
    state = gl.states.splice(model, state_b, state_a, layers=[0, 1], parts="scan")     # b's, with this of a's
    a, b = gl.states.swap(model, a, b, layers=3)
    logits = gl.states.read_through(model, "Ishmael went to sea.", reader, at=4, layers=2)
    model.generate(prompt, state=state)                                      # run B from A's state
    trained = gl.states.optimise(model, prompts, metric)                     # the initial state that makes the model do a task

A recurrence forgets all that its state does not hold: whoever sets the state at t sets what positions after t know of the past,

    decay[t] := 0,  write[t] := the new state        (so state_t is the new state, and later positions follow)

What a model remembers between two calls is a RecurrentState; its `parts` are those of `model.carried`: "scan" (the recurrence),
"conv" or "shift" (the tail of the short window), "window" (of an attention layer), ...
"""

from gatedlens.states.optimising import optimise
from gatedlens.states.surgery import patch, read_through, splice, swap
from gatedlens.states.trained_state import TrainedState

# fmt: off
__all__ = [
    "TrainedState", "optimise", "patch", "read_through", "splice", "swap",
]
# fmt: on
