"""What a user means: which hook points, which layers, which positions, which entries.

    Point("mixer.hook_dt", "batch pos channel", "softplus(dt_pre)", "eq. 4")      # point.py: the rows of points, aliases, views
    names.find("blocks.3.mixer.hook_dt"); names.select("blocks.*.mixer.*")       # names.py: a row by its name, globs
    layers_of(model, "[01]"); layer_of(model, -1)                                # layers.py: the one `layers=`
    mask_of(slice(4, 8), "pos", real); one_a_row([3, 5], "pos", real)            # positions.py: the one `pos=`
    Where(("blocks.*.mixer.hook_write",), {"pos": 3})                            # entries.py: some entries of some points

Nothing here knows a model's forward; point and names do without torch.
"""

from gatedlens.address.entries import Component, Index, Where
from gatedlens.address.layers import Layers, layer_of, layers_of
from gatedlens.address.names import SHORTHAND, Names, NamesFilter, is_glob
from gatedlens.address.point import Alias, Found, Point, View, block_aliases, block_rows
from gatedlens.address.positions import Positions, columns, listed, mask_of, one_a_row, order
from gatedlens.address.table import HookTable

# fmt: off
__all__ = [
    "SHORTHAND", "Alias", "Component", "Found", "HookTable", "Index", "Layers", "Names", "NamesFilter", "Point", "Positions",
    "View", "Where", "block_aliases", "block_rows", "columns", "is_glob", "layer_of", "layers_of", "listed", "mask_of",
    "one_a_row", "order",
]
# fmt: on
