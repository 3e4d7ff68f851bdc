"""What a run will cost, told before anything runs: no weights are read and no data is looked at.

The teacher and the student are built on timm's meta device, so parameters, FLOPs and the shapes of
what goes to disk are exact. Estimates carry a note that says what they assume.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from timm.layers import AttentionPoolLatent, Mlp

from dgmr.answers import bytes_per_view
from dgmr.check import teacher_skeleton
from dgmr.distill.learning import named
from dgmr.files import readable
from dgmr.keys import Keys
from dgmr.mlps import PrunableMlp, mlps, recorded_mlp_inputs
from dgmr.models import TimmModel, count_parameters, flops_by_module, input_size
from dgmr.params import Data, Params, Prune, Stage, Teacher
from dgmr.prune.block import TOKENS_AT_ONCE
from dgmr.prune.widths import reach, students

# What each component is, where its name does not say it.
COMPONENTS = {
    "patch embedding": "",
    "attention": "",
    "MLP": "all that pruning can reach, in a pool head too",
    "pool head": "attention pooling without its MLP",
    "classifier": "of a CLIP tower, its projection",
    "other": "norms, class token, position embedding, downsampling",
}
_FLOAT32, _FLOAT64 = 4, 8

# Of the shards that the demo makes: tars and Parquets of 20,000 training images with their URLs and
# captions, and of the 10,000 test images.
_FASHION_BYTES, _FASHION_EVAL_BYTES, _FASHION_EVAL_IMAGES = 1420, 2440, 10_000
# 50 ImageNet photos shrunk to a shorter side of 256 pixels, JPEG quality 95, took 0.51 bytes a pixel
# at 1.34 times the pixels of a square.
_JPEG_BYTES_PER_PIXEL, _PIXELS_OVER_SQUARE = 0.51, 1.34


@dataclass(frozen=True)
class Cost:
    """A model before and after pruning."""

    params: dict[str, int]
    """By component; ``total``, too."""
    flops: dict[str, int]
    """Of one image, a multiply-add counting two; by component and in ``total``."""


@dataclass(frozen=True)
class Widths:
    """MLPs that are alike."""

    count: int
    in_features: int
    hidden_features: int
    kept: int
    """Hidden units of the student's."""


@dataclass(frozen=True)
class ModelPlan:
    """What pruning does to a model."""

    model: str
    before: Cost
    after: Cost
    widths: list[Widths]


@dataclass(frozen=True)
class Size:
    """Bytes, on disk or in memory."""

    bytes: int | None
    """None where the params alone do not tell."""
    note: str


@dataclass(frozen=True)
class RunPlan:
    """What a run of the workflow does and needs."""

    model: ModelPlan
    disk: dict[str, Size]
    memory: dict[str, Size]
    """Peak of a job, its weights and activations on the device included."""
    jobs: dict[str, dict[str, int]]
    """By room and rule, for a folder where nothing is done yet."""


def plan_run(config: Params) -> RunPlan:
    """The plan for whole params.

    Raises:
        DgmrError: there is no such teacher, or it cannot be pruned to such widths.
    """
    teacher = teacher_skeleton(config.teacher)
    runs = [
        (run, students(teacher, run.prune, run.distill.stages))
        for run in (config, *config.points().values())
    ]
    memory: dict[str, Size] = {}
    for run, built in runs:
        for job, size in _memory(run, teacher, built).items():
            memory[job] = max(memory.get(job, size), size, key=lambda size: size.bytes or 0)
    return RunPlan(
        _model_plan(config.teacher.model, teacher, list(runs[0][1].values())[-1]),
        _disk(runs, teacher),
        memory,
        jobs(config),
    )


def plan_model(name: str, prune: Prune) -> ModelPlan:
    """The plan for a model alone: a timm name, ``hf-hub:<repository>`` or ``local-dir:<folder>``.

    Raises:
        DgmrError: there is no such model, or it cannot be pruned to such widths.
    """
    teacher = teacher_skeleton(Teacher(model=name))
    return _model_plan(name, teacher, students(teacher, prune, {})["pruned"])


