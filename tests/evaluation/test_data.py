"""Data sets as they lie on disk: small files of the same formats, what is read from them, and what is wrong with others."""

from __future__ import annotations

import json
import sys

import h5py
import numpy
import pytest
import torch
from PIL import Image

import gatedlens as gl
from gatedlens.evaluation import Prompt, Sample, open_samples
from gatedlens.evaluation.data.image_files import squeezed
from gatedlens.evaluation.data.imagenet import ImageFolder
from gatedlens.evaluation.data.imdb_arc import JsonLines, SavedDataset
from gatedlens.evaluation.data.sample import chosen
from gatedlens.evaluation.item import Item, Items, alike

GREY, COLOUR = Image.linear_gradient("L"), Image.radial_gradient("L").convert("RGB")


def image_folder(root, names=("n02", "n01"), each=2):
    for c, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (20, 16), (10 * c, 20 * i, 0)).save(root / name / f"val_{i}.JPEG")
    return root


def gtsegs(path, images, masks):
    """As MATLAB 7.3 writes it: arrays with their axes reversed, cells as references."""
    with h5py.File(path, "w") as file:
        for name in ("value/img", "value/gt"):
            file.create_dataset(name, (len(images), 1), dtype=h5py.ref_dtype)
        for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
            file[f"#refs#/i{i}"] = image.transpose()
            file[f"#refs#/m{i}"] = mask.transpose()
            file.create_dataset(f"#refs#/c{i}", (1, 1), dtype=h5py.ref_dtype)[0, 0] = file[f"#refs#/m{i}"].ref
            file["value/img"][i, 0] = file[f"#refs#/i{i}"].ref
            file["value/gt"][i, 0] = file[f"#refs#/c{i}"].ref
    return path


def voc(root, names=("a", "b"), size=(9, 7)):
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    (root / "SegmentationClass").mkdir()
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(names) + "\n")
    for name in names:
        Image.new("RGB", size, (9, 9, 9)).save(root / "JPEGImages" / f"{name}.jpg")
        mask = numpy.zeros((size[1], size[0]), dtype=numpy.uint8)
        mask[:3], mask[3], mask[4, 0] = 15, 255, 1
        picture = Image.fromarray(mask).convert("P")
        picture.putdata(mask.flatten().tolist())
        picture.save(root / "SegmentationClass" / f"{name}.png")
    return root


IMDB = [{"text": "a dull film", "label": 0}, {"text": "a joy", "label": 1}]
HUB = {"id": "1", "question": "What falls?", "choices": {"text": ["rain", "up"], "label": ["A", "B"]}, "answerKey": "A"}
AI2 = {
    "question": {"stem": "What falls?", "choices": [{"text": "rain", "label": "A"}, {"text": "up", "label": "B"}]},
    "answerKey": "B",
}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return path


# -- what is read ---------------------------------------------------------------------------------------------------


def test_an_imagenet_folder_is_in_the_order_of_its_synsets(tmp_path):
    found = open_samples(image_folder(tmp_path / "imagenet" / "val").parent)
    assert [(s.name, s.label, s.classes) for s in found] == [
        ("n01/val_0.JPEG", 0, 2), ("n01/val_1.JPEG", 0, 2), ("n02/val_0.JPEG", 1, 2), ("n02/val_1.JPEG", 1, 2)]  # fmt: skip
    assert found[-1].input.size == (20, 16) and len(found) == 4
    (tmp_path / "imagenet" / "LOC_synset_mapping.txt").write_text("n00 a fish\nn02 a bird\nn01 a dog\n")
    listed = open_samples(tmp_path / "imagenet")
    assert [s.label for s in listed] == [2, 2, 1, 1] and listed[0].classes == 3


def test_a_hidden_folder_is_no_class(tmp_path):
    root = image_folder(tmp_path)
    (root / ".cache").mkdir()
    assert [sample.label for sample in open_samples(root)] == [0, 0, 1, 1] and open_samples(root)[0].classes == 2


