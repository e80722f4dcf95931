"""Checksums of pieces joined are the checksum of the whole; a store's are those of its files."""

from __future__ import annotations

import random
import zlib

import gatedlens as gl
from gatedlens import store as gl_store
from gatedlens.store.disk.files import Piece, joined
from gatedlens.store.disk.shards import checksum
from tests.helpers import example


def test_joined_is_the_checksum_of_the_whole():
    source = random.Random(0)
    for _ in range(50):
        pieces = [source.randbytes(source.choice([0, 1, 7, 100, 4096])) for _ in range(source.randrange(6))]
        assert joined(map(Piece.of, pieces)) == zlib.crc32(b"".join(pieces))


def test_the_manifest_has_the_checksum_of_every_file(tmp_path):
    model = gl.HookedMamba.tiny()
    names = ["blocks.0.mixer.hook_gated", "blocks.1.mixer.hook_state"]
    held = gl_store.harvest(model, example(model, 9), names, tmp_path, 2, shard_bytes=6000, progress=False)
    files = held.manifest["finished"]["files"]
    found = {
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.suffix in (".arrow", ".safetensors")
    }
    assert {file["name"] for file in files} == found and len(found) > 3
    for file in files:
        assert checksum(tmp_path / file["name"]) == file["crc32"]
        assert (tmp_path / file["name"]).stat().st_size == file["bytes"]
    assert held.verify() == []