def jobs(config: Params) -> dict[str, dict[str, int]]:
    """Jobs by room and rule, as ``snakemake --dry-run`` counts them where nothing is done yet."""
    data, keys = config.data, Keys(config).runs
    batches, stages = len(data.jobs), len(config.distill.stages)
    # What runs of a sweep have in common is made once.
    orders = {(k.orders, k.params.prune.parts) for k in keys}
    refits = {
        (k.refits, 1 if k.params.prune.sequential else k.params.prune.parts)
        for k in keys
        if k.params.prune.compensate == "least_squares"
    }
    # MLflow is told of a run's rooms prune, evaluate and report, and stages; once of those before them.
    tracked = (3 + stages) * len(keys) + 3
    rooms = {
        "check": {"check": 1},
        "teacher": {"teacher": 1},
        "data": {
            "fashion_table": int(data.source == "fashion-mnist"),
            "select_samples": 1,
            "download_images": batches if data.urls == "http" else 0,
            "pack_shards": batches,
            "pack_evaluation": 1,
            "data": 1,
            "evaluation_data": 1,
        },
        "features": {
            "targets": batches if config.features.cache == "disk" else 0,
            "calibration": 1,
            "features": 1,
        },
        "prune": {
            "saliency": len({k.saliency for k in keys if k.params.prune.method == "taylor"}),
            "order_blocks": sum(parts for _, parts in orders),
            "refit_blocks": sum(parts for _, parts in refits),
            "assemble": len(keys),
        },
        "distill": {
            "prune_again": sum(
                stage.prune is not None for k in keys for stage in k.params.distill.stages.values()
            ),
            "distill_stage": stages * len(keys),
        },
        "evaluate": {
            "evaluate_model": len({k.evaluation(model) for k in keys for model in k.models}),
            "measure_speed": len({k.speed for k in keys}),
            "gather": len(keys),
        },
        "report": {"report": 1, "report_point": len(keys) - 1},
        "track": {"track": tracked if config.mlflow.tracking_uri else 0},
        "all": {"all": 1},
    }
    planned = {
        room: {rule: count for rule, count in rules.items() if count}
        for room, rules in rooms.items()
    }
    return {room: rules for room, rules in planned.items() if rules}


def components(model: TimmModel) -> dict[str, str]:
    """The modules that make up each component but ``other``, by name; the innermost counts."""
    found = {"patch_embed": "patch embedding"}
    prunable = mlps(model)
    blocks = {name.rpartition(".")[0] for name in prunable}
    classifier = model.get_classifier()
    for name, module in model.named_modules():
        if isinstance(module, AttentionPoolLatent):
            found[name] = "pool head"
        elif name in prunable:
            found[name] = "MLP"
        elif name.rpartition(".")[0] in blocks and "Attention" in type(module).__name__:
            found.setdefault(name, "attention")
        elif module is classifier:
            found[name] = "classifier"
    return found


def _model_plan(name: str, teacher: TimmModel, student: TimmModel) -> ModelPlan:
    pairs = zip(mlps(teacher).values(), mlps(student).values(), strict=True)
    alike = Counter((d.in_features, d.hidden_features, s.hidden_features) for d, s in pairs)
    widths = [Widths(count, *shape) for shape, count in alike.items()]
    return ModelPlan(name, _cost(teacher), _cost(student), widths)


def _cost(model: TimmModel) -> Cost:
    component = components(model)
    params = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in model.named_parameters():
        params[_component_of(name, component)] += parameter.numel()
    by_module = flops_by_module(model)
    flops = dict.fromkeys(COMPONENTS, 0) | {"other": by_module[""]}
    for name, what in component.items():
        operations = by_module.get(name, 0)
        flops[what] += operations
        flops[_component_of(name.rpartition(".")[0], component)] -= operations
    return Cost(
        params | {"total": sum(params.values())},
        flops | {"total": by_module[""]},
    )


def _component_of(name: str, component: Mapping[str, str]) -> str:
    """The component of the innermost module that holds ``name``, a parameter's or a module's."""
    while name:
        if name in component:
            return component[name]
        name = name.rpartition(".")[0]
    return "other"


