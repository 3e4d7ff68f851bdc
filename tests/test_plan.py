"""The plan: what it says of models is what models are; what it says of files is what files weigh."""

import json
from pathlib import Path

import pytest
import tiny
from dgmr import cli, plan
from dgmr.check import check, teacher_skeleton
from dgmr.errors import DgmrError
from dgmr.params import Params, Prune, Teacher, read
from dgmr.prune import prune_model
from dgmr.prune.widths import students
from rich.console import Console
from safetensors import safe_open

# Computed apart from this project, with timm 1.0.31: M params, MLPs' share in %, widths, M params and
# their change in % at ratio 1 and 2.
REFERENCE = {
    "eva02_enormous_patch14_clip_224": "4350.6 81.0 1792,15360 1237.5 -71.6 1648.7 -62.1",
    "vit_giant_patch14_clip_224": "1012.6 68.4 1408,6144 479.0 -52.7 637.6 -37.0",
    "vit_gigantic_patch14_clip_224": "1844.9 71.0 1664,8192 801.8 -56.5 1067.7 -42.1",
    "vit_giant_patch14_dinov2": "1136.5 66.5 1536,4096 664.4 -41.5 947.7 -16.6",
    "eva02_large_patch14_clip_224": "304.1 66.3 1024,2730 178.2 -41.4 253.8 -16.6",
    "vit_so400m_patch14_siglip_224": "427.7 65.0 1152,4304 224.3 -47.6 298.6 -30.2",
    "swin_large_patch4_window7_224": "196.5 64.0 192..1536 102.3 -48.0 133.7 -32.0",
    "vit_base_patch16_224": "86.6 65.5 768,3072 44.1 -49.1 58.2 -32.7",
}
teacher, data = tiny.teacher, tiny.data  # fixtures
PRESETS = sorted((Path(__file__).parents[1] / "presets").glob("*.yaml"))