def test_gtsegs_come_out_the_right_way_round(tmp_path):
    images = [numpy.arange(4 * 6 * 3, dtype=numpy.uint8).reshape(4, 6, 3), numpy.full((5, 3), 7, dtype=numpy.uint8)]
    masks = [numpy.eye(4, 6, dtype=numpy.uint8), numpy.ones((5, 3), dtype=numpy.uint8)]
    found = open_samples(gtsegs(tmp_path / "gtsegs_ijcv.mat", images, masks))
    assert len(found) == 2 and found[0].label is None
    assert numpy.array_equal(numpy.asarray(found[0].input), images[0]) and found[0].mask.tolist() == masks[0].tolist()
    assert found[1].input.mode == "RGB" and found[1].input.size == (3, 5), "a grey image becomes RGB"


def test_voc_has_one_object_and_borders_that_do_not_count(tmp_path):
    voc(tmp_path / "VOCdevkit" / "VOC2012")
    for path in (tmp_path / "VOCdevkit", tmp_path / "VOCdevkit" / "VOC2012"):
        found = open_samples(path)
        assert [s.name for s in found] == ["a", "b"]
        mask = found[1].mask
        assert (
            mask[:3].eq(1).all() and mask[3].eq(-1).all() and mask[4].tolist() == [1] + [0] * 8 and mask[5:].eq(0).all()
        )


