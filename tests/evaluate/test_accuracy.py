"""Scores equal an independent computation, with plain timm, PIL and numpy."""

import numpy as np
import pytest
import timm
import tiny
import torch
from dgmr import artefact
from dgmr.data import evaluation
from dgmr.errors import DgmrError
from dgmr.evaluate.accuracy import evaluate, flops
from dgmr.files import read_json
from dgmr.models import evaluation_transform, outputs
from dgmr.params import EvaluationData
from dgmr.prune import prune_model
from torchvision.datasets import ImageFolder

BATCH = 4
RATIO = 1
IMAGES = sum(tiny.COUNTS)
AGREEMENT = {"pooled_mse", "patch_tokens_mse", "feature_mse", "cosine", "same_top1"}


@torch.inference_mode()
def plain_answers(folder, images):
    """Pooled output, patch tokens and logits of PIL ``images``, as numpy arrays."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    batches = torch.stack([transform(image) for image in images]).split(BATCH)
    logits = torch.cat([model(batch) for batch in batches])
    said = [outputs(model, batch) for batch in batches]
    pooled, tokens = (torch.cat(parts) for parts in zip(*said, strict=True))
    return pooled.numpy(), tokens.numpy(), logits.numpy()


def plain_scores(logits, labels):
    """Top-1 and top-5 in percent, by the rank of the true class."""
    true = logits[np.arange(len(labels)), labels]
    ranks = (logits > true[:, None]).sum(1)
    return {"top1": 100 * (ranks < 1).mean(), "top5": 100 * (ranks < 5).mean()}


def plain_agreement(answers, teacher_answers):
    (pooled, tokens, logits), (said, said_tokens, said_logits) = answers, teacher_answers
    found = {
        "pooled_mse": np.square(pooled.astype(float) - said).mean(),
        "patch_tokens_mse": np.square(tokens.astype(float) - said_tokens).mean(),
        "same_top1": 100 * (logits.argmax(1) == said_logits.argmax(1)).mean(),
    }
    lengths = np.linalg.norm(pooled, axis=1) * np.linalg.norm(said, axis=1)
    found["cosine"] = ((pooled * said).sum(1) / lengths).mean()
    found["feature_mse"] = found["pooled_mse"] + found["patch_tokens_mse"]
    return found


@pytest.fixture(scope="module")
def pictures():
    return [tiny.image(index) for index in range(IMAGES)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, pictures):
    """Its answers differ from picture to picture: the head sees what a picture has of its own."""
    model = tiny.vit()
    transform = evaluation_transform(model)
    with torch.no_grad():
        common = outputs(model, torch.stack([transform(image) for image in pictures])).pooled.mean(
            0
        )
        model.head.bias.copy_(-model.head.weight @ common)
    return tiny.write_teacher(tmp_path_factory.mktemp("evaluate") / "teacher", model)


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("evaluate") / "student"
    artefact.save(folder, prune_model(artefact.load(teacher), RATIO), {"stage": "prune"})
    return folder


@pytest.fixture(scope="module")
def labels(student, pictures):
    """Some the student's best class, some its third, some its last."""
    order = plain_answers(student, pictures)[2].argsort(1)[:, ::-1]
    return [int(order[index, (0, 2, 9)[index % 3]]) for index in range(IMAGES)]


@pytest.fixture(scope="module")
def data(tmp_path_factory, labels):
    return tiny.write_data(tmp_path_factory.mktemp("evaluate") / "data", labels=labels)


@pytest.fixture
def run(tmp_path, teacher, data):
    def run(folder, data=data, teacher=teacher):
        evaluate("some", folder, teacher, data, BATCH, tmp_path / "some.json")
        return read_json(tmp_path / "some.json")

    return run


def test_scores_of_a_student(run, student, teacher, pictures, labels):
    found = run(student)
    answers, said = plain_answers(student, pictures), plain_answers(teacher, pictures)
    expected = plain_scores(answers[2], labels) | plain_agreement(answers, said)
    assert (expected["top1"], expected["top5"]) == pytest.approx((100 / 3, 200 / 3))
    assert 0 < expected["same_top1"] < 100 and expected["cosine"] < 0.99
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert found["model"] == "some" and found["samples"] == IMAGES
    assert found["sha256"] == artefact.provenance(student)["sha256"]
    assert found["teacher_sha256"] == artefact.provenance(teacher)["sha256"]


def test_teacher_is_not_compared_with_itself(run, teacher, pictures, labels):
    found = run(teacher)
    expected = plain_scores(plain_answers(teacher, pictures)[2], labels)
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert not AGREEMENT & found.keys()


def test_equal_answers_of_other_weights_agree_wholly(run, tmp_path, teacher):
    twin = artefact.load(teacher)
    with torch.no_grad():  # hidden units change places
        for block in twin.blocks:
            order = torch.randperm(128)
            for linear in (block.mlp.fc1.weight, block.mlp.fc1.bias):
                linear.copy_(linear[order])
            block.mlp.fc2.weight.copy_(block.mlp.fc2.weight[:, order])
    artefact.save(tmp_path / "twin", twin, {})
    found = run(tmp_path / "twin")
    assert found["feature_mse"] < 1e-10
    assert (found["cosine"], found["same_top1"]) == pytest.approx((1, 100), abs=1e-5)


