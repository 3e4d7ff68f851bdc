"""The first job: each bad input ends in its sentence, before any work."""

import json
import shutil
from collections import namedtuple

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import tiny
import webdataset
from dgmr import artefact
from dgmr.check import check, teacher_skeleton
from dgmr.errors import DgmrError
from dgmr.files import read_json
from dgmr.params import Params, Teacher
from pictures import encoded

FASHION = {"urls": "file", "n_samples": 10}
STAGE = {"train": "all", "samples": 64, "lr": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("check")


@pytest.fixture(scope="module")
def vit(folder):
    """``local-dir:`` of a ViT with 3 classes, 32 dimensions and 4 times as many hidden neurons."""
    artefact.save(folder / "vit", tiny.vit(num_classes=3), {})
    return f"local-dir:{folder / 'vit'}"


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"URL": ["a"], "punsafe": [0.0]}), path)
    return path


def run(tmp_path, model, ratio=1.0, data=None, checkpoint=None, **sections):
    """``sections`` of params, and ``stages``."""
    values = {
        "teacher": {"model": model, "checkpoint": checkpoint},
        "data": FASHION | (data or {}),
        "prune": {"ratio": ratio, "max_ratio": max(2.0, ratio)},
        "distill": {"stages": sections.pop("stages", {"only": STAGE})},
    }
    config = Params.model_validate(values | sections)
    check(config, tmp_path / "work" / "targets", tmp_path / "check.json")
    return read_json(tmp_path / "check.json")


def refused(tmp_path, *arguments, **more):
    """The one sentence; nothing is written."""
    (tmp_path / "check.json").unlink(missing_ok=True)
    with pytest.raises(DgmrError) as error:
        run(tmp_path, *arguments, **more)
    assert not (tmp_path / "check.json").exists()
    return str(error.value)


def own_table(path):
    return {"source": "table", "table": str(path)}


def photos(folder, *classes):
    for name in classes:
        (folder / name).mkdir(parents=True)
        (folder / name / "a.png").write_bytes(encoded())
    return {"eval": {"source": "imagefolder", "path": str(folder)}}


def test_good_params_are_written_down(tmp_path, vit, table):
    data = own_table(table) | photos(tmp_path / "photos", "a", "b", "c")
    assert run(tmp_path, vit, ratio=4.0, data=data) == {
        "teacher": {
            "model": vit,
            "hidden_features": {"blocks.0.mlp": 128, "blocks.1.mlp": 128},
            "mlps": 2,
        }
    }


def test_no_weights_are_read_nor_memory_taken(vit, folder, tmp_path):
    skeleton = teacher_skeleton(Teacher(model=vit))
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    hollow = tmp_path / "hollow"
    shutil.copytree(folder / "vit", hollow)
    (hollow / "model.safetensors").write_bytes(b"")
    assert run(tmp_path, f"local-dir:{hollow}")["teacher"]["mlps"] == 2


@pytest.mark.parametrize(
    ("model", "mlps"),
    [
        ("vit_tiny_patch16_224", 12),
        ("swin_tiny_patch4_window7_224.ms_in1k", 12),
        (
            "eva02_enormous_patch14_clip_224.laion2b",
            64,
        ),  # of the EVA-02 family, yet with plain MLPs
    ],
)
def test_timm_names_are_known(tmp_path, model, mlps):
    assert run(tmp_path, model)["teacher"]["mlps"] == mlps


# The teacher


def test_unknown_model(tmp_path):
    sentence = refused(tmp_path, "vit_tinny_patch16_224")
    assert sentence.startswith("teacher.model: timm knows no model vit_tinny_patch16_224;")
    assert "hf-hub:<repository> or local-dir:<folder>" in sentence