def _disk(
    runs: Sequence[tuple[Params, Mapping[str, TimmModel]]], teacher: TimmModel
) -> dict[str, Size]:
    """Of all ``runs``, the first of which is that of the params themselves."""
    config = runs[0][0]
    features = config.features
    tokens = _tokens(teacher)
    samples = config.data.n_samples
    calibration = features.calibration
    images = min(calibration.samples, samples)
    rows = {
        name: min(tokens[name], calibration.tokens) * mlp.in_features
        for name, mlp in mlps(teacher).items()
    }
    models = [teacher]
    states: dict[str, int] = {}
    for run, built in runs:
        keys, stages = Keys(run), run.distill.stages
        models += built.values()
        models += [built[name] for name, stage in stages.items() if stage.prune is not None]
        # Runs that begin alike train what they have in common from the same checkpoints.
        states |= {keys.distill(s): _state_count(stages[s], built[s]) for s in stages}
    sizes = {
        "shards": _shards(config.data),
        "evaluation shards": _evaluation_shards(config.data),
        "calibration": Size(
            images * sum(rows.values()) * _FLOAT32,
            f"{images:,} images x at most {calibration.tokens} tokens, {len(rows)} MLPs, float32",
        ),
        "models": Size(
            sum(map(count_parameters, models)) * _FLOAT32,
            f"the teacher and {len(models) - 1} students in float32",
        ),
        "training checkpoints": Size(
            (sum(states.values()) + 2 * max(states.values())) * _FLOAT32,
            "one of every stage that is done; while one trains, two and one that is written",
        ),
    }
    if features.cache == "disk":
        views = samples * features.views.count
        sizes["targets"] = Size(
            views * bytes_per_view(teacher, features),
            f"{samples:,} samples x {features.views.count} views, answers in {features.dtype}"
            + (", and their pixels" if features.pixels else ""),
        )
    if config.data.urls == "http":
        sizes["downloads"] = Size(None, "the images as the web has them, until work/ is cleared")
    return sizes


def _shards(data: Data) -> Size:
    if data.source == "fashion-mnist":
        return Size(
            data.n_samples * _FASHION_BYTES, f"{_FASHION_BYTES} bytes an image, as measured"
        )
    if data.image_size is None:
        return Size(None, "images are kept as they come; data.image_size would bound them")
    pixels = data.image_size**2 * _PIXELS_OVER_SQUARE
    return Size(
        round(data.n_samples * pixels * _JPEG_BYTES_PER_PIXEL),
        f"at {_JPEG_BYTES_PER_PIXEL} bytes a pixel (JPEG), all images as large as data.image_size",
    )


def _evaluation_shards(data: Data) -> Size:
    if data.eval.source != "fashion-mnist":
        return Size(None, "the images as they lie under data.eval.path")
    count = data.eval.n_samples or _FASHION_EVAL_IMAGES
    return Size(count * _FASHION_EVAL_BYTES, f"{_FASHION_EVAL_BYTES} bytes an image, as measured")


def _tokens(model: TimmModel) -> dict[str, int]:
    """Tokens that each MLP sees of an image."""
    with recorded_mlp_inputs(model) as inputs:
        model(torch.zeros(1, *input_size(model), device="meta"))
    return {name: value.shape[1] for name, value in inputs.items()}


