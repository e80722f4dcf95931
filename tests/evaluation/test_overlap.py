"""Segmentation against loops over pixels; the best and the worst map; pixels that do not count; constant maps."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.evaluation import estimate, segmentation
from gatedlens.evaluation.overlap import average_precision, foreground, normalised


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(maps, masks):
    """(pixel accuracy, mIoU, mAP) with counts over all pixels of all images."""
    right = total = 0
    both, either, precisions = [0, 0], [0, 0], []
    for m, t in zip(maps, masks, strict=True):
        wide = torch.nn.functional.interpolate(m[None, None], t.shape, mode="bilinear")[0, 0]
        low, high = float(wide.min()), float(wide.max())
        R = [[(v - low) / (high - low) for v in row] for row in wide.tolist()]
        mean = sum(map(sum, R)) / t.numel()
        pairs = []
        for y in range(t.shape[0]):
            for x in range(t.shape[1]):
                truth = int(t[y, x])
                if truth == -1:
                    continue
                guess = int(R[y][x] > mean)
                right, total = right + (guess == truth), total + 1
                for c in (0, 1):
                    both[c] += guess == c and truth == c
                    either[c] += guess == c or truth == c
                pairs += [(R[y][x], truth == 1), (1 - R[y][x], truth == 0)]
        precisions.append(precision(pairs))
    return right / total, sum(b / e for b, e in zip(both, either, strict=True)) / 2, sum(precisions) / len(precisions)


def precision(pairs):
    """One threshold after another."""
    positives, out, before = sum(hit for _, hit in pairs), 0.0, 0.0
    for threshold in sorted({score for score, _ in pairs}, reverse=True):
        taken = [hit for score, hit in pairs if score >= threshold]
        recall = sum(taken) / positives
        out += (recall - before) * sum(taken) / len(taken)
        before = recall
    return out


def test_the_numbers_are_those_of_a_slow_loop():
    maps, masks = draw(3, 4, 4), (draw(3, 9, 7, seed=1) > 0.6).long()
    masks[0, :2] = -1
    found = segmentation(maps, masks)
    accuracy, iou, ap = by_hand(maps, masks)
    assert found.pixel_accuracy.value == pytest.approx(accuracy, abs=1e-12)
    assert found.mean_iou.value == pytest.approx(iou, abs=1e-12)
    assert found.mean_ap.value == pytest.approx(ap, abs=1e-10)
    for one in found.estimates().values():
        assert one.low <= one.value <= one.high


def test_average_precision_agrees_with_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, truth = (draw(50) * 8).round() / 8, draw(50, seed=2) > 0.5
    want = sklearn.average_precision_score(truth.numpy(), scores.numpy())
    assert average_precision(scores, truth) == pytest.approx(float(want), abs=1e-12)
    pairs = list(zip(scores.tolist(), truth.tolist(), strict=True))
    assert average_precision(scores, truth) == pytest.approx(precision(pairs), abs=1e-12)


def test_a_perfect_map_and_its_opposite():
    masks = (draw(4, 6, 6) > 0.5).long()
    best, worst = segmentation(masks.double() * 3 - 1, masks), segmentation(-masks.double(), masks)
    assert [e.value for e in best.estimates().values()] == [1, 1, 1]
    assert worst.pixel_accuracy.value == 0 and worst.mean_iou.value == 0 and worst.mean_ap.value == pytest.approx(0.5)
    assert torch.equal(segmentation(masks.double(), masks == 1).correct, best.correct)


def test_pixels_that_do_not_count():
    masks = torch.tensor([[[1, 0], [-1, -1]]])
    for other in (-5.0, 0.5, 9.0):
        map = torch.tensor([[[10.0, -10.0], [other, other]]])
        found = segmentation(map, masks)
        assert found.pixel_accuracy.value == 1 and found.mean_iou.value == 1 and float(found.labelled) == 2


def test_a_constant_map_says_nothing():
    masks = (draw(2, 5, 5) > 0.5).long()
    found = segmentation(torch.full((2, 5, 5), 0.3), masks)
    assert not bool(foreground(normalised(torch.full((2, 5, 5), 0.1))).any())
    assert found.pixel_accuracy.value == pytest.approx(float((masks == 0).double().mean()))
    assert found.mean_ap.value == pytest.approx(0.5)
    assert all(e.value == e.value for e in found.estimates().values())
    only = segmentation(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2).long())
    assert only.mean_iou.value == 1, "a class that is nowhere is left out"


@pytest.mark.parametrize("value", [0.1, 0.2, 0.7, 123.456])
def test_a_constant_map_of_patches_says_nothing_either(value):
    """Bilinear weights of 1/4 and 3/4 round: 0.1 would come out as two numbers, and min-maxed as a map of stripes."""
    masks = (draw(2, 8, 8) > 0.5).long()
    found = segmentation(torch.full((2, 4, 4), value, dtype=torch.float64), masks)
    assert found.pixel_accuracy.value == pytest.approx(float((masks == 0).double().mean()))
    assert found.mean_ap.value == pytest.approx(0.5)


def test_intervals_are_those_of_drawing_samples_anew():
    x = draw(200)
    value, low, high = estimate(x)
    error = float(x.std() / 200**0.5)
    assert value == pytest.approx(float(x.mean())) and low == pytest.approx(value - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(value + 1.96 * error, abs=0.2 * error)
    assert estimate(x) == estimate(x) and estimate(x, seed=1) != estimate(x)
    ratio = estimate(torch.stack([x, 2 * x], 1), lambda mean: mean[..., 0] / mean[..., 1])
    assert tuple(ratio) == pytest.approx((0.5, 0.5, 0.5))
    one = estimate(x[:1])
    assert one.value == float(x[0]) and one.low != one.low
    with pytest.raises(gl.InputError, match="no sample"):
        estimate(x[:0])


def test_an_attribution_is_a_map():
    model = gl.HookedViM.tiny()
    images = torch.randn(2, *model.image_shape)
    found = gl.attribution.random(model, images)
    masks = (draw(2, 12, 12) > 0.5).long()
    assert torch.equal(segmentation(found, masks).correct, segmentation(found.scores, masks).correct)


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        (torch.zeros(1, 2, 2), torch.zeros(2, 2, 2), "have shapes"),
        (torch.zeros(2, 2), torch.zeros(2, 2, 2), "have shapes"),
        (torch.zeros(0, 2, 2), torch.zeros(0, 2, 2), "have shapes"),
        (torch.zeros(1, 2, 2), torch.full((1, 2, 2), 255), "this one also 255"),
        (torch.full((1, 2, 2), torch.inf), torch.zeros(1, 2, 2), "not finite"),
        (torch.zeros(1, 2, 2), torch.full((1, 2, 2), -1), "Mask 0 has no pixel that counts"),
    ],
)
def test_mistakes_are_explained(maps, masks, message):
    with pytest.raises(gl.InputError, match=message):
        segmentation(maps, masks)


def test_a_mask_of_another_frame_is_refused():
    """A wide image's own mask is not that of the square that was cut out of it."""
    scores = torch.zeros(1, 14, 14)
    scores[:, :, :7] = 1
    wide = torch.zeros(1, 100, 300)
    wide[:, :, 100:150] = 1
    for mask in (wide, wide.mT, wide[:, :, :133], wide[:, :, :120]):
        with pytest.raises(gl.InputError, match=r"another aspect ratio.*model.preprocess_mask\(mask\)"):
            segmentation(scores, mask)
    assert segmentation(scores, wide[:, :, 100:200]).mean_iou.value == 1
    model = gl.HookedViM.tiny()
    found = gl.attribution.random(model, torch.randn(1, *model.image_shape))
    with pytest.raises(gl.InputError, match=r"\[24, 26\] and the images \[12, 12\]"):
        segmentation(found, torch.zeros(1, 24, 26))
    assert segmentation(found, torch.zeros(1, 24, 24)).pixel_accuracy.value >= 0


