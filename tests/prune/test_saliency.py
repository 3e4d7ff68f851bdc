"""The saliency is the features' squared slope along a mask of each hidden unit."""

import pytest
import tiny
import torch
from dgmr import artefact
from dgmr.images import calibration_images
from dgmr.mlps import mlps
from dgmr.models import outputs
from dgmr.prune import saliency
from dgmr.prune.model import prune_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader


def small(**changes):
    return tiny.vit(embed_dim=16, patch_size=16, mlp_ratio=1.5, num_classes=0, **changes)


def config(samples):
    return tiny.features_config(calibration={"samples": samples, "tokens": 1}, batch_size=4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.write_teacher(tmp_path_factory.mktemp("saliency") / "teacher", small())


def images_of(teacher, data, samples):
    batches = calibration_images(data, artefact.load(teacher), config(samples))
    return torch.cat(list(batches)).double()


def masked_features(model, image, masks):
    """All the teacher's features ``[features]`` of one image, unit j of an MLP times its mask."""
    hooks = [
        mlp.module.fc2.register_forward_pre_hook(
            lambda _m, given, mask=masks[name]: given[0] * mask
        )
        for name, mlp in mlps(model).items()
    ]
    found = torch.cat([part.flatten() for part in outputs(model, image[None])])
    for hook in hooks:
        hook.remove()
    return found


def by_jacobian(model, images):
    """By MLP, the sum over the features of (d feature / d mask)^2, averaged over the images."""
    model = model.double().requires_grad_(False)
    ones = {n: torch.ones(m.hidden_features, dtype=torch.double) for n, m in mlps(model).items()}
    total = dict.fromkeys(ones, 0)
    for image in images:

        def features(*masks, image=image):
            return masked_features(model, image, dict(zip(ones, masks, strict=True)))

        slopes = torch.autograd.functional.jacobian(features, tuple(ones.values()))
        for name, slope in zip(ones, slopes, strict=True):
            total[name] = total[name] + slope.square().sum(0)
    return {name: value / len(images) for name, value in total.items()}


def computed(folder, teacher, data, samples, seed):
    saliency.compute(teacher, data, config(samples), seed, folder)
    return {path.stem: load_file(path)["scores"] for path in sorted(folder.glob("*.safetensors"))}


def test_scores_converge_to_those_of_the_explicit_jacobian(tmp_path, monkeypatch, teacher, data):
    """The same images again and again, each time with another probe."""
    images = images_of(teacher, data, 5)
    expected = by_jacobian(artefact.load(teacher), images)
    errors = {}
    for probes in (40, 1000):
        repeated = DataLoader(images.float().repeat(probes, 1, 1, 1), 500)
        monkeypatch.setattr(saliency, "calibration_images", lambda *_, it=repeated: it)
        found = computed(tmp_path / "scores", teacher, data, 5, 0)
        assert found.keys() == expected.keys() == {"blocks.0.mlp", "blocks.1.mlp"}
        errors[probes] = max(
            float((found[name] - value).norm() / value.norm()) for name, value in expected.items()
        )
    assert errors[1000] < 0.03
    assert errors[1000] < 0.5 * errors[40]  # a fifth, as the root of the number of probes


def test_one_probe_of_exact_gradients(tmp_path, monkeypatch, teacher, data):
    """With the same probe for all, the score is the squared slope of the probed features' sum."""
    monkeypatch.setattr(saliency, "_probe", lambda part, _generator: torch.ones_like(part))
    found = computed(tmp_path / "scores", teacher, data, 5, 0)
    model = artefact.load(teacher).double().requires_grad_(False)
    expected = dict.fromkeys(found, 0)
    images = images_of(teacher, data, 5)
    for image in images:
        masks = {n: torch.ones(24, dtype=torch.double, requires_grad=True) for n in found}
        slopes = torch.autograd.grad(masked_features(model, image, masks).sum(), masks.values())
        for name, slope in zip(masks, slopes, strict=True):
            expected[name] = expected[name] + slope.square() / len(images)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6 * float(value.max()))


@pytest.mark.parametrize("family", ["swin", "attention pool", "packed", "gated with norm"])
def test_every_mlp_of_other_families_is_scored(tmp_path, data, family):
    teacher = tiny.write_teacher(tmp_path / "teacher", tiny.FAMILIES[family]())
    found = computed(tmp_path / "scores", teacher, data, 3, 0)
    assert {n: len(s) for n, s in found.items()} == {
        n: m.hidden_features for n, m in mlps(artefact.load(teacher)).items()
    }
    assert all(scores.isfinite().all() and scores.min() >= 0 for scores in found.values())


def test_equal_seeds_give_equal_files(tmp_path, teacher, data):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        computed(tmp_path / name, teacher, data, 5, seed)
    one, again, other = (
        [path.read_bytes() for path in sorted((tmp_path / name).iterdir())]
        for name in ("one", "again", "other")
    )
    assert one == again and len(one) == 2
    assert all(first != second for first, second in zip(one, other, strict=True))


def test_units_that_nothing_reads_have_no_saliency(tmp_path, data):
    model = small()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight[:, 5] = 0
    teacher = tiny.write_teacher(tmp_path / "teacher", model)
    scores = computed(tmp_path / "scores", teacher, data, 5, 0)["blocks.0.mlp"]
    assert (scores == 0).nonzero().flatten().tolist() == [5]


def test_slope_of_the_distillation_loss_is_zero_at_the_dense_model(teacher, data):
    model = artefact.load(teacher).double().requires_grad_(False)
    masks = {n: torch.ones(24, dtype=torch.double, requires_grad=True) for n in mlps(model)}
    image = images_of(teacher, data, 1)[0]
    wanted = masked_features(model, image, masks).detach()

    def slopes():
        loss = (masked_features(model, image, masks) - wanted).square().mean()
        return torch.cat(torch.autograd.grad(loss, list(masks.values())))

    assert torch.equal(slopes(), torch.zeros(48, dtype=torch.double))
    with torch.no_grad():
        masks["blocks.0.mlp"][3] = 0
    assert slopes().abs().max() > 0


def test_bfloat16_teachers_are_scored_in_float32(tmp_path, data):
    dense = small()
    rounded = tiny.write_teacher(tmp_path / "rounded", dense.bfloat16())
    same = tiny.write_teacher(tmp_path / "same", dense.float())
    found, expected = (computed(tmp_path / t.name / "s", t, data, 3, 0) for t in (rounded, same))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_keeping_by_saliency_moves_the_features_less_than_keeping_the_others(
    tmp_path, teacher, data
):
    dense, images = artefact.load(teacher).double(), images_of(teacher, data, 9)
    dense.requires_grad_(False)
    scores = computed(tmp_path / "scores", teacher, data, 9, 0)
    wanted = outputs(dense, images).patch_tokens
    moved = {}
    for descending in (True, False):
        orders = {name: value.argsort(descending=descending) for name, value in scores.items()}
        student = prune_model(dense, 1.25, orders=orders)
        moved[descending] = float((outputs(student, images).patch_tokens - wanted).square().mean())
    assert moved[True] < 0.5 * moved[False]
