"""The command ``dgmr``: one sub-command a step, each a thin call into its stage.

Stages are imported when they are called, so that ``dgmr --help`` needs no torch. A section of the
params (``--config``) is JSON, as the rules pass it, or a params file, by hand.
"""

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from dgmr import params
from dgmr.errors import DgmrError
from dgmr.files import NO_SPACE


def _offline() -> None:
    # What these commands read are files; a compute node may have no internet to look for more.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _group(help: str, callback: Callable[[], None] | None = None) -> typer.Typer:
    return typer.Typer(
        help=help,
        callback=callback,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )


app = _group("Prune vision transformers and distil what they knew.")
teacher_app = _group("Bring the teacher in.")
data_app = _group("From a table of URLs to shards.")
features_app = _group("What the teacher says of the images.", _offline)
prune_app = _group("Keep a diverse subset of hidden units.", _offline)
distill_app = _group("Train the student, stage after stage.", _offline)
evaluate_app = _group("Compare the models.", _offline)
track_app = _group("Tell MLflow what the files say.")

Config = Annotated[str, typer.Option(help="The section as JSON, or a params file.")]
Output = Annotated[Path, typer.Option(help="What to write.")]
Teacher = Annotated[Path, typer.Option(help="The teacher's artefact.")]
Data = Annotated[Path, typer.Option(help="Folder of shards with its manifest.")]
Features = Annotated[Path, typer.Option(help="The features room, results/features.")]
Downloads = Annotated[Path, typer.Option(help="Where Fashion-MNIST is kept if it is fetched.")]
Orders = Annotated[Path, typer.Option(help="Folder of orders.")]
Part = Annotated[int, typer.Option(help="Which share of the blocks, from 0.")]
Results = Annotated[Path, typer.Option(help="The run's results, results/ or a point of a sweep.")]
Whole = Annotated[str, typer.Option(help="All params as JSON, or a params file.")]
Root = Annotated[Path, typer.Option(help="The run's results/, its sweep's points in it.")]
_RUNNING = params.Running.model_fields


def main() -> None:
    """Run a command; bad input ends with its sentence on standard error and the error's status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except DgmrError as error:
        print(f"dgmr: {error}", file=sys.stderr)
        sys.exit(error.status)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        print(f"dgmr: {error}: make room on the disk, and run the command again.", file=sys.stderr)
        sys.exit(DgmrError.status)


@app.command()
def schema() -> None:
    """Print the JSON schema of params.yaml."""
    print(json.dumps(params.schema(), indent=2))


@app.command()
def check(
    config: Whole,
    targets: Annotated[Path, typer.Option(help="Where the targets will be.")],
    output: Output,
) -> None:
    """Check the model, the tables and the disk before any work begins."""
    from dgmr.check import check

    check(params.section(params.Params, config), targets, output)


@app.command()
def plan(
    file: Annotated[Path, typer.Option("--params", help="A params file.")] = Path("params.yaml"),
    model: Annotated[str | None, typer.Option(help="Or a model alone, with --ratio.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Hidden units over the embed dim.")] = None,
    round_to: Annotated[int, typer.Option(help="Multiple that widths are rounded up to.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Tell what a run will cost, before anything runs."""
    from rich.console import Console

    from dgmr import plan as planning

    if (model is None) != (ratio is None):
        raise DgmrError("plan: --model and --ratio go together; give both, or a --params file.")
    found: planning.ModelPlan | planning.RunPlan
    if model is None:
        found = planning.plan_run(params.read(file))
    else:
        # No order limits the width: any up to the dense one may be asked for.
        widths = {"ratio": ratio, "round_to": round_to, "max_ratio": sys.maxsize}
        found = planning.plan_model(model, params.section(params.Prune, json.dumps(widths)))
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    elif isinstance(found, planning.RunPlan):
        planning.show_run(found, Console())
    else:
        planning.show_model(found, Console())


@app.command()
def clean(
    file: Annotated[Path, typer.Option("--params", help="A params file.")] = Path("params.yaml"),
    remove: Annotated[bool, typer.Option("--remove", help="Remove it.")] = False,
) -> None:
    """Show what work/ no longer needs with these params; with --remove, free it."""
    from dgmr import clean as cleaning
    from dgmr.files import readable

    found = cleaning.unneeded(params.read(file))
    for path, frees, reason in found:
        print(f"{readable(frees):>10}  {path}  {reason}")
    total = readable(sum(each.frees for each in found))
    if remove:
        cleaning.remove(found)
        print(f"{total} freed")
    else:
        print(f"{total} can be freed: dgmr clean --remove" if found else "nothing to free")