def test_known_model_without_pretrained_weights(tmp_path):
    bare = next(name for name in timm.list_models("vit_*") if not timm.is_model_pretrained(name))
    for name in (bare, "vit_tiny_patch16_224.no_such_weights"):
        wanted = f"teacher.model: timm has no pretrained weights for {name}."
        assert refused(tmp_path, name) == wanted


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_local_folder_lacks_a_file(tmp_path, vit, folder, name):
    shutil.copytree(folder / "vit", tmp_path / "vit")
    (tmp_path / "vit" / name).unlink()
    sentence = refused(tmp_path, f"local-dir:{tmp_path / 'vit'}")
    assert sentence.startswith(f"teacher.model: {tmp_path / 'vit' / name} is missing;")
    assert "as timm.models.save_for_hf writes it" in sentence


def test_weights_may_lie_elsewhere(tmp_path, vit, folder):
    shutil.copytree(folder / "vit", tmp_path / "vit")
    weights = (tmp_path / "vit" / "model.safetensors").rename(tmp_path / "weights.safetensors")
    name = f"local-dir:{tmp_path / 'vit'}"
    assert run(tmp_path, name, checkpoint=str(weights))["teacher"]["mlps"] == 2


def test_checkpoint_makes_up_for_pretrained_weights(tmp_path):
    (tmp_path / "weights.pth").touch()
    bare = next(name for name in timm.list_models("vit_*") if not timm.is_model_pretrained(name))
    assert "knows no model" in refused(tmp_path, "no_net", checkpoint=str(tmp_path / "weights.pth"))
    assert run(tmp_path, bare, checkpoint=str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing.pth", "is missing."),
        ("weights.npz", "must be a folder or end in .safetensors, .pth, .pt, .bin."),
        ("empty", "/model.safetensors is missing; weights in a folder are"),
    ],
)
def test_checkpoint_that_cannot_be_one(tmp_path, vit, name, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.npz").touch()
    sentence = refused(tmp_path, vit, checkpoint=str(tmp_path / name))
    assert sentence.startswith(f"teacher.checkpoint: {tmp_path / name}") and says in sentence


@pytest.mark.parametrize("config", ["{", '{"architecture": "no_such_net"}', "{}"])
def test_local_folder_with_another_config(tmp_path, vit, folder, config):
    shutil.copytree(folder / "vit", tmp_path / "vit")
    (tmp_path / "vit" / "config.json").write_text(config)
    name = f"local-dir:{tmp_path / 'vit'}"
    assert refused(tmp_path, name).startswith(f"teacher.model: {name} cannot be built: ")


@pytest.mark.parametrize("name", ["hf-hub:nobody/nothing", "hf_hub:nobody/nothing"])
def test_unreachable_hub(tmp_path, monkeypatch, name):
    # What HF_HUB_OFFLINE=1 sets when the library is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    sentence = refused(tmp_path, name)
    assert sentence.startswith(f"teacher.model: {name} cannot be built: ")
    assert "offline" in sentence.lower() or "connection" in sentence.lower()


def test_unknown_scheme(tmp_path):
    assert "teacher.model: ftp:a cannot be built: " in refused(tmp_path, "ftp:a")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            "resnet18.a1_in1k",
            "resnet18 has no timm Mlp, GluMlp or SwiGLU, so there is nothing to prune.",
        ),
        (
            "convnext_atto.d2_in1k",
            "convnext_atto: stages.0.blocks.0.mlp is a Mlp of convolutions, which cannot be pruned",
        ),
    ],
)
def test_models_whose_mlps_cannot_be_pruned(tmp_path, model, says):
    assert says in refused(tmp_path, model)


@pytest.mark.parametrize(
    ("model", "mlps"),
    [
        ("eva02_base_patch14_224.mim_in22k", 12),  # gated
        ("eva02_tiny_patch14_224.mim_in22k", 12),  # gated, packed
        ("convnext_tiny.fb_in1k", 18),  # of no mlp_ratio that could say how wide
    ],
)
def test_models_of_other_mlps(tmp_path, model, mlps):
    assert run(tmp_path, model)["teacher"]["mlps"] == mlps