def test_images_of_ones_own_with_masks(tmp_path):
    """Grey, black-and-white, palette and coloured masks: what is not 0 is the object."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    want = numpy.zeros((5, 4), dtype=numpy.uint8)
    want[1:3, 2] = 1
    grey = Image.fromarray(want * 255)
    palette = Image.fromarray(want * 7).convert("P")
    palette.putdata((want * 7).flatten().tolist())
    colours = Image.fromarray(numpy.stack([want * 0, want * 3, want * 0], axis=-1))
    for name, mask in {"a": grey, "b": grey.convert("1"), "c": palette, "d": colours}.items():
        Image.new("RGB", (4, 5), (9, 9, 9)).save(tmp_path / "images" / f"{name}.jpg")
        mask.save(tmp_path / "masks" / f"{name}.png")
    found = open_samples(tmp_path)
    assert [s.name for s in found] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    for sample in found:
        assert sample.mask.tolist() == want.tolist() and sample.label is None and sample.input.size == (4, 5)
    (tmp_path / "masks" / "b.png").unlink()
    with pytest.raises(gl.InputError, match=r"masks has no b\.\*, which stands beside it as .*b\.jpg"):
        open_samples(tmp_path)
    (tmp_path / "images" / "b.jpg").unlink()
    grey.save(tmp_path / "images" / "a.png")
    with pytest.raises(gl.InputError, match="names tell images apart"):
        open_samples(tmp_path)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    for file in (tmp_path / "masks").iterdir():
        file.unlink()
    with pytest.raises(gl.InputError, match="holds no image"):
        open_samples(tmp_path)


@pytest.mark.parametrize("saved", [False, True])
def test_reviews_and_questions_become_prompts(tmp_path, saved):
    def opened(rows, name):
        if not saved:
            return open_samples(lines(tmp_path / f"{name}.jsonl", rows))
        import datasets

        split = datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(rows[:1]), "test": datasets.Dataset.from_list(rows)}
        )
        split.save_to_disk(str(tmp_path / name))
        return open_samples(tmp_path / name)

    review = opened(IMDB, "imdb")
    assert len(review) == 2 and review[1].input.text == "a joy" and review[1].label == 1
    assert review[1].input.choices == (" negative", " positive") and review[1].name.endswith(
        "row 1" if saved else "line 3"
    )
    question = opened([HUB], "arc")[0]
    assert question.label == 0 and question.input.text == "What falls?" and "\nB. up\n" in question.input.after
    if not saved:
        other = opened([AI2], "ai2")[0]
        assert other.label == 1 and other.input == question.input


def test_bundled_sets():
    digits, recall, moby = (open_samples(name) for name in ("digits", "recall", "moby"))
    assert len(digits) == 360 and digits[0].mask.shape == (8, 8) and 0 < digits[0].mask.double().mean() < 0.6
    images, labels = gl.data.digits()["test"]
    assert torch.equal(digits[5].mask, ((images[5][0] + 1) * 8 >= 8).long()) and digits[5].label == int(labels[5])
    one = recall[3]
    assert int(one.input[one.truth[0]]) == one.label and int(one.input[one.truth[0] - 1]) == int(one.input[-1])
    assert moby[2].input[0] == 256 and bytes(moby[0].input[1:]) == bytes(gl.data.text()[1][:48].tolist())
    assert chosen(digits, 5, 0) == chosen(digits, 5, 0) != chosen(digits, 5, 1) and chosen(digits, None, 0) == list(
        range(360)
    )
    with pytest.raises(IndexError):
        digits[360]


# -- as a model reads it --------------------------------------------------------------------------------------------


def test_images_of_any_mode_become_the_models(tmp_path):
    vim = gl.HookedViM.tiny()
    assert vim.image_shape[0] == 3
    folder = tmp_path / "f" / "n01"
    folder.mkdir(parents=True)
    size = vim.image_shape[1:]
    for mode in ("L", "P", "RGB", "RGBA", "CMYK"):
        suffix = "jpg" if mode == "CMYK" else "png"
        COLOUR.resize(size).convert(mode).save(folder / f"{mode}.{suffix}")
    read = {s.name: s for s in open_samples(tmp_path / "f")}
    items = {name: Item.of(vim, Sample(name, s.input)) for name, s in read.items()}
    assert all(item.value.shape == vim.image_shape for item in items.values())
    want = vim.preprocess(COLOUR.resize(size))
    assert torch.allclose(items["n01/RGBA.png"].value, want) and torch.allclose(
        items["n01/L.png"].value, want, atol=0.02
    )
    digits = gl.from_pretrained("gatedlens/vim-digits", device="cpu")
    assert Item.of(digits, Sample("x", GREY.resize((8, 8)).convert("RGBA"))).value.shape == (1, 8, 8)
    with pytest.raises(gl.InputError, match=r"x: The image is 256 x 256 and the model reads 8 x 8"):
        Item.of(digits, Sample("x", GREY))


def test_sixteen_bits_are_not_cut_off_at_eight():
    model = gl.HookedViM.tiny(seed=0)
    deep = Image.fromarray(numpy.full((16, 16), 30_000, numpy.uint16))
    with pytest.raises(gl.InputError, match=r"deep: The image has mode 'I;16': of more than 8 bits"):
        Item.of(model, Sample("deep", deep, mask=torch.ones(16, 16).long()))


def test_for_segmentation_nothing_is_cropped():
    digits = gl.from_pretrained("gatedlens/vim-digits", device="cpu")
    mask = torch.zeros(16, 32, dtype=torch.long)
    mask[:8, 16:], mask[8:, :4] = 1, -1
    image = Image.fromarray(((mask == 1) * 255).to(torch.uint8).numpy())
    pixels, small = squeezed(digits, image, mask)
    assert (
        small.shape == (8, 8) and small[:4, 4:].eq(1).all() and small[4:, 0].eq(-1).all() and small[4:, 1:].eq(0).all()
    )
    assert pixels.shape == (1, 8, 8) and torch.equal(pixels[0] > 0, small == 1)
    with pytest.raises(gl.InputError, match="The mask is 32 x 16 and the image 8 x 8"):
        squeezed(digits, image.resize((8, 8)), mask)


def test_of_a_prompt_the_text_alone_may_go(moby_model):
    sample = Sample("r", Prompt("good", "Review: ", "\nIs it", (" no", "yes")), 1)
    item = Item.of(moby_model, sample)
    ids = item.value.tolist()
    assert ids[0] == 256 and bytes(ids[1:]).decode() == "Review: good\nIs it"
    assert bytes([i for i, c in zip(ids, item.content.tolist(), strict=True) if c]) == b"good"
    assert item.choices == (32, ord("y"))
    longer = Item.of(moby_model, Sample("s", Prompt("very good", "Review: ", "\nIs it", (" no", "yes")), 0))
    batch = Items.of([item, longer])
    assert batch.attention_mask.sum(1).tolist() == [len(item.value), len(longer.value)] and batch.labels.tolist() == [
        1,
        0,
    ]
    assert torch.equal(batch.input[0][batch.attention_mask[0]], item.value)
    assert bytes(batch.input[0][~batch.keep[0]].tolist()) == b"good" and batch.among.tolist() == [[32, 121], [32, 121]]
    assert alike(item, longer) and not alike(item, Item(sample, torch.zeros(1, 8, 8), 0))
    with pytest.raises(gl.InputError, match="cannot be told apart"):
        Item.of(moby_model, Sample("t", Prompt("x", choices=(" a", " b")), 0))
    with pytest.raises(gl.InputError, match="t: the text is empty"):
        Item.of(moby_model, Sample("t", Prompt("", "a")))


def test_data_of_another_kind_is_explained(moby_model):
    vim = gl.HookedViM.tiny()
    with pytest.raises(gl.InputError, match="reads images, and this is text"):
        Item.of(vim, Sample("x", Prompt("a")))
    with pytest.raises(gl.InputError, match="reads images, and this is text"):
        Item.of(vim, Sample("x", [1, 2]))
    with pytest.raises(gl.InputError, match="reads text, and this is an image"):
        Item.of(moby_model, Sample("x", GREY))
    with pytest.raises(gl.InputError, match="the data has 2 classes"):
        Item.of(vim, Sample("x", COLOUR, 0, classes=2))
    with pytest.raises(gl.InputError, match=r"the image is \[1, 8, 8\]"):
        Item.of(vim, Sample("x", torch.zeros(1, 8, 8)))


# -- what is wrong --------------------------------------------------------------------------------------------------


def test_broken_lines_are_named(tmp_path):
    path = tmp_path / "imdb.jsonl"
    path.write_text(
        json.dumps(IMDB[0])
        + "\n"
        + '{"text": "cut\n'
        + json.dumps({"text": "x"})
        + "\n[1]\n"
        + json.dumps({"text": "x", "label": 5})
    )
    found = JsonLines(path)
    assert found[0].label == 0
    for i, message in (
        (1, "line 2 is broken"),
        (2, "line 3 has the keys text"),
        (3, "line 4: a row is an object"),
        (4, "line 5.*label is 5"),
    ):
        with pytest.raises(gl.InputError, match=rf"imdb\.jsonl, {message}"):
            found[i]
    arc = JsonLines(lines(tmp_path / "arc.jsonl", [{**HUB, "answerKey": "Z"}, {"question": "?", "answerKey": "A"}]))
    with pytest.raises(gl.InputError, match="line 1.*answerKey is 'Z'"):
        arc[0]
    with pytest.raises(gl.InputError, match="line 3.*KeyError"):
        arc[1]
    with pytest.raises(gl.InputError, match="line 1: ValueError: None is no text"):
        JsonLines(lines(tmp_path / "empty.jsonl", [{"text": None, "label": 0}]))[0]


def test_damaged_mat_files_are_named(tmp_path):
    (tmp_path / "old.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(gl.InputError, match=r"old\.mat is damaged, or no MATLAB 7\.3"):
        open_samples(tmp_path / "old.mat")
    with h5py.File(tmp_path / "other.mat", "w") as file:
        file["x"] = [1]
    with pytest.raises(gl.InputError, match=r"other\.mat has no value/img and no value/gt \(it holds x\)"):
        open_samples(tmp_path / "other.mat")
    image, mask = numpy.zeros((4, 6, 3), numpy.uint8), numpy.zeros((4, 5), numpy.uint8)
    with pytest.raises(gl.InputError, match=r"shapes\.mat, image 0 is damaged: the image has shape"):
        open_samples(gtsegs(tmp_path / "shapes.mat", [image], [mask]))[0]
    full = numpy.zeros((4, 6), numpy.uint8)
    for strange, said in (
        (image.astype(float), "float64"),
        (numpy.zeros((4, 6, 5), numpy.uint8), r"uint8 \[4, 6, 5\]"),
    ):
        with pytest.raises(gl.InputError, match=rf"strange\.mat, image 0 is {said}.*uint8, of 3 colours or grey"):
            open_samples(gtsegs(tmp_path / "strange.mat", [strange], [full]))[0]
    with h5py.File(tmp_path / "flat.mat", "w") as file:
        file["value/img"], file["value/gt"] = 1.0, [1, 2]
    with pytest.raises(gl.InputError, match=r"flat\.mat has no value/img and no value/gt"):
        open_samples(tmp_path / "flat.mat")
    cut = gtsegs(tmp_path / "cut.mat", [image] * 9, [image[:, :, 0]] * 9)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(gl.InputError, match=r"cut\.mat is damaged"):
        open_samples(cut)
    unset = gtsegs(tmp_path / "unset.mat", [image], [image[:, :, 0]])
    with h5py.File(unset, "r+") as file:
        file["#refs#/c0"][0, 0] = h5py.Reference()
    with pytest.raises(gl.InputError, match=r"unset\.mat, image 0 is damaged"):
        open_samples(unset)[0]


def test_missing_and_damaged_images_are_named(tmp_path):
    root = voc(tmp_path / "voc")
    (root / "SegmentationClass" / "b.png").unlink()
    with pytest.raises(gl.InputError, match=r"no mask .*b\.png, though the list .* names b"):
        open_samples(root)[1]
    COLOUR.resize((9, 7)).save(root / "SegmentationClass" / "b.png")
    with pytest.raises(gl.InputError, match=r"b\.png has mode 'RGB'"):
        open_samples(root)[1]
    (root / "JPEGImages" / "a.jpg").write_bytes((root / "JPEGImages" / "a.jpg").read_bytes()[:200])
    with pytest.raises(gl.InputError, match=r"a\.jpg is damaged"):
        open_samples(root)[0]
    (root / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(gl.InputError, match=r"no file .*a\.jpg"):
        open_samples(root)[0]
    (root / "ImageSets" / "Segmentation" / "val.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(gl.InputError, match=r"val\.txt is damaged, or no text"):
        open_samples(root)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("")
    with pytest.raises(gl.InputError, match="names no image"):
        open_samples(root)
    (root / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(gl.InputError, match=r"There is no .*val\.txt"):
        open_samples(root)


def test_what_holds_no_data_is_explained(tmp_path):
    cases = {
        "digit": "There is no data digit.*Did you mean 'digits'",
        str(tmp_path / "none"): "There is no data",
        str(tmp_path): "an empty folder",
    }
    for asked, message in cases.items():
        with pytest.raises(gl.InputError, match=message):
            open_samples(asked)
    (tmp_path / "e.jsonl").write_text("\n\n")
    with pytest.raises(gl.InputError, match=r"e\.jsonl holds no sample"):
        open_samples(tmp_path / "e.jsonl")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(gl.InputError, match=r"is a \.txt file"):
        open_samples(tmp_path / "x.txt")
    GREY.save(tmp_path / "ILSVRC2012_val_00000001.png")
    with pytest.raises(gl.InputError, match=r"1 images lie in it flat: sort them into class folders"):
        ImageFolder(tmp_path)
    image_folder(tmp_path / "f")
    (tmp_path / "f" / "synsets.txt").write_text("n01\n")
    with pytest.raises(gl.InputError, match="n02 is a class that .* does not list"):
        ImageFolder(tmp_path / "f")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "state.json").write_text("{")
    with pytest.raises(gl.InputError, match="is damaged, or no folder of datasets"):
        open_samples(tmp_path / "d")


def test_extras_are_named(tmp_path, monkeypatch):
    gtsegs(tmp_path / "g.mat", [], [])
    for name in ("h5py", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"gatedlens\[data\]"):
        open_samples(tmp_path / "g.mat")
    with pytest.raises(ImportError, match=r"gatedlens\[data\]"):
        SavedDataset(tmp_path)