@teacher_app.command("convert")
def teacher_convert(config: Config, output: Output) -> None:
    """Write a timm model with its weights as a model artefact."""
    from dgmr.teacher.convert import convert

    convert(params.section(params.Teacher, config), output)


@teacher_app.command("train-demo")
def teacher_train_demo(output: Output, downloads: Downloads, epochs: int | None = None) -> None:
    """Train the demo teacher anew."""
    from dgmr.teacher.demo import Recipe, train

    recipe = Recipe()
    if epochs is not None:
        recipe = dataclasses.replace(recipe, epochs=epochs)
    train(output, downloads, recipe)


@data_app.command("fashion-table")
def data_fashion_table(output: Output, downloads: Downloads) -> None:
    """Write Fashion-MNIST's train images as files, with a table in LAION's columns."""
    from dgmr.data.fashion_table import make

    make(output, downloads)


@data_app.command("select")
def data_select(table: Annotated[str, typer.Option()], config: Config, output: Output) -> None:
    """Filter a table (a path or glob) and draw the samples."""
    from dgmr.data.select import select

    select(table, params.section(params.Data, config), output)


@data_app.command("pack")
def data_pack(
    shards: Annotated[list[str], typer.Argument(help="Names of the shards to write.")],
    rows: Annotated[Path, typer.Option(help="Parquet of the selected rows.")],
    table_folder: Annotated[Path, typer.Option(help="What relative URLs are relative to.")],
    output: Output,
    downloaded: Annotated[Path | None, typer.Option(help="img2dataset's output folder.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Largest shorter side, pixels.")] = None,
) -> None:
    """Pack the selected images into shards."""
    from dgmr.data.pack import pack

    pack(
        rows,
        shards,
        output,
        table_folder=table_folder,
        downloaded=downloaded,
        image_size=image_size,
    )


@data_app.command("evaluation")
def data_evaluation(
    config: Annotated[str, typer.Option(help="data.eval as JSON.")],
    shard_size: Annotated[int, typer.Option(help="Samples a shard.")],
    output: Output,
    downloads: Downloads,
) -> None:
    """Pack the labelled images into evaluation shards."""
    from dgmr.data.evaluation import make

    make(params.section(params.EvaluationData, config), shard_size, output, downloads)


@data_app.command("publish")
def data_publish(
    jobs: Annotated[list[Path], typer.Argument(help="Folders of packed shards.")],
    selection: Annotated[Path, typer.Option(help="selection.json")],
    output: Output,
) -> None:
    """Gather the shards into results/data."""
    from dgmr.data.publish import publish

    publish(jobs, selection, output)


@data_app.command("publish-evaluation")
def data_publish_evaluation(
    evaluation: Annotated[Path, typer.Argument(help="Folder of evaluation shards.")],
    output: Output,
) -> None:
    """Gather the evaluation shards into results/evaluation_data."""
    from dgmr.data.publish import publish_evaluation

    publish_evaluation(evaluation, output)


@features_app.command("targets")
def features_targets(
    shards: Annotated[list[str], typer.Argument(help="Names of the shards.")],
    teacher: Teacher,
    data: Data,
    config: Config,
    output: Output,
) -> None:
    """Cache the teacher's outputs for every view of some shards."""
    from dgmr.features.targets import compute

    compute(teacher, data, shards, params.section(params.Features, config), output)


@features_app.command("calibration")
def features_calibration(teacher: Teacher, data: Data, config: Config, output: Output) -> None:
    """Keep the inputs of every MLP for some images."""
    from dgmr.features.calibration import compute

    section = params.section(params.Features, config)
    compute(teacher, data, section, output)


@features_app.command("publish")
def features_publish(
    calibration: Annotated[Path, typer.Option(help="Folder of calibration inputs.")],
    teacher: Teacher,
    config: Config,
    output: Output,
    targets: Annotated[list[Path] | None, typer.Argument(help="Folders of targets.")] = None,
) -> None:
    """List the features in results/features."""
    from dgmr.features.publish import publish

    publish(teacher, targets or [], calibration, params.section(params.Features, config), output)


@prune_app.command("saliency")
def prune_saliency(
    teacher: Teacher,
    data: Data,
    features: Config,
    seed: Annotated[int, typer.Option(help="Of the random probes.")],
    output: Output,
) -> None:
    """Score every hidden unit for the method taylor."""
    from dgmr.prune.saliency import compute

    compute(teacher, data, params.section(params.Features, features), seed, output)


