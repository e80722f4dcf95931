"""From a name or a path to its samples: each format is known by what lies there.

open_samples("digits"), open_samples("gtsegs_ijcv.mat"), open_samples("VOCdevkit/VOC2012"), open_samples("imdb/test.jsonl")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gatedlens.errors import InputError, did_you_mean
from gatedlens.evaluation.data.bundled import BUNDLED
from gatedlens.evaluation.data.imagenet import ImageFolder
from gatedlens.evaluation.data.imagenet_segmentation import SegmentedImages
from gatedlens.evaluation.data.imdb_arc import JsonLines, SavedDataset
from gatedlens.evaluation.data.masked import IMAGES, MASKS, MaskedImages
from gatedlens.evaluation.data.pascal_voc import VOC
from gatedlens.evaluation.data.sample import Samples


@dataclass(frozen=True)
class Format:
    """said: for a person; known: is it that?; reader: path -> samples."""

    said: str
    known: Callable[[Path], bool]
    reader: Callable[[Path], Samples]


FORMATS = (
    Format("gtsegs_ijcv.mat", lambda path: path.suffix == ".mat", SegmentedImages),
    Format("JSON lines of IMDB or ARC (.jsonl)", lambda path: path.suffix in (".jsonl", ".json"), JsonLines),
    Format("a folder of datasets' save_to_disk", lambda path: _any(path, "dataset_dict.json", "state.json"), SavedDataset),
    Format("a Pascal VOC folder", lambda path: _any(path, "JPEGImages", "VOC*/JPEGImages"), VOC),
    Format("a folder with images/ and masks/", lambda path: _any(path, IMAGES) and _any(path, MASKS), MaskedImages),
    Format("an ImageNet folder of class folders", lambda path: path.is_dir() and any(path.iterdir()), ImageFolder),
)  # fmt: skip


def open_samples(asked: str | Path) -> Samples:
    """`gl.evaluation.open_samples("digits")`: the bundled digits, recall or moby; or what a path holds."""
    if asked in BUNDLED:
        return BUNDLED[str(asked)]()
    path = Path(asked).expanduser()
    if not path.exists():
        known = f"{', '.join(BUNDLED)}, or the path of {_formats()}"
        raise InputError(f"There is no data {asked}: give {known}.{did_you_mean(str(asked), BUNDLED)}")
    for kind in FORMATS:
        if kind.known(path):
            return kind.reader(path)
    what = "an empty folder" if path.is_dir() else f"a {path.suffix or 'nameless'} file"
    raise InputError(f"{asked} is {what}; what is read is {_formats()}.")


def _any(path: Path, *patterns: str) -> bool:
    return path.is_dir() and any(next(path.glob(pattern), None) is not None for pattern in patterns)


def _formats() -> str:
    return ", ".join(kind.said for kind in FORMATS)