def change(before, after):
    return f"{100 * (after / before - 1):.1f}"


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_table(name):
    found = plan.plan_model(name, Prune(ratio=1))
    before = found.before.params
    total = before["total"]
    dims = [group.in_features for group in found.widths]
    widths = f"{min(dims)}..{max(dims)}"
    if len(dims) == 1:
        widths = f"{dims[0]},{found.widths[0].hidden_features}"
    said = [f"{total / 1e6:.1f}", f"{100 * before['MLP'] / total:.1f}", widths]
    wider = students(teacher_skeleton(Teacher(model=name)), Prune(ratio=2), {})["pruned"]
    for pruned in (found.after.params["total"], sum(p.numel() for p in wider.parameters())):
        said += [f"{pruned / 1e6:.1f}", change(total, pruned)]
    assert " ".join(said) == REFERENCE[name]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A tiny ViT with an attention-pool head, as an artefact, and the model itself."""
    model = tiny.build(
        "vit_base_patch16_siglip_224",
        img_size=tiny.SIDE,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=tiny.CLASSES,
    )
    folder = tmp_path_factory.mktemp("plan") / "siglip"
    return tiny.write_teacher(folder, model), model


def test_components_by_hand(siglip):
    folder, model = siglip
    found = plan.plan_model(f"local-dir:{folder}", Prune(ratio=1))
    n, m, tokens = 32, 128, 16
    mlp = 2 * n * m + n + m
    attention = 4 * n * n + 4 * n
    assert found.before.params == {
        "patch embedding": 3 * 64 * n + n,
        "attention": 2 * attention,
        "MLP": 3 * mlp,
        # The latent, its attention and its norm.
        "pool head": n + attention + 2 * n,
        "classifier": 10 * n + 10,
        # Two norms a block and the last one; the position embedding.
        "other": 5 * 2 * n + tokens * n,
        "total": sum(parameter.numel() for parameter in model.parameters()),
    }
    products = 2 * 2 * tokens * tokens * n
    assert found.before.flops == {
        "patch embedding": 2 * tokens * 3 * 64 * n,
        "attention": 2 * (2 * tokens * 4 * n * n + products),
        # The pool head's MLP sees one token.
        "MLP": (2 * tokens + 1) * 4 * n * m,
        "pool head": 2 * 2 * n * n + 2 * tokens * 2 * n * n + 4 * tokens * n,
        "classifier": 2 * 10 * n,
        "other": 0,
        "total": sum(v for k, v in found.before.flops.items() if k != "total"),
    }


def test_student_is_the_one_that_pruning_makes(siglip):
    folder, model = siglip
    found = plan.plan_model(f"local-dir:{folder}", Prune(ratio=1, round_to=5))
    assert found.widths == [plan.Widths(3, 32, 128, 35)]
    kept = {name: 35 for name in ("blocks.0.mlp", "blocks.1.mlp", "attn_pool.mlp")}
    student = prune_model(model, hidden_features=kept)
    assert found.after.params["total"] == sum(p.numel() for p in student.parameters())
    dense_head = Prune(ratio=1, include_pool_head=False)
    found = plan.plan_model(f"local-dir:{folder}", dense_head)
    assert found.widths == [plan.Widths(2, 32, 128, 32), plan.Widths(1, 32, 128, 128)]


STAGE = {"train": "all", "samples": 8, "batch_size": 4, "lr": 1e-3}


def whole(teacher, stages=None, **features):
    return Params.model_validate(
        {
            "teacher": {"model": f"local-dir:{teacher}"},
            "data": {"urls": "file", "n_samples": sum(tiny.COUNTS)},
            "features": tiny.features_config(**features),
            "prune": {"ratio": 1.0},
            "distill": {"stages": stages or {"all": STAGE}},
        }
    )


def tensor_bytes(folder):
    total = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(key).nbytes for key in file.keys())
    return total


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"dtype": "bfloat16"},
        {"pixels": False},
        {"patch_tokens": 3, "blocks": (0, 1), "dtype": "bfloat16"},
        {"patch_tokens": None, "views": {"count": 3}},
    ],
    ids=str,
)
def test_features_on_disk(tmp_path, teacher, data, features):
    stage = STAGE | {"loss": {"patch_tokens": 0}}
    config = whole(teacher, {"all": stage}, **features)
    tiny.write_features(tmp_path, teacher, data, config.features)
    found = plan.plan_run(config).disk
    assert found["targets"].bytes == tensor_bytes(tmp_path / "work/targets")
    assert found["calibration"].bytes == tensor_bytes(tmp_path / "work/calibration")
    assert ("their pixels" in found["targets"].note) == config.features.pixels


def test_without_a_cache_there_are_no_targets(teacher):
    cached, online = (plan.plan_run(whole(teacher, cache=cache)) for cache in ("disk", "none"))
    for sizes in ("disk", "memory"):
        names = set(getattr(cached, sizes))
        assert names - set(getattr(online, sizes)) == {"targets"}
    assert cached.jobs["features"] == {"targets": 1, "calibration": 1, "features": 1}
    assert online.jobs["features"] == {"calibration": 1, "features": 1}
    assert {n: v for n, v in online.jobs.items() if n != "features"} == {
        n: v for n, v in cached.jobs.items() if n != "features"
    }
    # The teacher is asked while the student learns.
    with_teacher, without = (p.memory["distill_stage all"].bytes for p in (online, cached))
    assert with_teacher > without + 4 * cached.model.before.params["total"]


def test_stages_that_prune_have_jobs_and_leave_smaller_students(teacher):
    first = STAGE | {"prune": {"ratio": 0.5}}
    last = STAGE | {"prune": {"ratio": 0.25, "blocks": [1, 1]}}
    stages = {"first": first, "then": STAGE, "last": last}
    found = plan.plan_run(whole(teacher, stages))
    assert found.jobs["distill"] == {"prune_again": 2, "distill_stage": 3}
    assert found.model.widths == [plan.Widths(1, 32, 128, 16), plan.Widths(1, 32, 128, 8)]
    params = found.model.after.params["total"]
    dense = found.model.before.params["total"]
    unit = 32 + 1 + 32
    assert dense - params == (112 + 120) * unit
    needed = [found.memory[f"distill_stage {name}"].bytes for name in stages]
    assert needed[0] == needed[1] > needed[2]
    plain = plan.plan_run(whole(teacher))
    assert "prune_again" not in plain.jobs["distill"]
    assert plain.memory["distill_stage all"].bytes > needed[0]


def test_models_on_disk_and_sizes_that_nobody_knows(teacher):
    config = whole(teacher)
    found = plan.plan_run(config)
    students = 2 * found.model.after.params["total"]
    assert found.disk["models"].bytes == 4 * (found.model.before.params["total"] + students)
    own = {"source": "table", "table": "x.parquet", "urls": "http", "n_samples": 10}
    config = config.model_copy(update={"data": type(config.data).model_validate(own)})
    unknown = {name for name, size in plan.plan_run(config).disk.items() if size.bytes is None}
    assert unknown == {"shards", "downloads"}


def test_what_a_pruning_stage_starts_from_lies_on_disk_too(teacher):
    """results/distill/pruned/<stage>, beside the teacher, the pruned model and the stage's own."""
    found = plan.plan_run(whole(teacher, {"only": STAGE | {"prune": {"ratio": 0.5}}}))
    dense, half = (cost.params["total"] for cost in (found.model.before, found.model.after))
    pruned = plan.plan_run(whole(teacher)).model.after.params["total"]
    assert found.disk["models"].bytes == 4 * (dense + pruned + half + half)


