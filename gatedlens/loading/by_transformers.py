"""A checkpoint that transformers loads: what the files hold is known to fit before it does, and none of it is left over."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gatedlens.formats import quantisation
from gatedlens.loading.sources import PLACING
from gatedlens.model import checkpoint, fields, fit
from gatedlens.model.checkpoint import reading
from gatedlens.weights import AsRead

log = logging.getLogger("gatedlens")
ONE_OF_MANY = re.compile(
    r".*\.(experts\.(?=\d+\.)|ngram_embedding\.(?=shard_\d+\.))"
)  # tensors that are one in the model
PART = re.compile(r"(model\.)?[a-z_]+(\.\d+)?")  # of a model, of a tensor's name: mtp, model.visual, model.layers.42


def from_transformers(
    hooked: Any, source: str, where: Any, config: Mapping[str, Any], dtype: torch.dtype | None, hub: Mapping[str, Any]
) -> nn.Module:
    """transformers loads it, once the tensors that the files hold are known to fit; we make sure that none was left."""
    files = checkpoint.find(source, hub)
    if quantisation.of(config) is not None:
        return _from_quantised(hooked, source, where, config, dtype, hub, files.names())
    fields.check_depth(config, hooked.hub_fields, where, len(files.names()))
    expected = asked_for(source, where, hub)
    held = files.shapes([name for name, tensor in expected.state_dict().items() if not tensor.is_floating_point()])
    names = {name for name, _ in expected.named_parameters(remove_duplicate=False)}
    prefix = next((p for p in checkpoint.prefixes(held) if any(name.removeprefix(p) in names for name in held)), "")
    _check_shapes(
        source, expected, _renamed({name.removeprefix(prefix): shape for name, shape in held.items()}, hooked)
    )
    if prefix:
        hub = {"key_mapping": {f"^{re.escape(prefix)}": ""}, **hub}
    model = _by_its_class(source, dtype, ignore_mismatched_sizes=True, **hub)
    _say_unread(source, held, model)
    return model


def _renamed(held: Mapping[str, Any], hooked: Any) -> dict[str, Any]:
    """By the names that the module has for them."""

    def name(given: str) -> str:
        for theirs, ours in hooked.hub_renames.items():
            given = given.replace(theirs, ours)
        return given

    return {name(given): shape for given, shape in held.items()}


def asked_for(source: str, where: Any, hub: Mapping[str, Any]) -> nn.Module:
    """The model that a config.json of transformers' asks for, without memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {name: value for name, value in hub.items() if name not in PLACING}
    with reading(where, "asks for a model that transformers cannot build"), _unsaid(), torch.device("meta"):
        config, _ = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **options)
        return AutoModelForCausalLM.from_config(config)


def _by_its_class(source: str, dtype: torch.dtype | None, **options: Any) -> nn.Module:
    """What transformers loads; CheckpointError unless the files held exactly what the model has."""
    from transformers import AutoModelForCausalLM

    # With peft installed transformers looks for an adapter too, and asks the hub for it unless it is told so once more.
    adapters = {name: options[name] for name in ("cache_dir", "local_files_only") if name in options}
    with reading(source, "cannot be loaded"), _quiet() if Path(source).is_dir() else nullcontext():
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or "auto", output_loading_info=True, adapter_kwargs=adapters, **options
        )
    fit.check(source, info["missing_keys"], info["unexpected_keys"], info.get("mismatched_keys", ()))
    return model


def _from_quantised(
    hooked: Any,
    source: str,
    where: Any,
    config: Mapping[str, Any],
    dtype: torch.dtype | None,
    hub: Mapping[str, Any],
    held: Mapping[str, Path],
) -> nn.Module:
    """The same of quantised weights, whose shapes are those of their packed form: transformers alone knows whether they fit."""
    quantised = quantisation.of(config) or {}
    quantisation.need(quantised)
    fields.check_depth(config, hooked.hub_fields, where, len(held))
    with _unsaid():
        model = _by_its_class(source, dtype, **quantisation.options(quantised), **hub)
    _say_unread(source, held, model)
    if AsRead(model).plain:  # nothing is left to be dequantised as it is read
        into, count = str(next(model.parameters()).dtype).removeprefix("torch."), quantisation.packed(held)
        log.info(
            "%s: %d matrices were dequantised while loading, %s into %s.",
            source,
            count,
            quantisation.method(quantised),
            into,
        )
    return model


def _say_unread(source: str, held: Iterable[str], model: Any) -> None:
    """One line in the log on tensors that transformers leaves in the files: a vision tower, what predicts several tokens."""
    patterns = [re.compile(one) for one in model._keys_to_ignore_on_load_unexpected or ()]
    names = [name for name in held if any(pattern.search(name) for pattern in patterns)]
    parts = Counter(found[0] for name in names if (found := PART.match(name)))
    if parts:
        told = ", ".join(f"{part} ({count} tensors)" for part, count in parts.items())
        log.warning("%s: not read, as in transformers, and not opened: %s.", source, told)


def _check_shapes(source: str, expected: nn.Module, held: Mapping[str, Any]) -> None:
    """Refuse tensors of other shapes, and a model that is larger than all that the files hold.

    Whether a name is missing or left over, transformers says: it knows older names, too.
    """
    wanted = expected.state_dict()
    mismatched = fit.misshapen(wanted, held)
    asked, there = sum(p.numel() for p in expected.parameters()), sum(shape.numel() for shape in held.values())
    if mismatched or asked > there:
        # Files hold experts one by one, and large tables in parts, where the model has one: none is missing or left over.
        apart = {name: found[0] for name in held if (found := ONE_OF_MANY.match(name))}
        missing = {name for name in fit.missing(expected, held) if f"{name.rpartition('.')[0]}." not in apart.values()}
        fit.check(source, missing, set(held) - set(wanted) - set(apart), mismatched)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar over local weights."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


@contextmanager
def _unsaid() -> Iterator[None]:
    """Without transformers' words on a model that is built for its shapes alone: that kernels are missing, which nobody runs."""
    from transformers.utils import logging as hf_logging

    said = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(said)
