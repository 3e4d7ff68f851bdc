"""One stage of distillation: the student learns to answer what the frozen teacher answered."""

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dgmr import artefact
from dgmr.distill import checkpoints
from dgmr.distill.history import History
from dgmr.distill.learner import Learner, Measured, Teacher
from dgmr.distill.live import Live
from dgmr.distill.pairs import Batch, Batches, PairOrder, Pairs
from dgmr.distill.parallel import (
    Processes,
    each_whole,
    gathered,
    processes,
    summed,
    wait_for_all,
)
from dgmr.errors import DgmrError, Stopped, told_of
from dgmr.files import alone, sha256, write_json
from dgmr.fingerprint import code, key
from dgmr.models import TimmModel, loader_workers
from dgmr.params import Running, Stage
from dgmr.progress import progress
from dgmr.targets import Manifest

log = logging.getLogger(__name__)
HISTORY = "history.json"
BAD_STEPS = "bad_steps.json"
_ASKING = (signal.SIGTERM, signal.SIGINT)
_LONGEST_WAIT_S = 1800


def train(
    name: str,
    parent: Path,
    teacher: Path,
    data: Path,
    features: Path,
    config: Stage,
    output: Path,
    runs: Path = Path("work/distill"),
    running: Running = Running(),
) -> None:
    """Train the model artefact ``parent`` as ``config`` says; write the artefact ``output``.

    With it goes ``history.json``: about a hundred rows of step, samples, lr, loss and its terms (means
    since the row before) and images_per_s. A run that was stopped or killed goes on from its newest
    checkpoint in ``runs``, where it has a folder of its own, bit by bit as if it had not been.

    Raises:
        DgmrError: the features are another teacher's or about other views, too many steps had a
            loss or gradient that is no finite number, or another process is still training this run.
        Stopped: by SIGTERM or SIGINT; a checkpoint has been saved.
    """
    with processes() as group, _stop_asked() as stop_asked, contextlib.ExitStack() as held:
        _check_share(name, config, group)
        manifest = Manifest(features)
        manifest.check_teacher(artefact.provenance(teacher)["sha256"])
        asked, shard_above = manifest.config, running.shard_above
        student, skeleton = artefact.load(parent), artefact.skeleton(parent)
        pairs = Pairs(data, features, student, verify=group.is_first)
        wait_for_all(group)  # the first one verifies for all
        run = runs / _run_key(parent, manifest, pairs, config)
        held.enter_context(_sole_training(run, name, group, stop_asked))
        transform = pairs.transform
        with told_of(f"distill.stages.{name}.train"):
            learner = Learner(student, skeleton, config, asked, transform, group, shard_above)
        online = None
        if pairs.targets is None:
            online = Teacher(artefact.load(teacher), asked, group, shard_above)

        steps = config.samples // config.batch_size
        first, history, bad_steps = 0, History(steps), []
        if found := checkpoints.newest(run):
            learner.load(found.tensors())
            first, bad_steps = found.step, found.about["bad_steps"]
            history = History(steps, found.about["history"])
            if group.is_first:
                log.info("distill %s: going on after step %d of %d", name, first, steps)

        parent_sha256 = artefact.provenance(parent)["sha256"]
        live = Live(run, steps, output)
        order = PairOrder(len(pairs.images), asked.views.count, config.seed)
        loader = DataLoader(
            pairs,
            batch_size=None,  # the sampler gives batches
            sampler=Batches(order, config.batch_size, range(first, steps), group.rank, group.size),
            num_workers=loader_workers() if running.workers is None else running.workers,
            worker_init_fn=_leave_signals_to_the_trainer,
        )
        saved_at = time.monotonic()
        total, before = steps * config.batch_size, first * config.batch_size
        batch: Batch
        bar = progress(f"distill {name}", total, done=before, shown=group.is_first)
        with bar as advance:
            for step, batch in enumerate(loader, start=first):
                _seed(config.seed, step, group.rank)
                is_due = time.monotonic() - saved_at >= running.checkpoint_every_s
                asks = {"stop": stop_asked(), "save": group.is_first and is_due}
                measured = learner.measure(batch, online, asks)
                if measured.is_finite:
                    learner.update(step, steps)
                    history.add(measured.values, config.batch_size)
                else:
                    bad_steps.append(_bad_step(step, batch, measured, pairs, group))
                    _write_down(name, bad_steps, run, running.max_bad_steps, group)

                done = step + 1
                history.end_step(done, done * config.batch_size, learner.lr)
                advance(config.batch_size)
                if measured.asks["save"] or measured.asks["stop"] or done == steps:
                    about = {"history": history.state(), "bad_steps": bad_steps}
                    checkpoints.save(run, done, learner.state(), about, group)
                    saved_at = time.monotonic()
                if group.is_first:
                    live.write_if_due(done, history)
                if measured.asks["stop"] and done < steps:
                    raise Stopped(
                        f"distill {name}: stopped after step {done} of {steps}, and saved; the same"
                        " command goes on from there."
                    )

        provenance = {
            "stage": f"distill {name}",
            "parent_sha256": parent_sha256,
            "config": config.model_dump(mode="json"),
            "samples": total,
            "skipped_steps": len(bad_steps),
        }
        rows = history.finished(steps, total, learner.lr)
        _save(output, artefact.skeleton(parent), learner, provenance, rows, group)
        if group.is_first:
            checkpoints.keep_last(run)


