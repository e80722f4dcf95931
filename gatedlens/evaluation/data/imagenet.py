"""ImageNet as it lies on disk: a folder of class folders.

    ImageFolder("imagenet/val")             # val/n01440764/ILSVRC2012_val_00000293.JPEG ...

Classes are numbered in the order of their folders' names, which for the 1,000 synsets is that of the usual models. For a
folder with some of them put a list of all beside it (`LOC_synset_mapping.txt`, `synset_words.txt` or `synsets.txt`; each line
begins with a synset): its order counts then.
"""

from __future__ import annotations

from pathlib import Path

from gatedlens.errors import InputError
from gatedlens.evaluation.data.sample import Sample, Samples, listed
from gatedlens.model.image import picture

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
LISTS = ("LOC_synset_mapping.txt", "synset_words.txt", "synsets.txt")


class ImageFolder(Samples):
    """Samples of a folder of class folders, or of its `val` folder."""

    def __init__(self, path: str | Path):
        root = Path(path)
        inner = root / "val"
        self.title = str(path)
        self.folder = inner if inner.is_dir() and not _images(inner) else root
        inside = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        folders = [p for p in inside if p.is_dir() and not p.name.startswith(".")]  # .cache is no class
        self.classes = self._classes(root, [folder.name for folder in folders])
        self.files = [(file, self.classes[folder.name]) for folder in folders for file in _images(folder)]
        if not self.files:
            flat = _images(self.folder) if self.folder.is_dir() else []
            hint = (
                f" {len(flat)} images lie in it flat: sort them into class folders first (valprep.sh)." if flat else ""
            )
            raise InputError(f"{self.folder} holds no class folders with images (n01440764/*.JPEG).{hint}")

    def _classes(self, root: Path, names: list[str]) -> dict[str, int]:
        """class folder -> number"""
        lists = [place / name for place in (self.folder, self.folder.parent, root) for name in LISTS]
        found = next((path for path in lists if path.is_file()), None)
        if found is None:
            return {name: i for i, name in enumerate(names)}
        order = {word: i for i, word in enumerate(listed(found))}
        for name in names:
            if name not in order:
                raise InputError(f"{self.folder / name} is a class that {found} does not list.")
        return order

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        file, _ = self.files[i]
        return f"{file.parent.name}/{file.name}"

    def read(self, i: int) -> Sample:
        file, label = self.files[i]
        return Sample(self.name(i), picture(file), label, classes=len(self.classes))


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