def test_a_mask_is_cut_as_its_image_is():
    """A mask that is the image itself, in black and white, stays so; what does not count stays that."""
    image_module = pytest.importorskip("PIL.Image")
    model = gl.HookedViM.tiny(img_size=64, patch_size=16, stride=16)
    for height, width in ((100, 300), (90, 70), (64, 64), (73, 73)):
        mask = torch.zeros(height, width, dtype=torch.long)
        mask[: height // 2, width // 2 - 20 : width // 2] = 1
        image = image_module.fromarray((mask * 255).to(torch.uint8).numpy()).convert("RGB")
        seen = model.preprocess(image)
        bright = (seen[0] - seen[0].min()) / (seen[0].max() - seen[0].min()) > 0.5
        cut = model.preprocess_mask(mask)
        assert cut.shape == (64, 64) and float((cut == bright).double().mean()) > 0.97
        assert torch.equal(model.preprocess_mask(mask == 1), cut)
        assert torch.equal(model.preprocess_mask(-mask), -cut)
    small = gl.HookedViM.tiny()
    exact = (draw(12, 12) > 0.5).long() - (draw(12, 12, seed=1) > 0.8).long()
    assert torch.equal(small.preprocess_mask(exact), exact)
    for wrong, message in (
        (torch.zeros(1, 12, 12), r"\[height, width\].*shape \[1, 12, 12\]"),
        (torch.full((12, 12), 255), "1 .the object., 0 and -1"),
        (torch.zeros(13, 12), "The image is 12 x 13"),
    ):
        with pytest.raises(gl.InputError, match=message):
            small.preprocess_mask(wrong)


def test_numbers_do_not_hang_on_rounding():
    """Maps that differ in their last digits, with values that are equal and one that is the mean: the same numbers."""
    maps = torch.tensor([[[0.1, 0.3, 0.5], [0.3, 0.5, 0.7], [0.5, 0.7, 0.9]], [[0.2] * 3] * 3], dtype=torch.float64)
    masks = torch.cat([(draw(1, 9, 9) > 0.5), (draw(1, 9, 9, seed=1) > 0.5)]).long()
    want = segmentation(maps, masks)
    assert not foreground(normalised(maps))[0].diagonal().flip(0)[1], "the mean is not above the mean"
    for seed in range(5):
        noise = torch.randn(maps.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = segmentation(maps * 3 + 1e-15 * noise, masks)
        for name, values in vars(want).items():
            assert torch.allclose(vars(found)[name], values, atol=1e-12), name
