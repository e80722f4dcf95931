"""Engines: what is done with each batch of a harvest, and who does it.

    work = Work(model, layouts)                 # rows -> {name: [entry, ...]}, equal to run_with_cache's bit for bit
    job = Reduce(work, reductions)              # rows -> the statistics of those tensors instead
    for rows, tensors in local(job, batches): ...
    for rows, tensors in ray(workers=2)(job, batches): ...

A job is all that a worker needs, here or on another machine. Results come back in the order of the batches, whoever did them.

Ray: one actor a worker holds the model; a few batches are under way at a time, so memory stays constant; an actor that
dies is started again and its batches done again (Ray's own restarts and retries). The results are collected in order and
committed by one process, so the files are those of the local engine, to the bit. (Ray Data's `map_batches` would want
the corpus as a data set of its own first, and commits nothing before its end.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gatedlens.address.composite import picked
from gatedlens.errors import InputError, did_you_mean
from gatedlens.files import optional
from gatedlens.model.base import HookedModel
from gatedlens.store.corpus.batches import Rows
from gatedlens.store.disk.layout import Layout, last_layer
from gatedlens.store.statistics import Reduction

# -- what is done with a batch --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """`work(rows)`: the activations of one batch at the points of `layouts`, {name: [entry, ...]}, on the CPU."""

    model: HookedModel
    layouts: tuple[Layout, ...]

    @torch.no_grad()
    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        cache = activations(self.model, rows, [layout.name for layout in self.layouts])
        return {layout.name: layout.flat(self._kept(layout, cache[layout.name]), rows.keep) for layout in self.layouts}

    def _kept(self, layout: Layout, activation: Tensor) -> Tensor:
        """The entries of an activation that are harvested."""
        point = self.model.names.points[layout.name]
        return picked(activation, point, layout.kept, self.model.cfg.sizes) if layout.kept else activation


@dataclass(frozen=True)
class Reduce:
    """`reduce(rows)`: the parts of one batch, {"point/reduction/field": tensor}, of what `work` gives for it."""

    work: Work
    reductions: tuple[Reduction, ...]

    @torch.no_grad()
    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        tensors = self.work(rows)
        found: dict[str, Tensor] = {}
        for layout in self.work.layouts:
            first = rows.first_token if layout.per == "token" else rows.first_row
            for reduction in self.reductions:
                part = reduction.of(tensors[layout.name], first)
                found |= {f"{layout.name}/{reduction.name}/{field}": value for field, value in part.items()}
        return found


def activations(model: HookedModel, rows: Rows, names: list[str]) -> dict[str, Tensor]:
    """What `run_with_cache` gives for the batch; blocks and the unembedding that none of the points needs are not run."""
    stop = last_layer(names)
    wants = "logits" if stop is None else None
    given: dict[str, Any] = {} if rows.mask is None else {"attention_mask": rows.mask}
    _, cache = model.run_with_cache(
        rows.value,
        names_filter=names,
        device="cpu",
        return_cache_object=False,
        return_type=wants,
        stop_at_layer=stop,
        **given,
    )
    return cache


# -- who does it ----------------------------------------------------------------------------------------------------

Job = Callable[[Rows], dict[str, Tensor]]
Engine = Callable[[Job, Iterable[Rows]], Iterator[tuple[Rows, dict[str, Tensor]]]]
# What `engine=` takes. For editors: another kind gets the error of `engine`.
if TYPE_CHECKING:
    EngineLike: TypeAlias = str | Engine
else:
    EngineLike = Any
AHEAD = 2  # batches that each worker has waiting


def local(job: Job, batches: Iterable[Rows]) -> Iterator[tuple[Rows, dict[str, Tensor]]]:
    """In this process, one after the other."""
    for rows in batches:
        yield rows, job(rows)


class Worker:
    """What runs in a Ray actor: the job, with as many threads as the process that asked for it, so that sums agree."""

    def __init__(self, job: Job, threads: int):
        torch.set_num_threads(threads)
        self.job = job

    def do(self, rows: Rows) -> dict[str, Tensor]:
        return self.job(rows)


def ray(workers: int = 2) -> Engine:
    """`ray(workers=2)`: an engine on a Ray cluster, the one that `ray.init` was told of, or else this machine.

    InputError for fewer than one worker; ImportError, when the harvest begins, without the package ray.
    """
    if workers < 1:
        raise InputError(f"workers={workers}: at least one has to work.")

    def run(job: Job, batches: Iterable[Rows]) -> Iterator[tuple[Rows, dict[str, Tensor]]]:
        cluster = optional("ray", "scale")
        if not cluster.is_initialized():
            cluster.init(log_to_driver=False)
        gpus = 1 if torch.cuda.is_available() else 0
        actor = cluster.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(Worker)
        shared = cluster.put(job)  # once for all actors
        actors = [actor.remote(shared, torch.get_num_threads()) for _ in range(workers)]
        waiting: deque[tuple[Rows, Any]] = deque()
        try:
            for i, rows in enumerate(batches):
                waiting.append((rows, actors[i % workers].do.remote(rows)))
                if len(waiting) == AHEAD * workers:
                    first, answer = waiting.popleft()
                    yield first, _own(cluster.get(answer))
            while waiting:
                first, answer = waiting.popleft()
                yield first, _own(cluster.get(answer))
        finally:
            for one in actors:
                cluster.kill(one)

    return run


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ray hands out read-only views into its object store."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


ENGINES: dict[str, Callable[[int], Engine]] = {"local": lambda workers: local, "ray": ray}


def engine(name: EngineLike, workers: int) -> Engine:
    """The engine of this name, or the function that was given."""
    if callable(name):
        return name
    if name not in ENGINES:
        raise InputError(f"engine={name!r}: it is {' or '.join(map(repr, ENGINES))}.{did_you_mean(str(name), ENGINES)}")
    return ENGINES[name](workers)
