"""TracedModel: a hooked model in nnsight's hands.

    traced = model.nnsight()
    with traced.trace("Call me Ishmael") as tracer:
        gate = traced.hook("blocks.1.mixer.hook_gate").output.save()      # read; any of our names and aliases
        traced.hook("blocks.0.hook_mixer_out").output[:] = 0              # set
        cache = tracer.activations("blocks.*.mixer.hook_dt")              # an ActivationCache, by our names
    with traced.generate("Call me", max_new_tokens=3) as tracer:
        for step in tracer.iter[:]:
            state = traced.hook("blocks.0.mixer.hook_state").output.save()

`nnsight.NNsight(model)` works as well. This adds: several invokes in one forward (texts or ids; shorter ones are padded on the
left, as nnsight's own models do, and the mask keeps every row exact), `generate`, points by name, caches by name. A lazy
point is built when a trace asks for it. nnsight instruments a model for good; outside a trace that costs a point
a microsecond or two. Needs the extra `gatedlens[nnsight]`; nothing else in gatedlens imports nnsight.

After `import nnsight`, write `with loss.backward():` blocks on lines of their own: a one-line `with ...: loss.backward()` does
nothing.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedlens.address.names import Name, NamesFilter
from gatedlens.errors import InputError, PointError
from gatedlens.model.batch import Batch
from gatedlens.model.cache import ActivationCache

try:
    import nnsight
except ImportError as error:
    raise ImportError("model.nnsight() needs nnsight 0.8: pip install 'gatedlens[nnsight]'.") from error
from nnsight.intervention.envoy import traceable
from nnsight.intervention.interleaver import Mediator
from nnsight.intervention.tracer import InterleavingTracer

from gatedlens.model.base import HookedModel

READING = (
    "prepend_bos",
    "padding_side",
    "attention_mask",
    "start_at_layer",
)  # the options that tell how to read an input


def join(batches: list[Batch]) -> Batch:
    """The rows of several inputs as one batch; token rows that are shorter are padded on the left and masked."""
    if len({batch.value.shape[1:] for batch in batches}) == 1 and all(batch.mask is None for batch in batches):
        return Batch(torch.cat([batch.value for batch in batches]), is_resid=batches[0].is_resid)
    if any(batch.value.ndim != 2 for batch in batches):
        shapes = ", ".join(str(list(batch.value.shape)) for batch in batches)
        raise InputError(f"The invokes have the shapes {shapes}: only tokens can be padded to one length.")
    longest = max(batch.value.shape[1] for batch in batches)
    values, masks = [], []
    for batch in batches:
        missing = (longest - batch.value.shape[1], 0)
        mask = torch.ones_like(batch.value, dtype=torch.bool) if batch.mask is None else batch.mask
        values.append(F.pad(batch.value, missing))
        masks.append(F.pad(mask, missing, value=False))
    return Batch(torch.cat(values), torch.cat(masks))


class TracedModel(nnsight.NNsight):
    """`model.nnsight()`: nnsight's envoy of `model`, its module tree with `.output`, `.input`, `.skip` on every point."""

    def __init__(self, model: HookedModel):
        with warnings.catch_warnings():  # about modules of the wrapped model, which are never called
            warnings.filterwarnings("ignore", message="Module 'model.wrapped")
            super().__init__(model)
        self.batch: Batch | None = None  # what the trace under way runs on, for its caches

    def hook(self, name: Name) -> Any:
        """The envoy of a point, by its full name or another tool's: `traced.hook("blocks.1.hook_skip").output`.

        PointError for a name that is computed from several points: hook those.
        """
        found = self._module.names.find(name)
        if found.view is not None:
            parts = ", ".join(found.needs()) or "a parameter"
            raise PointError(f"{name!r} is computed from {parts}: it has no module of its own to trace.")
        return self.get(found.name)

    def trace(self, *args: Any, tracer_cls: Any = None, **kwargs: Any) -> Any:
        """As nnsight's; `input` is whatever the model reads. The tracer has `activations` beside nnsight's methods."""
        return super().trace(*args, tracer_cls=tracer_cls or Tracer, **kwargs)

    @traceable
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`with traced.generate("Call me", max_new_tokens=3) as tracer: ...`; `tracer.result` is what it returns."""
        return self._module.generate(*args, **kwargs)

    def _read(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        options = {name: kwargs[name] for name in READING if name in kwargs}
        return self._module.prepare(inputs[0], **options)[0]

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        """How many rows an input has; nnsight asks. 0 if these are options alone."""
        return self._read(inputs, kwargs).value.shape[0] if inputs else 0

    def _batch(self, invokes: list[tuple[Any, Any]], fn: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of one call for all invokes; nnsight asks. A single one goes to the model as it is."""
        self.batch = None
        if not invokes:
            return (), {}
        if len(invokes) == 1:
            inputs, kwargs = invokes[0]
            self.batch = self._read(inputs, kwargs) if fn == "__call__" else None
            return inputs, kwargs
        for inputs, kwargs in invokes:
            if len(inputs) > 1 or set(kwargs) - set(READING[:3]):
                raise InputError(
                    f"tracer.invoke took {[*inputs[1:], *set(kwargs) - set(READING[:3])]} beside its input: with several "
                    "invokes, options of the whole run go to trace() or generate()."
                )
        self.batch = join([self._read(inputs, kwargs) for inputs, kwargs in invokes])
        return (self.batch,), {}