LITTLE = {"samples": 64, "batch_size": 32, "precision": "bfloat16", "train": "mlp", "accumulate": 2}
LITTLE |= {"grad_checkpointing": True}


def training(teacher, stage, **distill):
    """Bytes of a stage's job, and what the plan says of them."""
    values = whole(teacher).model_dump()
    values["distill"]["stages"]["all"] |= stage
    found = plan.plan_run(Params.model_validate(values | {"distill": values["distill"] | distill}))
    return found.memory["distill_stage all"]


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 36},
        {"precision": "float32"},
        {"train": "all"},
        {"train": {"blocks": [0, 1]}},
        {"train": "mlp+norm"},
        {"accumulate": 1},
        {"grad_checkpointing": False},
        {"ema": 0.9},
    ],
    ids=str,
)
def test_training_takes_more_memory_with(teacher, change):
    assert training(teacher, LITTLE | change).bytes > training(teacher, LITTLE).bytes


def test_several_processes_share_a_batch(teacher):
    stage = {"samples": 12, "batch_size": 12, "accumulate": 2}
    found = [training(teacher, stage, processes=count) for count in (1, 2, 3, 5)]
    assert [size.bytes for size in found] == sorted((s.bytes for s in found), reverse=True)
    told = [size.note.partition("; ")[2].partition(" images")[0] for size in found]
    assert told == ["6", "3", "2", "2"]


def test_an_average_is_one_more_copy_of_what_learns(teacher):
    learning = sum(
        parameter.numel()
        for name, parameter in prune_model(tiny.vit(), ratio=1.0).named_parameters()
        if ".mlp." in name
    )
    one, two = (training(teacher, {"train": "mlp"} | more) for more in ({}, {"ema": 0.999}))
    assert two.bytes - one.bytes == 4 * learning
    assert "an average" in two.note and "an average" not in one.note


def test_a_sweep_is_told_and_counted(teacher, capsys):
    stages = {"mlp": STAGE | {"train": "mlp"}, "all": STAGE}
    alone, values = whole(teacher, stages), {"prune.ratio": [0.5, 2.0]}
    parts = [
        plan.plan_run(alone.model_copy(update={"prune": Prune(ratio=ratio)}))
        for ratio in (1.0, 0.5, 2.0)
    ]
    found = plan.plan_run(Params.model_validate(alone.model_dump() | {"sweep": values}))
    assert found.model == parts[0].model
    dense = parts[0].model.before.params["total"] * 4  # the teacher, which all share
    assert found.disk["models"].bytes == sum(p.disk["models"].bytes - dense for p in parts) + dense
    assert found.disk["shards"] == parts[0].disk["shards"]
    for job, size in found.memory.items():
        assert size.bytes == max(part.memory[job].bytes for part in parts), job
    assert found.memory["distill_stage all"].bytes > parts[0].memory["distill_stage all"].bytes
    plan.show_run(found, Console(width=200))
    assert "sweep: 2 runs besides this one;" in capsys.readouterr().out
    plan.show_run(parts[0], Console(width=200))
    assert "sweep" not in capsys.readouterr().out