@prune_app.command("orders")
def prune_orders(
    teacher: Teacher,
    config: Config,
    part: Part,
    output: Output,
    features: Annotated[
        Path | None, typer.Option(help="The features room, for methods that need it.")
    ] = None,
    saliency: Annotated[Path | None, typer.Option(help="Folder of scores, for taylor.")] = None,
) -> None:
    """Order the hidden units of a share of the blocks."""
    from dgmr.prune.orders import compute

    compute(teacher, params.section(params.Ordering, config), part, output, features, saliency)


@prune_app.command("refits")
def prune_refits(
    teacher: Teacher, orders: Orders, features: Features, config: Config, part: Part, output: Output
) -> None:
    """Compensate a share of the blocks in closed form."""
    from dgmr.prune.refits import compute

    compute(teacher, orders, features, params.section(params.Prune, config), part, output)


@prune_app.command("sequential-refits")
def prune_sequential_refits(
    teacher: Teacher,
    orders: Orders,
    data: Data,
    features: Annotated[str, typer.Option(help="The section features as JSON.")],
    config: Config,
    output: Output,
) -> None:
    """Compensate block after block, on the student's own inputs."""
    from dgmr.prune.refits import compute_sequential

    calibration = params.section(params.Features, features)
    section = params.section(params.Prune, config)
    compute_sequential(teacher, orders, data, calibration, section, output)


@prune_app.command("assemble")
def prune_assemble(
    teacher: Teacher,
    orders: Orders,
    config: Config,
    output: Output,
    refits: Annotated[list[Path] | None, typer.Option(help="Part files of the refits.")] = None,
) -> None:
    """Write the pruned student."""
    from dgmr.prune.assemble import assemble

    assemble(teacher, orders, refits or [], params.section(params.Prune, config), output)


@distill_app.command("prune")
def distill_prune(
    parent: Annotated[Path, typer.Option(help="Artefact that is pruned further.")],
    teacher: Teacher,
    orders: Orders,
    data: Data,
    features: Annotated[str, typer.Option(help="The section features as JSON.")],
    config: Annotated[str, typer.Option(help="The section prune as JSON, or a params file.")],
    stage: Annotated[str, typer.Option(help="prune of the stage as JSON.")],
    output: Output,
) -> None:
    """Prune further, before a stage begins."""
    from dgmr.prune.again import prune_again

    prune_again(
        parent,
        teacher,
        orders,
        data,
        params.section(params.Features, features),
        params.section(params.Prune, config),
        params.section(params.StagePrune, stage),
        output,
    )


@distill_app.command("train")
def distill_train(
    stage: Annotated[str, typer.Option(help="Name of the stage.")],
    parent: Annotated[Path, typer.Option(help="Artefact that the stage starts from.")],
    teacher: Teacher,
    data: Data,
    features: Features,
    config: Annotated[str, typer.Option(help="The stage as JSON.")],
    output: Output,
    runs: Annotated[Path, typer.Option(help="Where training checkpoints go.")] = Path(
        "work/distill"
    ),
    processes: Annotated[int, typer.Option(help="Processes that train together.")] = 1,
    gpus: Annotated[int, typer.Option(help="Or one for each of so many GPUs.")] = 0,
    nodes: Annotated[int, typer.Option(help="Nodes of a Slurm job that share them.")] = 1,
    workers: Annotated[
        str, typer.Option(help="Processes that load images, for each of them; or auto.")
    ] = "auto",
    shard_above: Annotated[
        int, typer.Option(help="Parameters above which processes share the weights.")
    ] = _RUNNING["shard_above"].default,
    checkpoint_every_s: Annotated[
        int, typer.Option(help="Seconds between training checkpoints.")
    ] = _RUNNING["checkpoint_every_s"].default,
    max_bad_steps: Annotated[
        int, typer.Option(help="Steps that may be skipped for a loss that is no finite number.")
    ] = _RUNNING["max_bad_steps"].default,
) -> None:
    """Train one stage; a run that was killed goes on where it was."""
    section = params.section(params.Stage, config)
    given = {
        "max_bad_steps": max_bad_steps,
        "checkpoint_every_s": checkpoint_every_s,
        "processes": processes,
        "workers": None if workers == "auto" else workers,
        "shard_above": shard_above,
    }
    running = params.section(params.Running, json.dumps(given))
    from dgmr.distill.parallel import launch

    launch(gpus or processes, nodes)
    from dgmr.distill.trainer import train

    train(stage, parent, teacher, data, features, section, output, runs, running)


@evaluate_app.command("model")
def evaluate_model(
    name: Annotated[str, typer.Option(help="What the report calls the model.")],
    model: Annotated[Path, typer.Option(help="Its artefact.")],
    teacher: Teacher,
    data: Data,
    config: Config,
    output: Output,
) -> None:
    """Score a model on the evaluation shards."""
    from dgmr.evaluate.accuracy import evaluate

    batch_size = params.section(params.Evaluate, config).batch_size
    evaluate(name, model, teacher, data, batch_size, output)