class Tracer(InterleavingTracer):
    """What `with traced.trace(...) as tracer` gives: nnsight's tracer, and caches keyed by our names."""

    def activations(self, names_filter: NamesFilter = None, device: Any = None, detach: bool = True) -> Visits:
        """`cache = tracer.activations("blocks.*.mixer.hook_dt")`, before anything is read or set in the block.

        names_filter: as run_with_cache's (None: every point that is not lazy). Within an invoke: that invoke's rows. Values
        are those after all edits. Read it after the block; see `Visits`.
        """
        traced, model = self.envoy, self.envoy._module
        names = dict.fromkeys(name for group in model.names.select(names_filter) for name in group)
        envoys = {name: traced.get(name) for name in names}
        view = self.cache(modules=list(envoys.values()), device=device, detach=detach)
        group = Mediator.current("tracer.activations()").batch_group
        batch = traced.batch
        tokens = None if batch is None or batch.is_resid else self.batcher.narrow(batch.value, group)
        mask = None if batch is None or batch.mask is None else self.batcher.narrow(batch.mask, group)
        options = {**self.batcher.kwargs, **self.kwargs}
        documents = None if batch is None else model.documents(batch, options.get("position_ids"))
        documents = None if documents is None else self.batcher.narrow(documents, group)
        given = {"tokens": tokens, "mask": mask, "state": options.get("state"), "documents": documents}
        paths = {name: envoy.path for name, envoy in envoys.items()}
        return nnsight.save(Visits(model, view, paths, given))


class Visits:
    """What a trace cached: one ActivationCache for each time that the model ran, `len(visits)` of them.

    `visits["dt", 0]` and whatever else an ActivationCache answers, where the model ran once; `visits[2]` is the cache of
    the third run of a generation. Tokens, mask and state are those of the first run, if the trace was no generation;
    a later run's cache holds some positions of its sequence and says so (`sliced`).
    """

    def __init__(self, model: HookedModel, view: Any, paths: dict[str, str], given: dict[str, Any]):
        self.model, self.view, self.paths, self.given = model, view, paths, given

    def _values(self, name: str) -> list[Tensor]:
        if self.paths[name] not in self.view:
            return []
        output = self.view[self.paths[name]].output
        return output if isinstance(output, list) else [output]

    def __len__(self) -> int:
        return max(len(self._values(name)) for name in self.paths)

    @overload
    def __getitem__(self, key: int) -> ActivationCache: ...

    @overload
    def __getitem__(self, key: Any) -> Tensor: ...

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str | tuple):
            return self.once()[key]
        runs, run = len(self), operator.index(key)
        if not -runs <= run < runs:
            raise InputError(f"visits[{run}]: the model ran {runs} times in this trace.")
        run = run % runs
        values = {name: values[run] for name in self.paths if len(values := self._values(name)) > run}
        whole = run == 0 and self.given["tokens"] is not None
        return ActivationCache(values, self.model, **(self.given if whole else {}), sliced=not whole)

    def __iter__(self) -> Iterator[ActivationCache]:
        return (self[run] for run in range(len(self)))

    def once(self) -> ActivationCache:
        """The only cache there is; InputError where the model ran several times, or not at all."""
        if len(self) != 1:
            raise InputError(f"The model ran {len(self)} times in this trace: say which, as in visits[0].")
        return self[0]

    def __repr__(self) -> str:
        return f"Visits({len(self)} runs of {len(self.paths)} points)"
