"""Whatever timm can load, and any checkpoint on disk that fits, becomes a teacher, if it can be pruned."""

import json

import open_clip
import pytest
import timm
import tiny
import torch
from dgmr import artefact, mlps
from dgmr.check import teacher_skeleton
from dgmr.errors import DgmrError
from dgmr.params import Teacher
from dgmr.prune import prune_model
from dgmr.teacher.convert import convert
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from timm.models._hub import save_config_for_hf


def brought_in(tmp_path, model, checkpoint=None):
    """The teacher's artefact."""
    source = Teacher(model=model, checkpoint=None if checkpoint is None else str(checkpoint))
    convert(source, tmp_path / "teacher")
    return tmp_path / "teacher"


def refused(tmp_path, model, checkpoint=None):
    with pytest.raises(DgmrError) as error:
        brought_in(tmp_path, model, checkpoint)
    assert not (tmp_path / "teacher").exists()
    return str(error.value)


def config_of(tmp_path, model):
    """``local-dir:`` of a folder that has the model's config.json alone."""
    folder = tmp_path / "config"
    folder.mkdir()
    save_config_for_hf(model, str(folder / "config.json"))
    return f"local-dir:{folder}"


def save_shards(tensors, folder):
    names = sorted(tensors)
    parts = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
    for file, mine in parts.items():
        save_file({name: tensors[name] for name in mine}, folder / file)
    index = {"weight_map": {name: file for file, mine in parts.items() for name in mine}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


SAVED = {
    "model.safetensors": lambda tensors, folder: save_file(tensors, folder / "model.safetensors"),
    "shards": save_shards,
    "pytorch_model.bin": lambda tensors, folder: torch.save(tensors, folder / "pytorch_model.bin"),
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_local_folder_becomes_the_same_model(tmp_path, family):
    model = tiny.FAMILIES[family]()
    source = tmp_path / "source"
    save_for_hf(model, str(source), safe_serialization=True)
    teacher = brought_in(tmp_path, f"local-dir:{source}")
    assert torch.equal(artefact.load(teacher)(tiny.pixels()), model(tiny.pixels()))
    found = artefact.provenance(teacher)
    assert (found["stage"], found["source"]) == ("teacher", f"local-dir:{source}")
    assert found["checkpoint"] is None


def test_a_student_of_uneven_widths_may_be_a_teacher_and_be_pruned_again(tmp_path):
    widths = {"blocks.0.mlp": 40, "blocks.1.mlp": 96}
    student = prune_model(tiny.vit(), hidden_features=widths)
    tiny.write_teacher(tmp_path / "student", student)
    teacher = Teacher(model=f"local-dir:{tmp_path / 'student'}")
    convert(teacher, tmp_path / "teacher")
    images = tiny.pixels()
    assert torch.equal(artefact.load(tmp_path / "teacher")(images), student(images))
    assert mlps.widths(teacher_skeleton(teacher)) == widths
    for fewer in (
        {"blocks.0.mlp": 8, "blocks.1.mlp": 90},
        {"blocks.0.mlp": 32, "blocks.1.mlp": 32},
    ):
        again = prune_model(artefact.load(tmp_path / "teacher"), hidden_features=fewer)
        assert mlps.widths(again) == fewer


@pytest.mark.parametrize("beside_config", [True, False])
@pytest.mark.parametrize("how", SAVED)
def test_every_form_of_a_checkpoint_gives_the_same_files(tmp_path, how, beside_config):
    model = tiny.swin()
    name = config_of(tmp_path, model)
    folder = tmp_path / ("config" if beside_config else "weights")
    folder.mkdir(exist_ok=True)
    SAVED[how](model.state_dict(), folder)
    teacher = brought_in(tmp_path, name, None if beside_config else folder)
    artefact.save(tmp_path / "wanted", model, {})
    for file in ("model.safetensors", "config.json"):
        assert (teacher / file).read_bytes() == (tmp_path / "wanted" / file).read_bytes()


def test_checkpoint_for_a_timm_name(tmp_path):
    tensors = timm.create_model("vit_tiny_patch16_224").state_dict()
    path = tmp_path / "weights.pth"
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": wrapped, "epoch": 1}, path)
    teacher = brought_in(tmp_path, "vit_tiny_patch16_224", path)
    written = load_file(teacher / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    found = artefact.provenance(teacher)
    assert (found["source"], found["checkpoint"]) == ("vit_tiny_patch16_224", str(path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(tmp_path, dtype):
    model = tiny.vit().to(dtype)
    name = config_of(tmp_path, model)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    teacher = brought_in(tmp_path, name, tmp_path / "weights.pt")
    found, wanted = load_file(teacher / "model.safetensors"), model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(found[key].dtype == dtype and torch.equal(found[key], wanted[key]) for key in wanted)


# Checkpoints from elsewhere, by timm's converters

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
    "quick_gelu": True,
}


def test_open_clip_vit(tmp_path):
    torch.manual_seed(0)
    clip = tiny.perturb(open_clip.CLIP(**CLIP).eval(), 0.1)
    torch.save({"state_dict": clip.state_dict(), "epoch": 1}, tmp_path / "clip.pt")
    like = timm.create_model("vit_base_patch32_clip_quickgelu_224", num_classes=16, **SMALL)
    teacher = brought_in(tmp_path, config_of(tmp_path, like), tmp_path / "clip.pt")
    found = artefact.load(teacher)(tiny.pixels())
    torch.testing.assert_close(found, clip.encode_image(tiny.pixels()), rtol=1e-4, atol=1e-5)


def test_open_clip_with_a_timm_trunk(tmp_path):
    model = tiny.vit(num_classes=0)
    tensors = {f"visual.trunk.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {"text.positional_embedding": torch.ones(8, 16), "logit_scale": torch.ones(())}
    torch.save(tensors, tmp_path / "clip.pt")
    teacher = brought_in(tmp_path, config_of(tmp_path, model), tmp_path / "clip.pt")
    assert torch.equal(artefact.load(teacher)(tiny.pixels()), model(tiny.pixels()))


def test_eva_clip(tmp_path):
    model = tiny.build("eva02_enormous_patch14_clip_224", num_classes=16, **SMALL)
    tensors = {f"visual.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(tensors | {"text.ln_final.bias": torch.ones(4)}, tmp_path / "eva.pt")
    teacher = brought_in(tmp_path, config_of(tmp_path, model), tmp_path / "eva.pt")
    assert torch.equal(artefact.load(teacher)(tiny.pixels()), model(tiny.pixels()))


def test_converters_options_are_the_families_own(tmp_path):
    # DeiT III's differs from ViT's by an option that only timm's loader is told.
    model = tiny.build("deit3_small_patch16_224", **SMALL)
    state = model.state_dict()
    authors = {name.replace("ls1.gamma", "gamma_1"): tensor for name, tensor in state.items()}
    authors = {name.replace("ls2.gamma", "gamma_2"): tensor for name, tensor in authors.items()}
    assert authors.keys() != state.keys()
    torch.save({"model": authors}, tmp_path / "deit3.pth")
    teacher = brought_in(tmp_path, config_of(tmp_path, model), tmp_path / "deit3.pth")
    assert torch.equal(artefact.load(teacher)(tiny.pixels()), model(tiny.pixels()))


# What is refused


@pytest.mark.parametrize("name", ["vit_of_nowhere", "local-dir:/no/such/folder", "seresnet18"])
def test_what_timm_cannot_load_is_one_sentence(tmp_path, name):
    assert refused(tmp_path, name).startswith(f"teacher.model: {name} cannot be loaded: ")
    assert not list(tmp_path.iterdir())


def test_mlps_that_cannot_be_pruned_are_refused_before_weights_are_read(tmp_path):
    small = {"embed_dims": (8, 16, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    convolutional = timm.create_model("pvt_v2_b0", **small)
    name = config_of(tmp_path, convolutional)
    (tmp_path / "config" / "model.safetensors").touch()
    assert "pvt_v2_b0: stages.0.blocks.0.mlp is a" in refused(tmp_path, name)


def fault(tmp_path, change):
    model = tiny.vit()
    tensors = model.state_dict()
    change(tensors)
    save_file(tensors, tmp_path / "weights.safetensors")
    name = config_of(tmp_path, model)
    told = refused(tmp_path, name, tmp_path / "weights.safetensors")
    start = f"{tmp_path / 'weights.safetensors'} does not fit teacher.model {name}: "
    assert told.startswith(start) and "\n" not in told
    return told.removeprefix(start).split(". Name the architecture")[0]


def test_missing_tensors(tmp_path):
    def change(tensors):
        for name in [name for name in tensors if name.startswith("blocks.1.")]:
            del tensors[name]

    told = "12 missing (blocks.1.norm1.weight, blocks.1.norm1.bias, blocks.1.attn.qkv.weight, ...)"
    assert fault(tmp_path, change) == told


def test_unexpected_and_wrongly_shaped_tensors(tmp_path):
    def change(tensors):
        tensors["extra"] = torch.ones(1)
        tensors["head.bias"] = torch.ones(11)
        tensors["norm.weight"] = torch.ones(32, dtype=torch.int64)

    assert fault(tmp_path, change) == (
        "1 unexpected (extra); 2 of another shape or kind (norm.weight [32] torch.int64, not [32],"
        " head.bias [11], not [10])"
    )


def test_weights_of_another_model(tmp_path):
    name = config_of(tmp_path, tiny.vit())
    save_file(tiny.swin().state_dict(), tmp_path / "weights.safetensors")
    told = refused(tmp_path, name, tmp_path / "weights.safetensors")
    assert "missing (cls_token, pos_embed," in told or "cannot be converted" in told


def test_half_a_file(tmp_path):
    model = tiny.vit()
    source = tmp_path / "source"
    save_for_hf(model, str(source), safe_serialization=True)
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "copy or download it again" in refused(tmp_path, f"local-dir:{source}")