def test_ratio_above_the_teachers_own(tmp_path, vit):
    assert refused(tmp_path, vit, ratio=4.5) == (
        "prune: blocks.0.mlp would keep 144 hidden units, but it has 128 (4 times its embed dim):"
        " choose a width from 1 to 128."
    )


def test_ratio_that_leaves_no_neuron(tmp_path, vit):
    assert "blocks.0.mlp would keep 0 hidden units" in refused(tmp_path, vit, ratio=0.03)
    assert run(tmp_path, vit, ratio=1 / 32)


@pytest.mark.parametrize(
    "prune", [{"keep": 0.3}, {"hidden_features": {"blocks.1.mlp": 3}}, {"budget": 0.6}]
)
def test_widths_may_be_given_in_other_ways(tmp_path, vit, prune):
    assert run(tmp_path, vit, prune=prune)


@pytest.mark.parametrize(
    ("prune", "says"),
    [
        ({"budget": 0.1}, "prune.budget 0.1 is too small"),
        ({"hidden_features": {"blocks.5.mlp": 3}}, "the teacher has no MLP blocks.5.mlp"),
        ({"keep": 0.9}, "prune.max_ratio 2 orders only 64: raise it to at least 3.5938"),
    ],
)
def test_widths_that_cannot_be(tmp_path, vit, prune, says):
    assert says in refused(tmp_path, vit, prune=prune)


def test_teacher_of_another_number_of_channels(tmp_path):
    gray = timm.create_model(
        "vit_tiny_patch16_224",
        in_chans=1,
        img_size=32,
        embed_dim=16,
        depth=1,
        num_heads=2,
        pretrained_cfg_overlay={"input_size": (1, 32, 32)},
    )
    artefact.save(tmp_path / "gray", gray, {})
    name = f"local-dir:{tmp_path / 'gray'}"
    wanted = f"teacher.model: {name} takes 1 channels; images come as RGB, so it must take 3."
    assert refused(tmp_path, name) == wanted


# What the teacher is asked, and what the stages train and prune


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_can_be_asked_and_trained(tmp_path, family):
    model = tiny.FAMILIES[family]()
    artefact.save(tmp_path / "teacher", model, {})
    kinds = ("mlp", "mlp+norm", "all", {"blocks": [0, 0]})
    loss = {"pooled": 1, "patch_tokens": 1, "blocks": 1}
    stages = {f"stage{i}": STAGE | {"train": kind, "loss": loss} for i, kind in enumerate(kinds)}
    asked = {"blocks": [0], "patch_tokens": 2}
    assert run(tmp_path, f"local-dir:{tmp_path / 'teacher'}", features=asked, stages=stages)


def test_a_block_asked_for_that_the_teacher_lacks(tmp_path, vit):
    assert run(tmp_path, vit, features={"blocks": [0, 1]})
    assert refused(tmp_path, vit, features={"blocks": [0, 2]}) == (
        "features.blocks: there is no block 2; the model's are 0 to 1."
    )
    sentence = refused(tmp_path, vit, features={"blocks": [0, 2], "cache": "none"})
    assert "there is no block 2" in sentence


def test_a_stage_that_trains_blocks_the_student_lacks(tmp_path, vit):
    stages = {"first": STAGE, "second": STAGE | {"train": {"blocks": [0, 1]}}}
    assert run(tmp_path, vit, stages=stages)
    stages["second"]["train"]["blocks"] = [1, 2]
    assert refused(tmp_path, vit, stages=stages) == (
        "distill.stages.second.train: there are no blocks 1 to 2; the student's are 0 to 1."
    )


def test_a_stage_that_trains_what_its_loss_does_not_see(tmp_path, vit):
    loss = {"pooled": 0, "patch_tokens": 0, "blocks": 1}
    stages = {"late": STAGE | {"train": {"blocks": [1, 1]}, "loss": loss}}
    assert refused(tmp_path, vit, stages=stages, features={"blocks": [0]}) == (
        "distill.stages.late.train: no parameter that it names has a part in the stage's loss."
    )
    assert run(tmp_path, vit, stages=stages, features={"blocks": [0, 1]})