@evaluate_app.command("speed")
def evaluate_speed(
    models: Annotated[list[str], typer.Argument(help="name=artefact of every model.")],
    config: Config,
    output: Output,
) -> None:
    """Measure images a second of all models, side by side."""
    from dgmr.evaluate.speed import measure

    measure(_named(models), params.section(params.Evaluate, config), output)


@evaluate_app.command("gather")
def evaluate_gather(
    scores: Annotated[list[str], typer.Argument(help="name=file of every model.")],
    speed: Annotated[Path, typer.Option(help="What was measured of their speed.")],
    output: Output,
) -> None:
    """Gather what the models scored into results/evaluate."""
    from dgmr.evaluate.gather import gather

    gather(_named(scores), speed, output)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="The artefact, such as results/student.")],
    output: Output,
    format: Annotated[Literal["onnx"], typer.Option(help="What to make of it.")] = "onnx",
) -> None:
    """Write a model for other runtimes, checked against the artefact."""
    from dgmr.export import export

    export(model, output)


@app.command()
def report(
    results: Results,
    config: Whole,
    shared: Annotated[
        Path | None, typer.Option(help="Where teacher and data are, if not in the run's results.")
    ] = None,
) -> None:
    """Write the page, the flat metrics and the exported student."""
    from dgmr.report.page import report

    resolved = params.section(params.Params, config)
    stages = list(resolved.distill.stages)
    runs = {results: resolved}
    runs |= {results / "sweep" / name: point for name, point in resolved.points().items()}
    swept = {folder: run.values(resolved.sweep) for folder, run in runs.items()}
    report(results, stages, resolved.shaping(), results, shared or results, swept)


@app.command(hidden=True)
def need(rooms: list[str]) -> None:
    """End with an error unless these rooms under results/ are those of params.yaml."""
    from dgmr.keys import Keys

    keys = Keys(params.read(Path("params.yaml")))
    for room in rooms:
        for stamp in keys.stamps(room):
            if not Path("results", stamp).exists():
                raise DgmrError(
                    f"results/{room} is not what params.yaml asks for ({stamp} is missing):"
                    " dvc repro without --single-item makes it first."
                )


@app.command(hidden=True)
def tidy(
    folder: Path,
    kept: Annotated[list[Path] | None, typer.Argument(help="Folders in it that stay.")] = None,
) -> None:
    """Delete what else is in a folder of results."""
    from dgmr.files import keep_only

    keep_only(folder, kept or [])


@track_app.command("room")
def track_room(
    room: Annotated[str, typer.Argument(help="teacher, data, ..., distill/<stage>, report.")],
    results: Results,
    config: Whole,
    point: Annotated[str, typer.Option(help="Name of the point, if it is a sweep's.")] = "",
    output: Annotated[Path | None, typer.Option(help="Where to note what was told.")] = None,
) -> None:
    """Tell the store of a room that is done; of a point, with its own params and results."""
    from dgmr.files import write_json
    from dgmr.track.tell import track

    told = {room: track(room, params.section(params.Params, config), results, point)}
    _print_told(told)
    if output is not None:
        write_json(output, told)


@track_app.command("sync")
def track_sync(results: Root, config: Whole) -> None:
    """Tell the store of all rooms that are done with these params, and of stages that were killed."""
    from dgmr.track.tell import sync

    _print_told(sync(params.section(params.Params, config), results))


def _print_told(told: dict[str, bool]) -> None:
    for name, is_told in told.items():
        print(f"{name}: {'told' if is_told else 'not told'}")


@track_app.command("follow")
def track_follow(
    results: Root,
    config: Whole,
    wait_s: Annotated[float, typer.Option(help="Seconds to wait for a stage to go on.")] = 600.0,
) -> None:
    """Tell the store of stages as they train, beside them; ends with them, or by Ctrl-C."""
    from dgmr.track.follow import follow

    with contextlib.suppress(KeyboardInterrupt):
        follow(params.section(params.Params, config), results, wait_s)


def _named(pairs: list[str]) -> dict[str, Path]:
    """Paths by name, from ``name=path``."""
    return {name: Path(path) for name, path in (pair.split("=", 1) for pair in pairs)}


for name, group in {
    "teacher": teacher_app,
    "data": data_app,
    "features": features_app,
    "prune": prune_app,
    "distill": distill_app,
    "evaluate": evaluate_app,
    "track": track_app,
}.items():
    app.add_typer(group, name=name)
