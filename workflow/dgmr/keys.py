"""What every result of a run depends on, as a short name: where the key is the same, so is the result.

A key is the hash of the step's code and command, of the params it reads and of its parents' keys, so it
is known before anything runs. Expensive results stand in ``work/<room>/<key>``; a room under ``results``
has a stamp ``<key>.stamp``, written last. Snakemake is asked for stamps: where a parameter changes, or
DVC puts another version of a room in place, the stamp that is wanted is not there, and the room is made;
where they change back, it is there again.

Importing this module is cheap (no torch): the Snakefile does, at parse time.
"""

import functools
from glob import glob
from pathlib import Path
from typing import Any

from dgmr.checkpoint import teacher_files
from dgmr.errors import DgmrError
from dgmr.fingerprint import code, command, content, key, listing, versions
from dgmr.params import Ordering, Params

TEACHER, PRUNED = "teacher", "pruned"


def step(rule: str, module: str, *parts: Any) -> str:
    """Key of what ``rule`` makes by calling ``module``, from ``parts``."""
    return key(command(rule), code(module), *parts)


def _matching(pattern: str | None) -> list[str]:
    return sorted(glob(pattern or "", recursive=True))


class Keys:
    """The keys of a run with ``params``, each computed when it is asked for."""

    def __init__(self, params: Params, main: "Keys | None" = None) -> None:
        """``main``: of the run, where these are of a point of its sweep."""
        self.params, self._main = params, main or self

    @functools.cached_property
    def points(self) -> dict[str, "Keys"]:
        """Of the points of the run's sweep, by their names."""
        return {name: Keys(params, self) for name, params in self.params.points().items()}

    @property
    def runs(self) -> list["Keys"]:
        """These, and those of the points."""
        return [self, *self.points.values()]

    @functools.cached_property
    def check(self) -> str:
        """``work/check/<key>.json``."""
        # How models are compared needs no check.
        shaping = [keys.params.shaping() | {"evaluate": {}} for keys in self.runs]
        return step("check", "dgmr.check", shaping)

    @functools.cached_property
    def teacher(self) -> str:
        """``results/teacher``; with the content of the files that a local teacher is read from."""
        teacher = self.params.teacher
        try:
            files = content(teacher_files(teacher))
        except DgmrError:  # the check tells
            files = []
        return step("teacher", "dgmr.teacher.convert", teacher.model_dump(mode="json"), files)

    @functools.cached_property
    def fashion_table(self) -> str:
        """``work/data/<key>/table.parquet``."""
        return step("fashion_table", "dgmr.data.fashion_table")

    @functools.cached_property
    def selection(self) -> str:
        """``work/data/<key>/selection``; with the content of the table, not of what its URLs name."""
        data = self.params.data
        table: Any = self.fashion_table
        if data.table is not None:
            table = [data.table, content(map(Path, self.tables))]
        drawn = data.model_dump(mode="json", exclude={"eval", "download", "image_size"})
        return step("select_samples", "dgmr.data.select", table, drawn)

    @property
    def tables(self) -> list[str]:
        """The files of ``data.table``."""
        return _matching(self.params.data.table)

    @functools.cached_property
    def downloads(self) -> str:
        """``work/data/<key>/downloads``."""
        how = self.params.data.download.model_dump(mode="json")
        return key(command("download_images"), self.selection, how)

    @functools.cached_property
    def shards(self) -> str:
        """``work/data/<key>/shards``."""
        data = self.params.data
        source = self.downloads if data.urls == "http" else self.selection
        return step("pack_shards", "dgmr.data.pack", source, data.image_size)

    @functools.cached_property
    def data(self) -> str:
        """``results/data``."""
        return step("data", "dgmr.data.publish", self.shards)

    @functools.cached_property
    def evaluation_shards(self) -> str:
        """``work/data/<key>/evaluation``; with the content of tars, names and sizes of an ImageFolder's files."""
        if self._main is not self:  # no sweep is of data, and to look at many files takes its time
            return self._main.evaluation_shards
        data = self.params.data
        wanted = data.eval.model_dump(mode="json")
        match data.eval.source:
            case "imagefolder":
                images: Any = listing(Path(str(data.eval.path)))
            case "webdataset":
                images = content(map(Path, _matching(data.eval.path)))
            case _:
                images = None
        return step("pack_evaluation", "dgmr.data.evaluation", wanted, images, data.shard_size)

    @functools.cached_property
    def evaluation_data(self) -> str:
        """``results/evaluation_data``."""
        return step("evaluation_data", "dgmr.data.publish", self.evaluation_shards)

    @functools.cached_property
    def targets(self) -> str:
        """``work/features/<key>/targets``."""
        asked = self.params.features.model_dump(mode="json", exclude={"calibration", "cache"})
        return step("targets", "dgmr.features.targets", *self._asked, asked)

    @functools.cached_property
    def calibration(self) -> str:
        """``work/features/<key>/calibration``."""
        drawn = self.params.features.model_dump(mode="json", include={"calibration", "batch_size"})
        return step("calibration", "dgmr.features.calibration", *self._asked, drawn)

    @functools.cached_property
    def features(self) -> str:
        """``results/features``."""
        return step("features", "dgmr.features.publish", self._answers, self.calibration)

    @functools.cached_property
    def saliency(self) -> str:
        """``work/prune/<key>/saliency``."""
        return step("saliency", "dgmr.prune.saliency", self.calibration, self.params.prune.seed)

    @functools.cached_property
    def orders(self) -> str:
        """``work/prune/<key>/orders``; not how many jobs made them."""
        prune = self.params.prune
        how = prune.model_dump(mode="json", include=set(Ordering.model_fields), exclude={"parts"})
        calibration = self.calibration if prune.needs_calibration else None
        saliency = self.saliency if prune.method == "taylor" else None
        return step("order_blocks", "dgmr.prune.orders", self.teacher, how, calibration, saliency)

    @functools.cached_property
    def refits(self) -> str:
        """``work/prune/<key>/refits``."""
        return step(
            "refit_blocks", "dgmr.prune.refits", self.orders, self.calibration, self._pruning
        )

    @functools.cached_property
    def prune(self) -> str:
        """``results/prune``."""
        refits = self.refits if self.params.prune.compensate == "least_squares" else None
        return step("assemble", "dgmr.prune.assemble", self.orders, refits, self._pruning)

    def prune_again(self, stage: str) -> str:
        """``results/distill/pruned/<stage>``."""
        again = self.params.distill.stages[stage].prune
        assert again is not None
        calibration = self.calibration if self.params.prune.compensate == "least_squares" else None
        parts = self.model(self.parent(stage)), self.orders, calibration, self._pruning
        return step("prune_again", "dgmr.prune.again", *parts, again.model_dump(mode="json"))

    def distill(self, stage: str) -> str:
        """``results/distill/<stage>`` and ``work/distill/<key>``, its training checkpoints."""
        config = self.params.distill.stages[stage]
        start = self.model(self.parent(stage)) if config.prune is None else self.prune_again(stage)
        how = config.model_dump(mode="json", exclude={"prune"})
        return step("distill_stage", "dgmr.distill.trainer", start, self._answers, how)

    @functools.cached_property
    def distilled(self) -> str:
        """``results/distill``: these stages and no others."""
        return key(command("distill"), [(name, self.distill(name)) for name in self.models[2:]])

    @property
    def models(self) -> list[str]:
        """Names of the models in the chain: teacher, pruned, and what each stage leaves."""
        return [TEACHER, PRUNED, *self.params.distill.stages]

    def parent(self, model: str) -> str:
        """The model that comes before."""
        return self.models[self.models.index(model) - 1]

    def model(self, name: str) -> str:
        """Key of a model's artefact."""
        return {TEACHER: self.teacher, PRUNED: self.prune}.get(name) or self.distill(name)

    def evaluation(self, model: str) -> str:
        """``work/evaluate/accuracy/<key>.json``."""
        batch_size = self.params.evaluate.batch_size
        parts = self.model(model), self.teacher, self.evaluation_data, batch_size
        return step("evaluate_model", "dgmr.evaluate.accuracy", model, *parts)

    @functools.cached_property
    def speed(self) -> str:
        """``work/evaluate/speed/<key>.json``."""
        how = self.params.evaluate.model_dump(mode="json", exclude={"batch_size"})
        models = [(name, self.model(name)) for name in self.models]
        return step("measure_speed", "dgmr.evaluate.speed", models, how)

    @functools.cached_property
    def evaluate(self) -> str:
        """``results/evaluate``."""
        evaluations = [self.evaluation(name) for name in self.models]
        return step("gather", "dgmr.evaluate.gather", evaluations, self.speed)

    @functools.cached_property
    def report(self) -> str:
        """``results/student``, the page and the flat metrics."""
        points = {name: keys.report for name, keys in self.points.items()}
        parts = self.evaluate, self.data, self.params.shaping(), self.params.sweep, points
        return step("report", "dgmr.report.page", *parts)

    def of_work(self) -> set[str]:
        """Keys of all that the run has under ``work``, or would have."""
        stages = self.params.distill.stages
        return {
            self.check,
            self.fashion_table,
            self.selection,
            self.downloads,
            self.shards,
            self.evaluation_shards,
            self.targets,
            self.calibration,
            self.saliency,
            self.orders,
            self.refits,
            self.speed,
            *(self.distill(stage) for stage in stages),
            *(self.prune_again(name) for name, stage in stages.items() if stage.prune is not None),
            *(self.evaluation(model) for model in self.models),
        }

    @functools.cached_property
    def sweep(self) -> str:
        """``results/sweep``: these points and no others."""
        return key(command("sweep"), [(name, keys.report) for name, keys in self.points.items()])

    def room(self, name: str) -> str:
        """Key of a room as MLflow knows them: ``prune``, or ``distill/<stage>``."""
        kind, _, stage = name.partition("/")
        found: str = self.distill(stage) if stage else getattr(self, kind)
        return found

    def stamps(self, room: str) -> list[str]:
        """What is in the run's results where all of a room, of DVC's or MLflow's, is this run's."""
        if room == "distill":
            return [f"distill/{stage}/{self.distill(stage)}.stamp" for stage in self.models[2:]]
        if room == "sweep":
            points = self.points.items()
            return [f"sweep/{name}/student/{keys.report}.stamp" for name, keys in points]
        folder = "student" if room == "report" else room
        return [f"{folder}/{self.room(room)}.stamp"]

    def tracked(self, room: str) -> str:
        """``results/track/<room>/<key>.json``: that MLflow was told of a room of this run."""
        told = self.params.mlflow.model_dump(mode="json"), self.params.shaping()
        return key(code("dgmr.track.tell"), told, room, self.room(room))

    @property
    def _answers(self) -> Any:
        """What the training learns from: the targets, or what the teacher is asked in every step."""
        features = self.params.features
        if features.cache == "disk":
            return self.targets
        return [*self._asked, features.model_dump(mode="json", exclude={"calibration"})]

    @property
    def _asked(self) -> list[Any]:
        """The teacher, and the images that it is shown."""
        # Other versions may draw other pixels, or compute with other kernels.
        libraries = versions("torch", "torchvision", "timm", "pillow")
        return [libraries, self.teacher, self.shards]

    @property
    def _pruning(self) -> Any:
        return self.params.prune.model_dump(mode="json", exclude={"parts"})
