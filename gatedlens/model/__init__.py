"""The open forward and whatever listens to it: models, blocks, hook points, hooks, caches, states, padding.

    base.py        HookedModel: the forward, read down one page        hooking.py    hooks on and off, run_with_cache
    language.py    tokens in, logits out                               views.py      other tools' names, served from our points
    vision.py      images in, logits out
    block.py       Block: branches at the residual stream, as data     cache.py      ActivationCache
    behind.py, writing.py  what a mixer writes, behind its projection
    mixer.py       what mixes tokens; the recurrence with its points   norm.py       norms
    path.py        a mixer as a path of stages                         stages.py     Conv, Scan, Gate ...
    hookpoint.py   one named place                                     state.py      what a layer hands to the next call
    padding.py     rows of unequal length                              run.py        several documents in a row
    text.py, image.py, batch.py, tokenizer.py, generation.py           config.py, fields.py, checkpoint.py, layout.py,
                                                                       tiny.py, placement.py
    intervention.py  edits as values                                   watch.py, turns.py, memory.py

It knows no architecture and no analysis.
"""

from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input, Output
from gatedlens.model.block import Block, Sub, SubRows, residual_rows
from gatedlens.model.cache import ActivationCache
from gatedlens.model.config import HookedConfig
from gatedlens.model.hookpoint import HookPoint, Part, rows_of
from gatedlens.model.intervention import Edit, EditStep, Intervention, Step, edit
from gatedlens.model.language import HookedLanguageModel
from gatedlens.model.layout import Layout
from gatedlens.model.mixer import Mixer, TokenMixing
from gatedlens.model.norm import GemmaNorm, NarrowNorm, Norm, NormOfNarrow, eps_of, norm_rows
from gatedlens.model.padding import Padding, windows
from gatedlens.model.path import PathMixer, Stage, Streams
from gatedlens.model.run import DocumentRun, Run
from gatedlens.model.stages import (
    Bonus,
    ChannelScan,
    Conv,
    Gate,
    GroupNorm,
    Named,
    Real,
    Scan,
    ScanBefore,
    ScanSteps,
    SiLU,
    Skip,
)
from gatedlens.model.state import Carried, RecurrentState
from gatedlens.model.tiny import Tiny, around, by_fan_in, fresh
from gatedlens.model.vision import HookedVisionModel, VisionConfig

# fmt: off
__all__ = [
    "ActivationCache", "Batch", "Block", "Bonus", "Carried", "ChannelScan", "Conv", "DocumentRun", "Edit", "EditStep",
    "Gate", "GemmaNorm", "GroupNorm", "HookPoint", "HookedConfig", "HookedLanguageModel", "HookedModel",
    "HookedVisionModel", "Input", "Intervention", "Layout", "Mixer", "Named", "NarrowNorm", "Norm", "NormOfNarrow",
    "Output", "Padding", "Part", "PathMixer", "Real", "RecurrentState", "Run", "Scan", "ScanBefore", "ScanSteps", "SiLU", "Skip",
    "Stage", "Step", "Streams", "Sub", "SubRows", "Tiny", "TokenMixing", "VisionConfig", "around", "by_fan_in", "edit",
    "eps_of", "fresh", "norm_rows", "residual_rows", "rows_of", "windows",
]
# fmt: on
