"""Corpora of every form give the same documents; what is wrong with one is said with its place."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from PIL import Image

import gatedlens as gl
from gatedlens import store as gl_store
from gatedlens.store.corpus import corpus as corpora
from gatedlens.store.corpus import sources
from gatedlens.store.corpus.batches import Batches
from gatedlens.store.corpus.sources import read

TEXTS = ["Call me Ishmael.", "", "Some years ago, never mind how long", "precisely — having little"]


def ids(corpus) -> list[list[int]]:
    return [document.value.tolist() for document in corpus.documents()]


def test_texts_of_every_form_are_the_same_documents(moby_model, tmp_path):
    wanted = [moby_model.to_tokens(text)[0].tolist() for text in TEXTS if text]
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (tmp_path / "folder" / ("sub" if i == 3 else ".") / f"{i}.txt").write_text(text, encoding="utf-8")
    records = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    records.save_to_disk(str(tmp_path / "set"))
    forms = {
        "list": TEXTS,
        "iterator": iter(TEXTS),
        "records": [{"text": text} for text in TEXTS],
        "jsonl": tmp_path / "lines.jsonl",
        "folder": str(tmp_path / "folder"),
        "datasets folder": tmp_path / "set",
        "datasets": records,
        "columns": {"text": TEXTS},
        "ids": [*wanted[:1], [], *wanted[1:]],
        "padded": {
            "input_ids": torch.tensor([row + [0] * (40 - len(row)) for row in [*wanted[:1], [], *wanted[1:]]]),
            "attention_mask": torch.tensor(
                [[1] * len(r) + [0] * (40 - len(r)) for r in [*wanted[:1], [], *wanted[1:]]]
            ),
        },
    }
    for name, form in forms.items():
        corpus = read(form, moby_model)
        assert corpus.expected_tokens() == sum(map(len, wanted)), name
        corpus.begin()
        assert ids(corpus) == wanted and corpus.empty == 1, name
        assert json.loads(json.dumps(corpus.described)) == corpus.described


def test_hidden_files_of_a_folder_are_left_out(moby_model, tmp_path):
    for name in ("a.txt", "b.ndjson", ".c.txt", ".checkpoints/a.txt", "sub/d.md", "table.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if "json" in name else name)
    documents = [moby_model.to_string(row[1:]) for row in ids(read(tmp_path, moby_model))]
    assert documents == ["a.txt", "b.ndjson", "sub/d.md"]


def test_an_iterator_is_read_once_and_whole(moby_model):
    taken = []
    data = (taken.append(i) or [1 + i % 9] for i in range(500))
    corpus = read(data, moby_model)
    assert corpus.expected_tokens() is None and len(taken) == corpora.SAMPLE
    assert next(iter(Batches(corpus, moby_model, 100))).value.shape == (100, 1)
    corpus.begin()
    assert [row[0] for row in ids(corpus)] == [1 + i % 9 for i in range(500)] and taken == list(range(500))


def test_the_size_of_a_file_is_estimated_from_its_beginning(moby_model, tmp_path):
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": "x" * (90 + i % 20)}) + "\n" for i in range(1000)))
    corpus = read(tmp_path / "c.jsonl", moby_model)
    assert corpus.expected_tokens() == pytest.approx(sum(len(row) for row in ids(corpus)), rel=0.02)


def test_images(tmp_path):
    model = gl.from_pretrained("gatedlens/vim-digits", device="cpu")
    images, _ = gl.data.digits()["test"]
    for i in range(5):
        pixels = ((images[i, 0] + 1) * 127.5).round().byte()
        (tmp_path / "in" / f"class-{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / "in" / f"class-{i % 2}" / f"{i}.png")
    name = (
        "blocks.1.mixer.fwd.hook_gated" if "blocks.1.mixer.fwd.hook_gated" in model.names else "blocks.1.hook_mixer_out"
    )
    store = gl_store.harvest(model, tmp_path / "in", name, tmp_path / "out", batch_size=2, progress=False)
    files = sorted((tmp_path / "in").rglob("*.png"))
    read_in = torch.stack([model.preprocess(Image.open(file)) for file in files])
    for start in (0, 2, 4):
        _, cache = model.run_with_cache(read_in[start : start + 2], names_filter=name)
        assert all(torch.equal(store[name][start + i], cache[name][i]) for i in range(len(cache[name])))
    assert store.documents(3).tolist() == [3] * model.grid.length
    (tmp_path / "in" / "class-0" / "broken.png").write_bytes(b"no image")
    with pytest.raises(gl.InputError, match=r"broken.png is no image that Pillow can read"):
        gl_store.harvest(model, tmp_path / "in", name, tmp_path / "out2", progress=False)
    with pytest.raises(gl.InputError, match="an image is one row"):
        gl_store.harvest(model, tmp_path / "in", name, tmp_path / "out3", context=4, progress=False)


def test_mistakes_name_their_place(moby_model, tmp_path, monkeypatch):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "other.jsonl").write_text('{"body": "fine", "id": 3}\n')
    (tmp_path / "empty").mkdir()
    mistakes = {
        tmp_path / "latin.txt": r"latin.txt is not UTF-8: byte 3 is 0xe9.*iconv",
        tmp_path / "latin.jsonl": r"latin.jsonl, line 2 is not UTF-8",
        tmp_path / "broken.jsonl": r"broken.jsonl, line 2 is no JSON",
        tmp_path / "other.jsonl": r"line 1 has none of the fields .* it has: body, id. Say which with field=",
        tmp_path / "empty": "holds no file that the model reads",
        tmp_path / "nowhere": "There is no file or folder .*For a text itself pass a list",
        ("x", "xx", (999999,)): "Document 2 of the corpus: Token id 999999",
        ((0.5, 1.5),): "Tokens must be integer ids",
        7: "A corpus is a path, ids, or an iterable",
        (): "holds no document that is not empty",
        ("", ""): "holds no document that is not empty",
    }
    for data, message in mistakes.items():
        with pytest.raises(gl.InputError, match=message):
            corpus = read(data, moby_model)
            assert next(iter(Batches(corpus, moby_model, 8)), None) or gl_store.estimate(moby_model, data, "hook_embed")
    assert len(ids(read(tmp_path / "other.jsonl", moby_model, field="body"))) == 1
    with pytest.raises(gl.InputError, match="The columns of the corpus have different lengths"):
        read({"ids": [[1]], "mask": []}, moby_model)
    for name in ("table.csv", "books.parquet", "books.json", "lines.jsonl.gz"):
        (tmp_path / name).write_text("text\nCall me\n")
        with pytest.raises(gl.InputError, match=rf"{name} is not text .*Write JSONL"):
            read(tmp_path / name, moby_model)
    with pytest.raises(gl.InputError, match=r"several splits \(train\): pass one"):
        read(datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})), moby_model)
    with pytest.raises(gl.InputError, match="its mask holds values other than 0 and 1"):
        ids(read({"ids": [[1, 2]], "mask": [[2, 0]]}, moby_model))
    with pytest.raises(gl.InputError, match="corpus has 8 tokens, and context=100: it does not fill one row"):
        gl_store.estimate(moby_model, ["Call me"], "hook_embed", context=100)
    with pytest.raises(gl.InputError, match="its mask has shape"):
        ids(read({"ids": [[1, 2]], "mask": [[True]]}, moby_model))
    monkeypatch.setattr(sources, "LARGEST_FILE", 2)
    with pytest.raises(gl.TooLargeError, match="Split it, or write JSONL"):
        ids(read(tmp_path / "latin.txt", moby_model))
    with pytest.raises(gl.InputError, match="needs a tokenizer"):
        ids(read(["text"], gl.HookedMamba.tiny()))


def test_what_a_bad_document_interrupts_is_gone_on_with(moby_model, tmp_path):
    name, out = "blocks.0.mixer.hook_gated", tmp_path / "out"
    bad = [*(f"text {i}" for i in range(corpora.SAMPLE)), "a third", "a fourth", [10**9]]  # the first are tried before
    with pytest.raises(gl.InputError, match="Document 66"):
        gl_store.harvest(moby_model, bad, name, out, batch_size=2, progress=False)
    assert len(gl_store.open(out)) == 66 and datasets.load_from_disk(str(out / "activations")).num_rows == 66
    store = gl_store.harvest(moby_model, [*bad[:66], "mended"], name, out, batch_size=2, progress=False)
    assert len(store) == 67 and store.is_finished