def test_batch_size_makes_no_difference(tmp_path, teacher, student, data):
    scores = []
    for batch_size in (1, 64):
        evaluate("some", student, teacher, data, batch_size, tmp_path / "some.json")
        scores.append(read_json(tmp_path / "some.json"))
    numbers = [
        {key: value for key, value in score.items() if isinstance(value, int | float)}
        for score in scores
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


def test_without_a_classifier_there_is_no_accuracy(run, tmp_path):
    teacher = tiny.write_teacher(tmp_path / "teacher", tiny.siglip())
    artefact.save(tmp_path / "student", prune_model(artefact.load(teacher), 1), {})
    found = run(tmp_path / "student", teacher=teacher)
    assert not {"top1", "top5", "same_top1"} & found.keys()
    assert found.keys() >= AGREEMENT - {"same_top1"}
    assert found["cosine"] < 1


def test_few_classes_have_a_top5_of_all(run, tmp_path):
    data = tiny.write_data(tmp_path / "data", labels=[0, 1, 2] * 3)
    teacher = tiny.write_teacher(tmp_path / "teacher", tiny.vit(num_classes=3))
    found = run(teacher, data=data, teacher=teacher)
    assert found["top5"] == 100 > found["top1"]


def plain_flops(hidden, tokens=17, width=32, depth=2, classes=tiny.CLASSES):
    """Twice the multiply-adds of a ViT's matrix products."""
    patches = (tokens - 1) * (3 * 8 * 8) * width
    attention = tokens * width * 3 * width + 2 * tokens * tokens * width + tokens * width * width
    mlp = 2 * tokens * width * hidden
    return 2 * (patches + depth * (attention + mlp) + width * classes)


def test_flops_and_parameters_follow_from_the_widths(run, teacher, student):
    for folder, hidden in ((teacher, 128), (student, 32 * RATIO)):
        found = run(folder)
        assert found["flops"] == plain_flops(hidden)
        model = artefact.load(folder)
        assert found["params"] == sum(p.numel() for p in model.parameters())
    lost = artefact.load(teacher), artefact.load(student)
    difference = sum(p.numel() for p in lost[0].parameters()) - found["params"]
    assert difference == 2 * (128 - 32 * RATIO) * (32 + 1 + 32)


def test_flops_need_no_gradients_and_no_inference_mode():
    model = tiny.vit()
    with torch.inference_mode():
        assert flops(model) == plain_flops(128)
    assert flops(model) == plain_flops(128)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([10] + [0] * 8, "labels go from 0 to 10, but the model has 10 classes"),
        ([3, -1] + [5] * 7, "labels go from -1 to 5, but the model has 10 classes"),
        (None, "9 images have no label"),
    ],
)
def test_labels_that_are_no_classes_are_refused(run, tmp_path, teacher, wrong, said):
    data = tiny.write_data(tmp_path / "data", labels=wrong)
    with pytest.raises(DgmrError, match=f"data.eval: {said}"):
        run(teacher, data=data)


def test_damaged_weights_and_images_are_refused(run, tmp_path, teacher, student, labels):
    copy = tiny.write_teacher(tmp_path / "copy")
    tiny.damage(copy / "model.safetensors")
    for arguments in ({"folder": copy}, {"folder": student, "teacher": copy}):
        with pytest.raises(DgmrError, match="copy/model.safetensors is not the file"):
            run(**arguments)
    data = tiny.write_data(tmp_path / "data", labels=labels)
    tiny.damage(data / "00002.tar")
    with pytest.raises(DgmrError, match=r"00002\.tar is not the shard"):
        run(student, data=data)
    assert not (tmp_path / "some.json").exists()


def full_size_vit(photos):
    """1000 classes at 224 px; its head knows every second photo, and takes the others for the next."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=2).eval()
    tiny.perturb(model, 0.1)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with torch.inference_mode():
        features = outputs(model, torch.stack([transform(photo) for photo in photos])).pooled
        features -= features.mean(0)
    with torch.no_grad():
        model.head.bias.fill_(-100)
        model.head.bias[: len(photos)] = 0
        knows = [index ^ 1 if index % 4 > 1 else index for index in range(len(photos))]
        model.head.weight[: len(photos)] = features[knows] / features.norm(dim=1)[knows, None]
    return model


def test_real_photos_score_as_in_a_plain_timm_loop(tmp_path, photos, run):
    paths = sorted(photos.glob("*.JPEG"))[:24]
    for path in paths:  # class folders sort as their WordNet ids do
        folder = tmp_path / "photos" / path.stem.split("_")[0]
        folder.mkdir(parents=True)
        (folder / path.name).symlink_to(path)
    known = [image for image, _ in ImageFolder(str(tmp_path / "photos"))]
    dense = full_size_vit(known)
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    artefact.save(teacher, dense, {})
    artefact.save(student, prune_model(dense, 3), {})

    config = EvaluationData(source="imagefolder", path=str(tmp_path / "photos"))
    evaluation.make(config, 10, tmp_path / "eval", tmp_path)
    labels = np.array(ImageFolder(str(tmp_path / "photos")).targets)
    answers = {folder: plain_answers(folder, known) for folder in (teacher, student)}
    for folder in (teacher, student):
        found = run(folder, data=tmp_path / "eval", teacher=teacher)
        expected = plain_scores(answers[folder][2], labels)
        assert 20 < expected["top1"] < 80 and expected["top1"] <= expected["top5"]
        assert {key: found[key] for key in expected} == expected
        assert found["samples"] == len(paths)
    expected = plain_agreement(answers[student], answers[teacher])
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