def _memory(config: Params, teacher: TimmModel, built: Mapping[str, TimmModel]) -> dict[str, Size]:
    """Weights and activations of a batch; what Python and torch themselves take comes on top."""
    batch = config.features.batch_size
    tokens = _tokens(teacher)
    student = built["pruned"]
    dense, kept = mlps(teacher), mlps(student)
    weights, passing = count_parameters(teacher) * _FLOAT32, _inference_bytes(dense, tokens)
    sizes = {}
    online = config.features.cache == "none"
    if not online:
        sizes["targets"] = Size(weights + batch * passing, f"the teacher, a batch of {batch}")
    sizes["calibration"] = Size(
        _streamed_count(teacher) * _FLOAT32 + batch * passing,
        f"the teacher's two largest blocks and what lies outside blocks, a batch of {batch}",
    )
    sizes |= _prune_memory(config, teacher, dense, kept, tokens)
    before = student
    for name, stage in config.distill.stages.items():
        if stage.prune is not None and config.prune.compensate == "least_squares":
            sizes[f"prune_again {name}"] = _sequential(
                config, teacher, mlps(before), mlps(built[name]), tokens
            )
        before = built[name]
        images = -(-stage.batch_size // (config.distill.processes * stage.accumulate))
        sizes[f"distill_stage {name}"] = Size(
            _training_bytes(stage, built[name], images, tokens)
            + (weights + images * passing if online else 0),
            f"{'the teacher; ' if online else ''}weights, gradients and AdamW's two moments"
            f"{', an average' if stage.ema else ''}; {images} images a pass with what the backward"
            f" pass needs, in {stage.precision}",
        )
    batch = config.evaluate.batch_size
    sizes["evaluate_model"] = Size(
        weights + count_parameters(student) * _FLOAT32 + batch * passing,
        f"the teacher and a student, a batch of {batch}",
    )
    return sizes


def _prune_memory(
    config: Params,
    teacher: TimmModel,
    dense: Mapping[str, PrunableMlp],
    kept: Mapping[str, PrunableMlp],
    tokens: Mapping[str, int],
) -> dict[str, Size]:
    """Of the jobs that work on one block at a time: of its largest block, M x N."""

    def order(mlp: PrunableMlp) -> int:
        units, width = mlp.hidden_features, reach(mlp, config.prune.max_ratio)
        if config.prune.needs_calibration:
            hidden = 2 * TOKENS_AT_ONCE * units * _FLOAT32
            if config.prune.method == "active_energy":
                return _mlp_bytes(mlp) + hidden
            return (
                _mlp_bytes(mlp) + hidden + _FLOAT64 * units * (units + 3 * mlp.out_features + width)
            )
        # Rows in float64, and their products with as many directions.
        return 2 * _FLOAT64 * mlp.hidden_features * (1 + _is_gated(mlp)) * mlp.in_features

    sizes = {}
    if config.prune.method == "taylor":
        batch = config.features.batch_size
        sizes["saliency"] = Size(
            (count_parameters(teacher) + batch * _saved(dense, tokens)) * _FLOAT32,
            f"the teacher, a batch of {batch} with what the backward pass needs",
        )
    sizes["order_blocks"] = Size(
        max(map(order, dense.values())), f"the largest block, by {config.prune.method}"
    )
    if config.prune.sequential:
        sizes["refit_blocks"] = _sequential(config, teacher, dense, kept, tokens)
    elif config.prune.compensate == "least_squares":
        sizes["refit_blocks"] = Size(
            _refit_bytes(dense, kept),
            "the largest block, dense and pruned, and the regression's moments",
        )
    return sizes


def _sequential(
    config: Params,
    teacher: TimmModel,
    dense: Mapping[str, PrunableMlp],
    kept: Mapping[str, PrunableMlp],
    tokens: Mapping[str, int],
) -> Size:
    """Of refits in sequence."""
    images = min(config.features.calibration.samples, config.data.n_samples)
    states = max(tokens[name] * mlp.in_features for name, mlp in dense.items())
    pixels = math.prod(input_size(teacher))
    return Size(
        _refit_bytes(dense, kept) + images * (4 * states + pixels) * _FLOAT32,
        f"a block's, and {images:,} images on their way through both models",
    )


def _refit_bytes(dense: Mapping[str, PrunableMlp], kept: Mapping[str, PrunableMlp]) -> int:
    """Of the largest block: dense and pruned, the regression's moments, tokens on their way."""

    def refit(name: str) -> int:
        units, k = dense[name].hidden_features, kept[name].hidden_features
        moments = 5 * _FLOAT64 * k * (k + dense[name].out_features)
        hidden = 2 * TOKENS_AT_ONCE * units * _FLOAT32
        return _mlp_bytes(dense[name]) + _mlp_bytes(kept[name]) + moments + hidden

    return max(map(refit, dense))


def _mlp_bytes(mlp: PrunableMlp) -> int:
    return mlp.hidden_features * mlp.unit_parameters * _FLOAT32


def _inference_bytes(found: Mapping[str, PrunableMlp], tokens: Mapping[str, int]) -> int:
    """Of an image, where a pass without gradients holds most: in the widest MLP, its input, the
    residual stream, and the hidden units before and after the activation (gated: twice before)."""
    return _FLOAT32 * max(
        tokens[name] * (2 * mlp.in_features + (2 + _is_gated(mlp)) * mlp.hidden_features)
        for name, mlp in found.items()
    )


def _training_bytes(
    stage: Stage, student: TimmModel, images: int, tokens: Mapping[str, int]
) -> int:
    """Weights, gradients, the optimizer's moments, and what the backward pass needs of ``images``."""
    half = stage.precision == "bfloat16"
    # Autocast keeps a copy of the weights in bfloat16.
    copy = 2 * count_parameters(student) if half else 0
    gradients = _learning_count(stage, student)
    state = (_state_count(stage, student) + gradients) * _FLOAT32
    kept = mlps(student)
    saved = images * _saved(kept, tokens)
    if stage.grad_checkpointing:  # the inputs of all blocks, and one block
        blocks_inputs = sum(tokens[name] * mlp.in_features for name, mlp in kept.items())
        saved = saved // len(kept) + images * blocks_inputs
    return state + copy + saved * (2 if half else _FLOAT32)


def _state_count(stage: Stage, student: TimmModel) -> int:
    """Numbers in a training checkpoint: weights, the optimizer's moments, the average."""
    copies = 2 if stage.ema is None else 3
    return count_parameters(student) + copies * _learning_count(stage, student)


def _learning_count(stage: Stage, student: TimmModel) -> int:
    trained = named(student, stage)
    return sum(p.numel() for name, p in student.named_parameters() if name in trained)


def _saved(found: Mapping[str, PrunableMlp], tokens: Mapping[str, int]) -> int:
    """Numbers kept of an image for the backward pass: of a token and block, 8 N (inputs of both norms,
    of qkv, of the MLP and of the projection; q, k, v) and 2 M (before and after the activation; gated:
    4 M). 3 to 17% under what torch keeps of ViT, Swin and gated ViT with plain attention.
    """
    return sum(
        tokens[name] * (8 * mlp.in_features + (2 + 2 * _is_gated(mlp)) * mlp.hidden_features)
        for name, mlp in found.items()
    )


def _is_gated(mlp: PrunableMlp) -> bool:
    return not isinstance(mlp.module, Mlp)


def _streamed_count(model: TimmModel) -> int:
    """Parameters that :func:`dgmr.streaming.streamed` holds at once."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in mlps(model))
    blocks = [count_parameters(model.get_submodule(name)) for name in names]
    return count_parameters(model) - sum(blocks) + sum(sorted(blocks)[-2:])


def show_model(plan: ModelPlan, console: Console) -> None:
    """Print the model's widths and its table."""
    console.print(plan.model, highlight=False)
    for group in plan.widths:
        console.print(
            f"  MLPs: {group.count} x {group.hidden_features} -> {group.kept} hidden units"
            f" (embed dim {group.in_features})",
            highlight=False,
        )
    table = Table(box=box.SIMPLE)
    table.add_column(no_wrap=True)
    for title in ("M params", "pruned", "", "GFLOPs", "pruned", ""):
        table.add_column(title, justify="right")
    scales = (
        (plan.before.params, plan.after.params, 1e6),
        (plan.before.flops, plan.after.flops, 1e9),
    )
    shown = [n for n in COMPONENTS if plan.before.params[n] or plan.before.flops[n]]
    for name in (*shown, "total"):
        cells = [name]
        for before, after, unit in scales:
            decimals = 1 if before["total"] >= 10 * unit else 3
            cells += [f"{count[name] / unit:.{decimals}f}" for count in (before, after)]
            changed = before[name] != after[name]
            cells.append(f"{after[name] / before[name] - 1:+.1%}" if changed else "")
        table.add_row(*cells, end_section=name == shown[-1])
    console.print(table)
    told = [f"{name}: {what}" for name, what in COMPONENTS.items() if what and name in shown]
    said = "; ".join([*told, "FLOPs: of one image, a multiply-add counting two"])
    console.print(said, highlight=False)


def show_run(plan: RunPlan, console: Console) -> None:
    """Print the tables of a whole run."""
    show_model(plan.model, console)
    for title, sizes in (("on disk", plan.disk), ("peak memory of a job", plan.memory)):
        table = Table("", title, "", box=box.SIMPLE)
        table.columns[1].justify = "right"
        for name, size in sizes.items():
            told = "unknown" if size.bytes is None else readable(size.bytes)
            table.add_row(name, told, size.note)
        console.print(table)
    if points := plan.jobs["report"].get("report_point"):
        console.print(
            f"sweep: {points} runs besides this one; all share what comes before the pruning, and whatever"
            " else is the same. Disk is of all runs, memory of the largest.",
            highlight=False,
        )
    table = Table("room", "jobs", "of the rules", box=box.SIMPLE)
    table.columns[1].justify = "right"
    for room, rules in plan.jobs.items():
        listed = ", ".join(f"{rule} {count}" for rule, count in rules.items())
        table.add_row(room, str(sum(rules.values())), listed)
    total = sum(sum(rules.values()) for rules in plan.jobs.values())
    table.add_section()
    table.add_row("total", str(total), "where nothing is done yet")
    console.print(table)