def _check_share(name: str, config: Stage, group: Processes) -> None:
    """Every process has to have an image in each of its passes."""
    if config.batch_size < group.size * config.accumulate:
        raise DgmrError(
            f"distill.stages.{name}: a batch_size of {config.batch_size} cannot be shared by"
            f" {group.size} processes in {config.accumulate} passes: raise it, or lower accumulate."
        )


def _run_key(parent: Path, manifest: Manifest, pairs: Pairs, config: Stage) -> str:
    """Of everything that shapes the run; not how many processes share it."""
    return key(
        code("dgmr.distill.trainer"),
        torch.__version__,
        config.model_dump(mode="json"),
        artefact.provenance(parent)["sha256"],
        sha256(parent / artefact.CONFIG),
        manifest.about,
        manifest.config.model_dump(mode="json", include={"cache", "views"}),
        manifest.target_hashes,
        [shard.sha256 for shard in pairs.images.shards],
    )


def _seed(seed: int, step: int, rank: int) -> None:
    """Random numbers, of dropout say, are a function of the step, so none of their states is saved."""
    torch.manual_seed(int(key(seed, step, rank), 16))


@contextlib.contextmanager
def _stop_asked() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM and SIGINT are only noted; tells whether one came.

    Not the second one either: where a scheduler sends them to all processes, torchrun sends them again.
    """
    received: list[int] = []
    before: dict[int, Any] = {}
    for asking in _ASKING:
        before[asking] = signal.signal(asking, lambda number, _frame: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """They go to all processes of a job; what the loader has begun is still wanted."""
    for number in _ASKING:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _sole_training(
    run: Path, name: str, group: Processes, stop_asked: Callable[[], bool]
) -> Iterator[None]:
    """Within the block no other job trains ``run``, such as one whose Snakemake was killed; waits for it.

    The first process has the lock. The others ask it time and again, for one long wait would be more
    than the process group's patience.
    """

    def agreed(is_ours: bool) -> bool:
        ours, stops = summed([float(is_ours), float(stop_asked())], group)
        if stops and not ours:
            raise Stopped(
                f"distill {name}: stopped while another process was training the same run."
            )
        return bool(ours)

    if group.is_first:
        with alone(run / "training", _LONGEST_WAIT_S, lambda: agreed(False)):
            agreed(True)
            yield
    else:
        while not agreed(False):
            pass
        yield


def _bad_step(
    step: int, batch: Batch, measured: Measured, pairs: Pairs, group: Processes
) -> dict[str, Any]:
    """What can be told of a step that is skipped."""
    seen = gathered(batch.pairs, group)
    return {
        "step": step + 1,
        "loss": str(measured.values["loss"]),
        "gradient_norm": str(measured.gradient_norm),
        "pairs": [{"key": pairs.images.keys[index], "view": view} for index, view in seen],
    }


def _write_down(
    name: str, bad_steps: list[dict[str, Any]], run: Path, most: int, group: Processes
) -> None:
    if group.is_first:
        write_json(run / BAD_STEPS, bad_steps)
    if len(bad_steps) > most:
        last = bad_steps[-1]
        raise DgmrError(
            f"distill.stages.{name}: the loss is {last['loss']} and the gradient's norm"
            f" {last['gradient_norm']} at step {last['step']}, the {len(bad_steps)}. step to be"
            f" skipped, and distill.max_bad_steps is {most}: lower lr, or train in float32;"
            f" {run / BAD_STEPS} names the images."
        )


def _save(
    output: Path,
    skeleton: TimmModel,
    learner: Learner,
    provenance: dict[str, Any],
    rows: list[dict[str, Any]],
    group: Processes,
) -> None:
    """The first process writes, and all give their parts of what is sharded."""
    named = dict(learner.result())
    content = each_whole(named.items())
    if group.is_first:
        artefact.save(output, skeleton, provenance, {HISTORY: rows}, (named, content))
    for _ in content:  # the other processes
        pass
