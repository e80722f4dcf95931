"""Names: how a name that a user says finds the hook points of a model. The rows themselves are in `point.py`; no torch here.

names.find("blocks.3.mixer.hook_dt")         # one name: a point, an alias or a view; PointError with "did you mean"
names.find(("dt", 3))                        # the same, by a word and a layer: TransformerLens's shorthand
names.select("blocks.*.mixer.*")             # a names_filter: globs, words ("dt": every layer's), lists, functions of names
names.hooked("mixer_out")                    # where the hooks on a name are put
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import TypeAlias, TypeGuard

from gatedlens.address.point import Alias, Found, Point, View, fill
from gatedlens.errors import PointError, did_you_mean

# TransformerLens's shorthand in one word, "scale1ln1": the word, the layer, the part of the block.
SHORTHAND = re.compile(r"(?!hook_)(?P<word>[A-Za-z_]+?)(?P<layer>\d+)(?P<part>[A-Za-z]\w*)?")
ATTENDED = ("hook_pattern", "hook_attn_scores")  # where other models hold what a layer attends to
PARTS = {
    "a": "attn",
    "m": "mlp",
    "b": "",
    "block": "",
    "attention": "attn",
}  # what TransformerLens calls the parts of a block

# A full name, a glob, or a word: "dt" (every layer's), ("dt", 3), ("q", 3, "attn").
Name: TypeAlias = str | tuple[str, int] | tuple[str, int, str]
NamesFilter: TypeAlias = Name | Sequence[Name] | Callable[[str], bool] | None


def is_placed(name: object) -> TypeGuard[tuple[str, int] | tuple[str, int, str]]:
    """`is_placed(("dt", 3))`: whether it is one name, a word with its layer, and not a list of two."""
    return isinstance(name, tuple) and 2 <= len(name) <= 3 and isinstance(name[0], str) and _is_layer(name[1])


def listed(names: Name | Sequence[Name]) -> list[Name]:
    """`listed("dt")`, `listed(("dt", 3))`, `listed(["dt", ("gate", 3)])`: one name or several, as a list; else PointError."""
    if not isinstance(names, str | Sequence | Set | Mapping):
        raise PointError(f"{names!r:.80} is no point: name one, or a list of names.")
    return [names] if isinstance(names, str) or is_placed(names) else list(names)  # type: ignore[arg-type]


def _stem(view: View, layer: int) -> tuple[str, dict[str, int]]:
    """A view's name in one layer, with `*` for an open position, and its parameters."""
    return view.name.replace("{l}", str(layer)).replace("{t}", "*"), {"l": layer}


def _nowhere(leaf: str) -> list[str]:
    return []


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{l\}", r"(?P<l>\d+)").replace(r"\{t\}", r"(?P<t>\d+)")
    return re.compile(escaped + r"\Z")


