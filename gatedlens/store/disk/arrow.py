"""Arrow: the rows of a store as record batches, in the layout of SAELens.

    data = Columns(layouts, length=128, is_text=True).encode(rows, tensors)      # the bytes of one batch
    read = batch_reader(mapped, columns.schema); values, ends = read(offset, name, layout)       # and back, without a copy

A row is a sample. Beside a column for each hook name, Array2D(context, d), there are `token_ids` (of a language model),
`positions` (which of the row's positions are kept) and `documents` (which document each is of), each as long as the row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from gatedlens.errors import TooLargeError
from gatedlens.files import optional
from gatedlens.store.corpus.batches import Rows
from gatedlens.store.disk.layout import ARROW_DTYPES, Layout

LARGEST = 2**31 - 1  # numbers in one column of a batch: Arrow's lists count in 32 bits


class Columns:
    """`Columns(layouts, length, is_text).encode(rows, tensors)`: the bytes of one record batch.

    layouts: of the points that are columns. length: how many positions of every row are kept; None where rows differ.
    """

    def __init__(self, layouts: Sequence[Layout], length: int | None, is_text: bool):
        datasets = optional("datasets", "store")
        self.arrow = optional("pyarrow", "store")
        self.layouts = layouts
        self.is_text = is_text
        counted = datasets.Sequence(datasets.Value("int32"), length=-1 if length is None else length)
        features = dict.fromkeys((*(("token_ids",) if is_text else ()), "positions", "documents"), counted)
        for layout in layouts:
            rows = length if layout.per == "token" else 1 if len(layout.shape) == 1 else layout.shape[0]
            shape, dtype = (rows, layout.shape[-1]), ARROW_DTYPES[layout.dtype]
            features[layout.name] = datasets.Array2D(shape=shape, dtype=dtype)
        self.features = datasets.Features(features)
        self.schema = self.features.arrow_schema

    @staticmethod
    def of(settings: Mapping[str, Any], layouts: Sequence[Layout]) -> Columns:
        """Those of a store, from its settings and all its points."""
        return Columns([one for one in layouts if one.stored == "column"], settings["length"], settings["text"])

    def encode(self, rows: Rows, tensors: dict[str, Tensor]) -> memoryview:
        ends = torch.cat([torch.zeros(1, dtype=torch.long), rows.counts.cumsum(0)])
        count = {"positions": rows.positions, "documents": rows.documents[rows.keep]}
        if self.is_text:
            count["token_ids"] = rows.value[rows.keep]
        arrays = [
            self._counted(name, count[name], ends) if name in count else self._matrix(name, tensors[name], ends)
            for name in self.schema.names
        ]
        batch = self.arrow.RecordBatch.from_arrays(arrays, schema=self.schema)
        return memoryview(batch.serialize())

    def _counted(self, name: str, values: Tensor, ends: Tensor) -> Any:
        """One number a kept position."""
        pa, kind = self.arrow, self.schema.field(name).type
        flat = pa.array(values.to(torch.int32).numpy())
        if pa.types.is_fixed_size_list(kind):
            return pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
        return pa.ListArray.from_arrays(pa.array(ends.to(torch.int32).numpy()), flat)

    def _matrix(self, name: str, values: Shaped[Tensor, "entry ..."], ends: Tensor) -> Any:
        """[kept positions of the row, d] for each row; of a point without positions [1, d] or what it has."""
        pa = self.arrow
        width, per = values.shape[-1], next(layout.per for layout in self.layouts if layout.name == name)
        flat = values.reshape(-1, width)
        if flat.numel() > LARGEST:
            raise TooLargeError(
                f"{name} has {flat.numel()} numbers in one batch, and an Arrow column takes {LARGEST}: use a smaller "
                "batch_size."
            )
        if per == "row":
            step = len(flat) // len(values)
            ends = torch.arange(0, len(flat) + 1, step)
        inner = torch.arange(0, flat.numel() + 1, width, dtype=torch.int32)
        lists = pa.ListArray.from_arrays(pa.array(inner.numpy()), pa.array(flat.contiguous().flatten().numpy()))
        storage = pa.ListArray.from_arrays(pa.array(ends.to(torch.int32).numpy()), lists)
        return pa.ExtensionArray.from_storage(self.schema.field(name).type, storage)

    def info(self, files: list[str], fingerprint: str) -> dict[str, bytes]:
        """The two files that make a folder with these shards one that `datasets.load_from_disk` reads."""
        empty = {"citation": "", "description": "", "homepage": "", "license": ""}
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in files],
            "_fingerprint": fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        told = {"dataset_info.json": {**empty, "features": self.features.to_dict()}, "state.json": state}
        return {name: json.dumps(value, indent=1).encode() for name, value in told.items()}


def batch_reader(file: Tensor, schema: Any) -> Callable[[int, str, Layout | None], tuple[Tensor, list[int]]]:
    """`read(offset, name, layout)`: (entries of a column of the batch there, where its rows begin), within `file`.

    file: the bytes of a shard, mapped; what is read shares them. schema: what its head must hold; ValueError if it does not.
    """
    pa = optional("pyarrow", "store")
    source = pa.BufferReader(pa.py_buffer(file.numpy()))
    try:
        held = pa.ipc.open_stream(source).schema
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        TypeError,
        KeyError,
    ) as error:  # pyarrow's, and datasets' of its types
        raise ValueError(f"its head is no schema of Arrow ({error})") from error
    if not held.equals(schema):
        told = [", ".join(f"{one.name} {one.type}" for one in some) for some in (held, schema)]
        raise ValueError(f"its columns are {told[0]}, expected {told[1]}")
    last: dict[int, Any] = {}  # the batch that was read last

    def read(offset: int, name: str, layout: Layout | None) -> tuple[Tensor, list[int]]:
        if offset not in last:
            last.clear()
            source.seek(offset)
            last[offset] = pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)
        column = last[offset].column(name)
        column = column.storage if isinstance(column, pa.ExtensionArray) else column
        dtype = torch.int32 if layout is None else layout.dtype
        begin = column.buffers()[-1].address - file.data_ptr()  # Arrow reads in place: its numbers are the file's bytes
        values = file[begin : begin + _numbers(column, pa) * dtype.itemsize].view(dtype)
        if layout is not None and len(layout.shape) > 1:
            return values.view(-1, *layout.shape), list(range(len(column) + 1))
        values = values if layout is None else values.view(-1, *layout.shape)
        if pa.types.is_fixed_size_list(column.type):
            return values, [column.type.list_size * row for row in range(len(column) + 1)]
        return values, column.offsets.to_pylist()

    return read


def _numbers(column: Any, pa: Any) -> int:
    """How many numbers a column holds."""
    while pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        column = column.values
    return len(column)