def test_a_stage_that_prunes_to_more_than_is_left(tmp_path, vit):
    def stages(*ratios):
        return {f"stage{i}": STAGE | {"prune": {"ratio": r}} for i, r in enumerate(ratios)}

    assert run(tmp_path, vit, ratio=1.5, stages=stages(1.5, 1.0, 0.5))
    assert refused(tmp_path, vit, ratio=1.5, stages=stages(1.0, 0.5, 0.75)) == (
        "distill.stages.stage2.prune: blocks.0.mlp would keep 24 hidden units, but it has only 16 left"
        " by then: lower the ratio."
    )
    assert "it has only 48 left" in refused(tmp_path, vit, ratio=1.5, stages=stages(1.75))


@pytest.mark.parametrize(
    ("prune", "says"),
    [
        (
            {"ratio": 0.5, "blocks": [1, 2]},
            "distill.stages.only.prune: there are no blocks 1 to 2; the student's are 0 to 1.",
        ),
        (
            {"ratio": 0.03},
            "distill.stages.only.prune: prune: blocks.0.mlp would keep 0 hidden units",
        ),
    ],
)
def test_a_stage_that_prunes_what_cannot_be(tmp_path, vit, prune, says):
    assert says in refused(tmp_path, vit, stages={"only": STAGE | {"prune": prune}})


def test_a_stage_may_prune_some_blocks_alone(tmp_path, vit):
    def stages(ratio):
        half = STAGE | {"prune": {"ratio": 0.5, "blocks": [0, 0]}}
        return {"half": half, "other": STAGE | {"prune": {"ratio": ratio, "blocks": [1, 1]}}}

    assert run(tmp_path, vit, stages=stages(1.0))  # the second block still has all
    assert "blocks.1.mlp would keep 33 hidden units" in refused(tmp_path, vit, stages=stages(1.04))


# A sweep


def test_every_point_of_a_sweep_is_checked(tmp_path, vit):
    assert run(tmp_path, vit, sweep={"prune.ratio": [2, 0.5]})
    assert refused(
        tmp_path, vit, sweep={"prune.ratio": [2, 0.03], "prune.seed": [0, 1]}
    ).startswith("sweep, point ratio-0.03_seed-0: prune: blocks.0.mlp would keep 0 hidden units")
    trains = {"distill.stages.only.train": ["mlp", {"blocks": [1, 2]}]}
    assert refused(tmp_path, vit, sweep=trains).startswith(
        "sweep, point only.train-blocks-1-2: distill.stages.only.train: "
    )


# The disk


def a_disk(monkeypatch, free):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(9e12, 0, free))


# Ten samples in two views: pooled and 16 patch tokens of 32 in bfloat16, 32 x 32 pixels of 3 bytes.
WANTED = 10 * 2 * (2 * 17 * 32 + 3 * 32 * 32)


def test_targets_that_the_disk_cannot_hold(tmp_path, vit, monkeypatch):
    features = {"views": {"count": 2}}
    a_disk(monkeypatch, free=WANTED - 1)
    assert refused(tmp_path, vit, features=features) == (
        f"features: the targets take 83.2 kB, but the disk of {tmp_path / 'work' / 'targets'} has"
        " 83.2 kB left: lower features.views.count, ask for fewer patch_tokens or blocks, or choose"
        " features.cache: none."
    )
    assert run(tmp_path, vit, features=features | {"patch_tokens": 2})
    assert run(tmp_path, vit, features=features | {"cache": "none"})
    a_disk(monkeypatch, free=WANTED)
    assert run(tmp_path, vit, features=features)