def test_runs_that_begin_alike_share_their_checkpoints(teacher):
    stages = {"mlp": STAGE | {"train": "mlp"}, "all": STAGE}

    def checkpoints(**sweep):
        values = whole(teacher, stages).model_dump() | {"sweep": sweep}
        return plan.plan_run(Params.model_validate(values)).disk["training checkpoints"].bytes

    alone = checkpoints()
    last = checkpoints(**{"distill.stages.all.lr": [1e-4]}) - alone
    both = checkpoints(**{"distill.stages.mlp.lr": [1e-4]}) - alone
    assert 0 < last < both
    assert checkpoints(**{"prune.ratio": [1.0]}) == alone  # the run itself


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets(path):
    config = read(path)
    found = plan.plan_run(config)
    assert all(size.bytes for name, size in found.memory.items())
    text = path.read_text()
    # Sizes in the first line are those of the plan; the paper's scores are not passed off as ours.
    for cost in (found.model.before, found.model.after):
        assert f"{cost.params['total'] / 1e6:.1f} M" in text.splitlines()[1]
    assert ("kNN" in text) == ("targets to reach, not results of this project" in text)


def test_there_are_presets():
    assert len(PRESETS) >= 7


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["dgmr", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return ended.value.code, said.out if ended.value.code == 0 else said.err.strip()


def test_command_prints_json_and_tables(monkeypatch, capsys, teacher, tmp_path):
    model = ["--model", f"local-dir:{teacher}", "--ratio", "1", "--round-to", "24"]
    code, said = command(monkeypatch, capsys, *model, "--json")
    found = json.loads(said)
    assert code == 0 and found["widths"][0]["kept"] == 48
    assert (
        f"-> {found['widths'][0]['kept']} hidden units" in command(monkeypatch, capsys, *model)[1]
    )
    file = tmp_path / "params.yaml"
    file.write_text(whole(teacher).model_dump_json())
    code, said = command(monkeypatch, capsys, "--params", str(file), "--json")
    assert code == 0 and set(json.loads(said)) == {"model", "disk", "memory", "jobs"}
    code, said = command(monkeypatch, capsys, "--params", str(file))
    assert code == 0 and "distill_stage all" in said and "where nothing is done yet" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "vit_tiny_patch16_224"], "dgmr: plan: --model and --ratio go together;"),
        (["--model", "no_net", "--ratio", "1"], "dgmr: teacher.model: timm knows no model no_net;"),
        (["--model", "resnet18", "--ratio", "1"], "dgmr: resnet18 has no timm Mlp,"),
        (["--model", "vit_tiny_patch16_224", "--ratio", "5"], "dgmr: prune: blocks.0.mlp would"),
        (["--params", "nowhere.yaml"], "dgmr: nowhere.yaml cannot be read as YAML:"),
    ],
)
def test_wrong_questions_get_one_sentence(monkeypatch, capsys, arguments, sentence):
    code, said = command(monkeypatch, capsys, *arguments)
    assert code == 2 and said.startswith(sentence) and "\n" not in said


def test_missing_table_of_a_preset_is_told_by_the_check(tmp_path):
    config = read(next(path for path in PRESETS if path.stem == "vit_b"))
    with pytest.raises(DgmrError) as error:
        check(config, tmp_path / "targets", tmp_path / "check.json")
    assert str(error.value) == f"data.table: no file matches {config.data.table}."


def test_narrow_terminals_cut_no_number(teacher, capsys):
    found = plan.plan_model(f"local-dir:{teacher}", Prune(ratio=1))
    plan.show_model(found, Console(width=80))
    assert "…" not in capsys.readouterr().out