def _is_layer(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _leaf(word: str) -> str:
    return word if word.startswith("hook_") else f"hook_{word}"


def is_glob(name: str) -> bool:
    return any(c in name for c in "*?[")


def _glob(pattern: str, names: Iterable[str]) -> list[str]:
    """Names that match; `*` stands for any text, dots included."""
    match = re.compile(fnmatch.translate(pattern)).match
    return [name for name in names if match(name)]


class Names:
    """All names of one model.

    points: full name -> row, in the order in which they fire. aliases, views: templates with {l} (and {t}).
    elsewhere: leaf name -> the architectures that have such a point, for the error of who asks the wrong model.
    """

    def __init__(
        self,
        points: Mapping[str, Point],
        aliases: Sequence[Alias] = (),
        views: Sequence[View] = (),
        n_layers: int = 0,
        model: str = "this model",
        elsewhere: Callable[[str], list[str]] = _nowhere,
    ):
        self.points = dict(points)
        self.n_layers = n_layers
        self.model = model
        self.elsewhere = elsewhere
        # An alias of a point that this layer lacks (a mixer word in an attention layer) is not a name of the model; of several
        # under one name the first holds whose point the layer has, and our own names come before all.
        self.aliases: dict[str, str] = {}
        for alias in aliases:
            for layer in range(n_layers):
                name, target = fill(alias.name, {"l": layer}), fill(alias.target, {"l": layer})
                if target in self.points and name not in self.points:
                    self.aliases.setdefault(name, target)
        self.views = [(_pattern(v.name), v) for v in views]

    @functools.cached_property
    def _rests(self) -> dict[str, tuple[list[str], list[str]]]:
        """`blocks.3.` -> what stands behind it in the names of points and of aliases; nothing -> those outside the blocks."""
        found: dict[str, tuple[list[str], list[str]]] = {}
        for kind, named in enumerate((list(self.points), list(self.aliases))):
            for name in named:
                prefix = match[0] if (match := re.match(r"blocks\.\d+\.", name)) else ""
                found.setdefault(prefix, ([], []))[kind].append(name[len(prefix) :])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.points)

    def __contains__(self, name: str) -> bool:
        return name in self.points

    def __getitem__(self, name: str) -> Point:
        return self.points[self.find(name).name]

    def branches(self, layer: int) -> tuple[tuple[str, ...], ...]:
        """`names.branches(0)`: what a block adds to the residual stream, in order, parallel ones together.

        (("mixer",), ("mlp",)) in a block of both. A branch reads `hook_{name}_in` and writes `hook_{name}_out`.
        """
        stem, groups = f"blocks.{layer}.hook_", [[]]  # type: tuple[str, list[list[str]]]
        for name in self.points:
            word = name.removeprefix(stem)
            if word == name:
                continue
            if word.startswith("resid_"):
                groups.append([])
            elif word.endswith("_in") and f"{stem}{word.removesuffix('_in')}_out" in self.points:
                groups[-1].append(word.removesuffix("_in"))
        return tuple(tuple(group) for group in groups if group)

    # -- one name ------------------------------------------------------------------------------------------------

    def find(self, name: Name) -> Found:
        """The point or view that `name` stands for: a full name, an alias, a view, or a word and a layer.

        PointError when there is none, and for a word of which every layer has a point.
        """
        if is_placed(name):
            return self.short(*name)
        if not isinstance(name, str):
            raise PointError(f"{name!r:.80} is no point: give a name, or a word and a layer, ('dt', 3).")
        if found := self._full(name):
            return found
        if told := SHORTHAND.fullmatch(name):
            found = self.short(told["word"], int(told["layer"]), told["part"], asked=repr(name))
            return replace(found, asked=name)
        several = self._in_layers(name)
        if len(several) > 1:
            raise self._which(name, several)
        if several:
            return several[0]
        raise self.unknown(name, hint="" if "." in name else self._nearest_words(name))

    def _full(self, name: str) -> Found | None:
        """Of a name that is written out."""
        if name in self.points:
            return Found(name, name)
        if name in self.aliases:
            return Found(name, self.aliases[name])
        for pattern, view in self.views:
            if match := pattern.match(name):
                params = {key: int(value) for key, value in match.groupdict().items()}
                if params["l"] < self.n_layers and all(fill(n, params) in self.points for n in view.needs + view.at):
                    return Found(name, name, view, params)
        return None

    def short(self, word: str, layer: int | None = None, part: str | None = None, asked: str | None = None) -> Found:
        """TransformerLens's shorthand: `short("decay", 3)` is `blocks.3.mixer.hook_decay`.

        Negative layers count from the end. A word that several parts of the block know goes to the block itself, then
        to its mixer; otherwise it is ambiguous and the error names the candidates. asked: how an error repeats the question.
        """
        if not isinstance(word, str) or not (layer is None or _is_layer(layer)):
            raise PointError(f'{(word, layer)!r:.80} is no point: give a name and a layer, ("dt", 3).')
        asked = asked or repr(word if layer is None else (word, layer) if part is None else (word, layer, part))
        if layer is None:
            prefix = ""
        elif not -self.n_layers <= layer < self.n_layers:
            raise PointError(f"{asked}: layer {layer} does not exist; {self.model} has {self.n_layers} layers.")
        else:
            prefix = f"blocks.{layer % self.n_layers}."
        if found := self._of_word(word, prefix, part, asked):
            return found
        if layer is None and (several := self._in_layers(word)):
            raise self._which(word, several)
        leaf, part = _leaf(word), PARTS.get(part or "", part)
        name = f"{prefix}{part}.{leaf}" if part else f"{prefix}{leaf}"
        raise self.unknown(name, asked, self._nearest_words(word, prefix))

    def _of_word(
        self, word: str, prefix: str, part: str | None, asked: str, own: tuple[bool, ...] = (True, False)
    ) -> Found | None:
        """The point that a word means within a block, or (with no prefix) outside the blocks; own: our names, those of others."""
        part = PARTS.get(part or "", part)
        leaf = _leaf(word)
        wanted = f"{part}.{leaf}" if part else leaf
        for rests in [
            self._rests.get(prefix, ([], []))[not ours] for ours in own
        ]:  # MambaLens's hook_y is our hook_scan
            hits = [r for r in rests if r == wanted or (part is None and r.endswith(f".{leaf}"))]
            for preferred in (leaf, f"mixer.{leaf}", f"attn.{leaf}"):
                if preferred in hits:
                    return self._full(prefix + preferred)
            if len(hits) == 1:
                return self._full(prefix + hits[0])
            if hits:
                raise PointError(f"{asked} is ambiguous: it may be {', '.join(prefix + h for h in hits)}.")
        return None

    def _in_layers(self, word: str) -> list[Found]:
        """What a word alone means, "dt" or "mixer.dt": the point outside the blocks, or that of every layer which has one."""
        part, _, leaf = word.rpartition(".")
        outside = None if part else self._of_word(leaf, "", None, repr(word))
        prefixes = [f"blocks.{layer}." for layer in range(self.n_layers)]
        for own in (True, False):  # a name of ours in one layer wins over another tool's for something else in the next
            inside = [self._of_word(leaf, prefix, part or None, repr(word), (own,)) for prefix in prefixes]
            if found := [replace(one, asked=word) for one in ([outside] if outside else inside) if one is not None]:
                return found
        return []

    def _which(self, word: str, several: list[Found]) -> PointError:
        """The error for a word of several layers where one point is asked for."""
        first = int(several[0].name.split(".")[1])
        return PointError(
            f"{word!r} is a point of {len(several)} layers, and one is asked for: name the layer too, {(word, first)!r} or "
            f"{several[0].name!r}."
        )

    def _nearest_words(self, word: str, prefix: str | None = None) -> str:
        """Which words are near, of a block or of the whole model; empty when none is."""
        here = self._rests.values() if prefix is None else [self._rests.get(prefix, ([], []))]
        words = dict.fromkeys(rest.rpartition(".")[2] for lists in here for rests in lists for rest in rests)
        return did_you_mean(word, words if word.startswith("hook_") else [leaf.removeprefix("hook_") for leaf in words])

    def unknown(self, name: str, asked: str | None = None, hint: str = "") -> PointError:
        """The error for a name that does not exist, with the nearest that do."""
        message = f"{asked or repr(name)} is not a hook point of {self.model}."
        layer = re.match(r"blocks\.(-?\d+)\.", name)
        if layer and not 0 <= int(layer[1]) < self.n_layers:
            return PointError(f"{message} It has layers 0 to {self.n_layers - 1}.")
        hint = hint or did_you_mean(name, [*self.points, *self.aliases])
        others = self.elsewhere(name.rpartition(".")[2])
        if others:
            named = " and ".join(part for part in (", ".join(others[:-1]), others[-1]) if part)
            message += f" {named} {'has' if len(others) == 1 else 'have'} such a point."
        if name.endswith(ATTENDED):
            hint += " What a recurrent layer attends to is derived: gl.implicit_attention(cache, layer)."
        return PointError(message + (hint or " `model.hook_table()` lists them all."))

    def lacking(self, name: str, axis: str, sizes: Mapping[str, int]) -> PointError:
        """The error for an axis that a point lacks, with the nearest point that has it."""
        axes = self.points[name].axes
        return PointError(f"{name} has no axis {axis!r}; its axes are: {axes}.{self.nearest(name, axis, sizes)}")

    def nearest(self, name: str, axis: str, sizes: Mapping[str, int]) -> str:
        """Which point has the axis that a point lacks, as a sentence: of those in its block, or else of all, the one that fires
        closest to it.
        """
        order = list(self.points)
        here, block = order.index(name), name.split(".")[:2]
        has = [i for i, other in enumerate(order) if self.points[other].reaches(axis, sizes)]
        if not has:
            return f" No point of {self.model} has it.{did_you_mean(axis, self.points[name].dims)}"
        found = order[min(has, key=lambda i: (order[i].split(".")[:2] != block, abs(i - here)))]
        return f" The nearest point that has it is {found} ({self.points[found].axes})."

    # -- many names ----------------------------------------------------------------------------------------------

    def select(self, names_filter: NamesFilter) -> list[list[str]]:
        """The points that a filter asks for, one list for each thing asked: each must fire at least one of its list.

        None: every point that is not lazy. A string: a name, alias, view or glob, or a word ("dt": every layer's). A word with
        its layer, ("dt", 3). A list: each of these. A callable: every point, lazy ones too, for whose full name it is true.
        """
        if names_filter is None:
            return [[name for name, point in self.points.items() if not point.lazy]]
        if isinstance(names_filter, str) or is_placed(names_filter):
            return [self._matches(names_filter)]
        if callable(names_filter):
            chosen = [name for name in self.points if names_filter(name)]
            if not chosen:
                raise PointError(f"names_filter {names_filter!r} is false for every hook point of {self.model}.")
            return [chosen]
        if not isinstance(names_filter, Sequence | Set | Mapping) or not all(
            isinstance(name, str) or is_placed(name) for name in names_filter
        ):
            raise PointError(
                f"names_filter is {names_filter!r:.80}; give a name, a list of names, a function of names, or None for all."
            )
        wanted = listed(names_filter)
        if not wanted:
            raise PointError("names_filter is an empty list: name the points to cache, or pass None for all.")
        return [self._matches(name) for name in wanted]

    def matching(self, pattern: str) -> list[Found]:
        """What a glob stands for: our points; if none match, other tools' names for them; if none, views."""
        own = [Found(name, name) for name in _glob(pattern, self.points)]
        theirs = own or [Found(alias, self.aliases[alias]) for alias in _glob(pattern, self.aliases)]
        found = theirs or [
            Found(name, name, view, params)
            for _, view in self.views
            for layer in range(self.n_layers)
            for name, params in [_stem(view, layer)]
            if (name == pattern or fnmatch.fnmatchcase(name, pattern))
            and all(fill(n, params) in self.points for n in view.needs)
        ]
        if not found:
            hint = did_you_mean(pattern.replace("*", "0"), self.points)
            raise PointError(f"The pattern {pattern!r} matches no hook point of {self.model}.{hint}")
        return found

    def hooked(self, name: Name | Callable[[str], bool]) -> list[Found]:
        """What a hook on `name` is put on: a point or view, all that a glob or word stands for, what a predicate picks."""
        if is_placed(name):
            return [self.find(name)]
        if not isinstance(name, str):
            return [Found(full, full) for full in self.select(name)[0]]
        if not is_glob(name):
            full = self._full(name)
            return [full] if full else self._in_layers(name) or [self.find(name)]
        found = self.matching(name)
        for one in found:
            if one.view is not None and "{t}" in one.view.name:
                raise PointError(f"{name!r} leaves the position open: name it, as in {one.name.replace('*', '0')!r}.")
        return found

    def _matches(self, name: Name) -> list[str]:
        if isinstance(name, str) and is_glob(name):
            hits = dict.fromkeys(point for found in self.matching(name) for point in found.needs())
        else:
            hits = dict.fromkeys(point for found in self.hooked(name) for point in found.needs())
        return [point for point in self.points if point in hits]