def test_what_is_there_already_is_not_wanted_again(tmp_path, vit, monkeypatch):
    for job, size in (("00000", 700), ("00001", 300)):
        folder = tmp_path / "work" / "targets" / job
        folder.mkdir(parents=True)
        (folder / "00000.view0.safetensors").write_bytes(bytes(size))
        (folder / ".snakemake_timestamp").write_bytes(bytes(500))
    features = {"views": {"count": 2}}
    a_disk(monkeypatch, free=WANTED - 1001)
    sentence = refused(tmp_path, vit, features=features)
    assert "the targets take 82.2 kB, but the disk of" in sentence
    a_disk(monkeypatch, free=WANTED - 1000)
    assert run(tmp_path, vit, features=features)


def test_a_full_disk_is_no_matter_where_all_is_there(tmp_path, vit, monkeypatch):
    folder = tmp_path / "work" / "targets"
    folder.mkdir(parents=True)
    (folder / "00000.view0.safetensors").write_bytes(bytes(WANTED + 900))  # and a header
    a_disk(monkeypatch, free=0)
    assert run(tmp_path, vit, features={"views": {"count": 2}})


# The tables


def test_table_that_is_not_there(tmp_path, vit):
    pattern = tmp_path / "*.parquet"
    sentence = refused(tmp_path, vit, data=own_table(pattern))
    assert sentence == f"data.table: no file matches {pattern}."


def test_unreadable_table(tmp_path, vit, table):
    content = table.read_bytes()
    table.write_bytes(content[: len(content) // 2])
    sentence = refused(tmp_path, vit, data=own_table(table))
    assert sentence.startswith(f"data.table: {table} cannot be read as Parquet: ")


def test_table_without_a_column(tmp_path, vit, table):
    data = own_table(table) | {"filters": {"min_similarity": 0.3}}
    sentence = refused(tmp_path, vit, data=data)
    assert "has no column similarity (needed by data.filters.min_similarity)" in sentence
    assert "it has URL, punsafe." in sentence


def test_every_file_of_the_table_is_looked_at(tmp_path, vit, table):
    pq.write_table(pa.table({"URL": ["a"]}), tmp_path / "z.parquet")
    sentence = refused(tmp_path, vit, data=own_table(tmp_path / "*.parquet"))
    assert f"data.table: {tmp_path / 'z.parquet'} has no column punsafe or nsfw" in sentence


# The evaluation images


def test_more_classes_than_the_teacher_has(tmp_path, vit):
    data = photos(tmp_path / "photos", "a", "b", "c", "d")
    assert refused(tmp_path, vit, data=data) == (
        f"data.eval.path: {tmp_path / 'photos'} has 4 classes, but teacher.model {vit} has 3."
    )


def test_teacher_without_classifier_takes_any_classes(tmp_path):
    artefact.save(tmp_path / "vit", tiny.vit(num_classes=0), {})
    data = photos(tmp_path / "photos", "a", "b")
    assert run(tmp_path, f"local-dir:{tmp_path / 'vit'}", data=data)


@pytest.mark.parametrize("source", ["imagefolder", "webdataset"])
def test_evaluation_images_that_are_not_there(tmp_path, vit, source):
    data = {"eval": {"source": source, "path": str(tmp_path / "nowhere")}}
    sentence = refused(tmp_path, vit, data=data)
    assert sentence.startswith("data.eval.path: ") and str(tmp_path / "nowhere") in sentence


def test_tars_are_only_looked_for(tmp_path, vit):
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as tar:
        tar.write({"__key__": "a", "png": encoded(), "cls": b"0"})
    data = {"eval": {"source": "webdataset", "path": f"{tmp_path}/*.tar"}}
    assert run(tmp_path, vit, data=data)


def test_sentence_reaches_the_shell(tmp_path, monkeypatch, capsys):
    from dgmr import cli

    sections = {"teacher": {"model": "no_net"}, "data": FASHION, "prune": {"ratio": 1.0}}
    sections["distill"] = {"stages": {"only": STAGE}}
    options = ["--config", json.dumps(sections), "--targets", str(tmp_path / "targets")]
    output = ["--output", str(tmp_path / "check.json")]
    monkeypatch.setattr("sys.argv", ["dgmr", "check", *options, *output])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("dgmr: teacher.model: timm knows no model no_net") and "\n" not in told
