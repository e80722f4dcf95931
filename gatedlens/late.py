"""Late: a package whose names are loaded when they are first asked for, so that importing the package costs nothing.

__getattr__ = late(__name__, {"loading": ("from_pretrained", "wrap")})     # in the package's __init__.py (PEP 562)

package.wrap       # package.loading.wrap, loaded now; its modules need no line: package.loading
package.warp       # AttributeError: package has no 'warp'. Did you mean 'wrap'?
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module

from gatedlens.errors import did_you_mean


def late(package: str, names: Mapping[str, Iterable[str]]) -> Callable[[str], object]:
    """`late(__name__, {"loading": ("wrap",)})`: the `__getattr__` of a package; `names` by the module that holds them."""
    where = {name: module for module, held in names.items() for name in held}

    def load(name: str) -> object:
        here = sys.modules[package]
        if name in where:
            value: object = getattr(import_module(f"{package}.{where[name]}"), name)
            setattr(here, name, value)  # from now on it is found without asking here
            return value
        modules = [found.name for found in pkgutil.iter_modules(here.__path__)]
        if name in modules:
            return import_module(f"{package}.{name}")
        close = did_you_mean(name, sorted({*dir(here), *modules}), 1)
        # With `name` alone Python's own "Did you mean" stays away: a second one would follow ours.
        raise AttributeError(f"{package} has no {name!r}.{close}", name=name)

    return load
