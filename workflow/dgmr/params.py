"""Every knob of ``params.yaml``: types, defaults, allowed values. Unknown keys are refused.

Importing this module is cheap (no torch), so a bad file is told at parse time.
"""

import copy
import difflib
import functools
import itertools
import json
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)

from dgmr import fingerprint
from dgmr.errors import DgmrError

Fraction = Annotated[float, Field(ge=0, le=1)]
SectionT = typing.TypeVar("SectionT", bound="Section")
StageName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]*$")]
RESERVED_MODELS = ("teacher", "pruned", "student", "speed")
_LONGEST_NAME = 100  # of a point; file systems allow 255 bytes


class Section(BaseModel):
    """Base of all sections: unknown keys refused, values fixed once read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Teacher(Section):
    """The model to reduce."""

    model: Annotated[str, Field(min_length=1)]
    """timm name, ``hf-hub:<repository>`` or ``local-dir:<folder>``: the architecture, and its weights
    where ``checkpoint`` gives none."""
    checkpoint: Annotated[str, Field(min_length=1)] | None = None
    """Weights on disk: a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file, or a folder with
    ``model.safetensors``, its shards and their index, or ``pytorch_model.bin``."""

    @property
    def folder(self) -> Path | None:
        """The folder of a ``local-dir``."""
        scheme, _, folder = self.model.partition(":")
        return Path(folder) if scheme == "local-dir" else None

    @property
    def weights(self) -> Path | None:
        """The file or folder that the weights are read from; None where timm fetches them."""
        return self.folder if self.checkpoint is None else Path(self.checkpoint)


class Filters(Section):
    """Which rows of the table are wanted, by what the table says of them; null: no limit."""

    min_side: Annotated[int, Field(ge=1)] | None = None
    """Shorter side of the image, pixels."""
    max_aspect_ratio: Annotated[float, Field(ge=1)] | None = None
    """Longer side over shorter side."""
    min_similarity: Annotated[float, Field(ge=-1, le=1)] | None = None
    """CLIP similarity of image and text; rows without one are dropped."""
    max_punsafe: Fraction | None = 0.5
    """Probability that the image is unsafe (or an NSFW tag of UNLIKELY); unjudged rows are unsafe."""


class Download(Section):
    """How img2dataset fetches images (``data.urls: http``)."""

    threads: Annotated[int, Field(ge=1, le=1024)] = 64
    """Connections at once, per job."""
    timeout_s: Annotated[int, Field(ge=1)] = 10
    """Seconds until an image is given up."""
    retries: Annotated[int, Field(ge=0, le=10)] = 1
    """Further tries of a failed URL."""


class EvaluationData(Section):
    """Labelled images the models are compared on."""

    source: Literal["fashion-mnist", "imagefolder", "webdataset"] = "fashion-mnist"
    """``imagefolder``: one sub-folder a class, in the order of the model's classes.
    ``webdataset``: tars of image + ``.cls``."""
    path: str | None = None
    """The folder (``imagefolder``) or a glob of tars (``webdataset``)."""
    n_samples: Annotated[int, Field(ge=1)] | None = None
    """Images used, spread evenly over the set; null: all."""

    @model_validator(mode="after")
    def _path_where_needed(self) -> Self:
        if (self.source == "fashion-mnist") != (self.path is None):
            raise ValueError(
                "data.eval.path must be given for the sources imagefolder and webdataset,"
                f" and only for them (source is {self.source}, path is {self.path})"
            )
        return self


class Data(Section):
    """Training images without labels, and labelled images for the evaluation."""

    source: Literal["fashion-mnist", "table"] = "fashion-mnist"
    """``fashion-mnist``: a table made of its 60,000 train images. ``table``: your own."""
    table: str | None = None
    """Parquet file or glob with LAION's columns (``source: table``)."""
    urls: Literal["http", "file"] = "http"
    """What the table's URLs may be: fetched (``http``) or local files (``file``); others are refused."""
    n_samples: Annotated[int, Field(ge=1)]
    """Rows drawn at random from those that pass the filters."""
    seed: int = 0
    """Of the draw."""
    filters: Filters = Filters()
    download: Download = Download()
    image_size: Annotated[int, Field(ge=1)] | None = None
    """Images with a longer shorter side are shrunk to it, pixels; null: kept as they come."""
    shard_size: Annotated[int, Field(ge=1)] = 1000
    """Samples a shard."""
    shards_per_job: Annotated[int, Field(ge=1)] = 10
    """Shards a Snakemake job of the data and features rooms works through."""
    eval: EvaluationData = EvaluationData()

    @model_validator(mode="after")
    def _table_where_needed(self) -> Self:
        if (self.source == "table") != (self.table is not None):
            raise ValueError(
                "data.table must be given for data.source: table, and only for it"
                f" (source is {self.source}, table is {self.table})"
            )
        if self.source == "fashion-mnist" and self.urls != "file":
            raise ValueError(
                f"data.urls must be file for data.source: fashion-mnist, not {self.urls}"
            )
        return self

    @property
    def shards(self) -> list[str]:
        """Names of the shards, a function of ``n_samples`` and ``shard_size`` alone."""
        return [f"{index:05d}" for index in range(-(-self.n_samples // self.shard_size))]

    @property
    def jobs(self) -> dict[str, list[str]]:
        """Shards by the name of the job that works on them."""
        shards = self.shards
        groups = range(0, len(shards), self.shards_per_job)
        return {
            f"{job:05d}": shards[start : start + self.shards_per_job]
            for job, start in enumerate(groups)
        }


class ColorJitter(Section):
    """Random changes of an image's colours; the defaults are DINOv2's."""

    probability: Fraction = 0.8
    """That a view has any of them."""
    brightness: Fraction = 0.4
    """x: by a factor from 1 - x to 1 + x."""
    contrast: Fraction = 0.4
    """x: by a factor from 1 - x to 1 + x."""
    saturation: Fraction = 0.2
    """x: by a factor from 1 - x to 1 + x."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """x: turned by -x to x of the whole circle."""


class Views(Section):
    """Random crops, flips and colours of an image: a pure function of (seed, sample key, view)."""

    count: Annotated[int, Field(ge=1)] = 1
    """Views of a sample."""
    seed: int = 0
    """Of all that is drawn for a view."""
    crop_scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (
        0.2,
        1.0,
    )
    """Area of the crop as a fraction of the image, smallest and largest."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    color_jitter: ColorJitter | None = None
    """Null: none."""
    grayscale: Fraction = 0.0
    """Probability of losing all colour; DINOv2's: 0.2."""
    blur: Fraction = 0.0
    """Probability of a Gaussian blur, its sigma 0.1 to 2 pixels; DINOv2's: 1 and 0.1, by crop."""
    solarize: Fraction = 0.0
    """Probability that values over half are inverted; DINOv2's: 0 and 0.2, by crop."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(
                f"features.views.crop_scale must be [smallest, largest], not {list(self.crop_scale)}"
            )
        return self


class Calibration(Section):
    """Inputs of every MLP, kept for the closed-form compensation."""

    samples: Annotated[int, Field(ge=1)] = 2048
    """Training images, seen by the teacher without augmentation; every eighth is held out."""
    tokens: Annotated[int, Field(ge=1)] = 64
    """Tokens kept of each image, drawn at random; all where there are no more."""
    seed: int = 0
    """Of the draw of the tokens."""


class Features(Section):
    """What the frozen teacher says of the images: always the pooled output, and what is asked besides."""

    cache: Literal["disk", "none"] = "disk"
    """``disk``: the teacher is asked once, before the training. ``none``: in every training step."""
    views: Views = Views()
    patch_tokens: Annotated[int, Field(ge=1)] | None = 1
    """Every k-th patch token of the last block is asked for; null: none."""
    blocks: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Blocks, counted from 0, whose output tokens are asked for too."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the targets on disk."""
    pixels: bool = True
    """Cache the views' pixels beside the targets, so that the training decodes no image."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the teacher's forward pass (autocast)."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Images a forward pass."""
    calibration: Calibration = Calibration()


class Ordering(Section):
    """How the hidden units of every MLP are ordered; none of the methods needs labels."""

    method: Literal[
        "gram_schmidt",
        "activation_gram_schmidt",
        "output_gram_schmidt",
        "magnitude",
        "active_energy",
        "taylor",
        "random",
    ] = "gram_schmidt"
    """By the rows of the first layer, by calibration activations, or by what the output loses."""
    seed: int = 0
    """Of the methods ``random`` and ``taylor``."""
    tokens: Annotated[int, Field(ge=1)] | None = 32768
    """Calibration tokens that a method looks at, drawn at random from all; null: all."""
    max_ratio: Annotated[float, Field(gt=0)] = 2.0
    """The orders reach this multiple of the embed dim; any width up to it is a slice of them."""
    parts: Annotated[int, Field(ge=1)] = 1
    """Jobs the blocks are dealt to."""

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at calibration activations."""
        return self.method in ("activation_gram_schmidt", "output_gram_schmidt", "active_energy")


class Prune(Ordering):
    """Which hidden units stay, and how the others are made up for."""

    ratio: Annotated[float, Field(gt=0)] | None = None
    """Hidden units kept, as a multiple of the embed dim: ``int(ratio * dim)``."""
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    """Or as a fraction of the MLP's own: ``int(keep * hidden_features)``."""
    hidden_features: (
        Annotated[dict[str, Annotated[int, Field(ge=1)]], Field(min_length=1)] | None
    ) = None
    """Or by the MLP's module name; MLPs that are not named keep all."""
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    """Or parameters of the student as a fraction of the teacher's, spread over the MLPs by what each
    further hidden unit gains."""
    round_to: Annotated[int, Field(ge=1)] = 1
    """Widths are rounded up to a multiple of it, at most to the dense width."""
    include_pool_head: bool = True
    """Prune the MLP of an attention-pool head too; plain timm loads the student only if so."""
    compensate: Literal["least_squares", "none"] = "least_squares"
    """Refit fc2 on calibration activations, or only slice it."""
    sequential: bool = False
    """Refit block after block, on the inputs that the student itself gives, instead of the teacher's."""
    ridge: Annotated[float, Field(gt=0)] | None = None
    """Strength of the refit's ridge, as a multiple of the kept units' mean variance; null: the one
    with the lowest error on held-out calibration images, for each MLP."""

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        widths = {
            name: getattr(self, name) for name in ("ratio", "keep", "hidden_features", "budget")
        }
        given = [name for name, value in widths.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"prune needs exactly one of {', '.join(widths)}"
                f" ({', '.join(given) if given else 'none'} given)"
            )
        if self.ratio is not None and self.ratio > self.max_ratio:
            raise ValueError(
                f"prune.ratio {self.ratio} must not exceed prune.max_ratio {self.max_ratio}"
            )
        if self.sequential and self.compensate == "none":
            raise ValueError("prune.sequential needs prune.compensate: least_squares")
        return self


class LossWeights(Section):
    """Weights of the loss terms, each a mean squared error to the teacher."""

    pooled: Annotated[float, Field(ge=0)] = 1.0
    """Class-token or pooled output."""
    patch_tokens: Annotated[float, Field(ge=0)] = 1.0
    """Patch tokens of the last block."""
    blocks: Annotated[float, Field(ge=0)] = 0.0
    """Output tokens of the blocks in ``features.blocks``, their mean."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.pooled == self.patch_tokens == self.blocks == 0:
            raise ValueError("loss: pooled, patch_tokens and blocks must not all be 0")
        return self


def _check_ordered(first_and_last: tuple[int, int]) -> tuple[int, int]:
    if first_and_last[0] > first_and_last[1]:
        raise ValueError(f"blocks must be [first, last], not {list(first_and_last)}")
    return first_and_last


Blocks = Annotated[
    tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], AfterValidator(_check_ordered)
]
"""The first and the last of some blocks, counted from 0."""


class OnlyBlocks(Section):
    """A range of blocks."""

    blocks: Blocks
    """``[first, last]``, counted from 0."""


def _kind_of_train(value: Any) -> str:
    return "<blocks>" if isinstance(value, dict | OnlyBlocks) else "<name>"


# The tags choose which of the two a wrong value is told to be; they are no part of its key.
Train = Annotated[
    Annotated[Literal["mlp", "mlp+norm", "all"], Tag("<name>")]
    | Annotated[OnlyBlocks, Tag("<blocks>")],
    Discriminator(_kind_of_train),
]


class StagePrune(Section):
    """Which blocks shrink before a stage begins, for a reduction in steps."""

    ratio: Annotated[float, Field(gt=0)]
    """Hidden units kept, as a multiple of the embed dim: ``int(ratio * dim)``; rounded and compensated
    as the section ``prune`` says, on the stage's own parent."""
    blocks: Blocks | None = None
    """``[first, last]``, counted from 0; null: all."""


class Stage(Section):
    """One stage of distillation; it starts from what the stage before it left."""

    prune: StagePrune | None = None
    """What is pruned further before the stage begins; null: nothing."""
    train: Train
    """Parameters that learn: those of the MLPs, of MLPs and norms, all, or all of ``{blocks: [a, b]}``."""
    loss: LossWeights = LossWeights()
    samples: Annotated[int, Field(ge=1)]
    """(sample, view) pairs seen."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Images a step, of all processes together."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Passes in which a process works through its images of a step, to save memory."""
    grad_checkpointing: bool = False
    """Keep no activations of a block for the backward pass, but compute them again, to save memory."""
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate of AdamW."""
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the end of the cosine."""
    warmup: Fraction = 0.1
    """Part of the stage in which the learning rate rises linearly from 0."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.04
    """Of AdamW."""
    decay_all: bool = False
    """Biases, the scales of norms and position embeddings decay too."""
    end_weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay at the end of a cosine; null: it stays as it is."""
    clip_grad: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm; null: no clipping."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay, per step, of the weights' exponential moving average, which the stage leaves; null: it
    leaves the last weights."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the student's forward pass (autocast); weights and optimizer stay in float32."""
    seed: int = 0
    """Of the order of the samples, and of dropout where the model has it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.samples < self.batch_size:
            raise ValueError(
                f"samples {self.samples} must be at least one batch_size {self.batch_size}"
            )
        if self.end_weight_decay is not None and not self.weight_decay:
            raise ValueError("end_weight_decay needs a weight_decay above 0 to begin with")
        return self


class Running(Section):
    """How stages are run; none of it changes what comes out."""

    max_bad_steps: Annotated[int, Field(ge=0)] = 10
    """Steps of a stage that may be skipped for a loss or gradient that is no finite number."""
    checkpoint_every_s: Annotated[int, Field(ge=0)] = 300
    """Seconds between training checkpoints; 0: after every step."""
    processes: Annotated[int, Field(ge=1)] = 1
    """Processes on a machine without GPUs; with them, there is one for every GPU of the job."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that load images, for each that trains; null: one for every four of its threads."""
    shard_above: Annotated[int, Field(ge=0)] = 1_000_000_000
    """Parameters above which several processes share a model's weights (FSDP) instead of each
    holding them all (DDP)."""


class Distill(Running):
    """Stages of distillation, in this order, and how they are run."""

    stages: Annotated[dict[StageName, Stage], Field(min_length=1)]
    """By name, which is also that of the stage's results."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        for name in RESERVED_MODELS:
            if name in self.stages:
                raise ValueError(
                    f"distill.stages.{name}: choose another name, {', '.join(RESERVED_MODELS)} are taken"
                )
        return self


class Evaluate(Section):
    """How models are compared."""

    batch_size: Annotated[int, Field(ge=1)] = 128
    """Images a forward pass."""
    speed_batch_size: Annotated[int, Field(ge=1)] = 64
    """Images a forward pass when speed is measured."""
    speed_repeats: Annotated[int, Field(ge=1)] = 10
    """Timed passes of each model, models in turn; the median counts."""


class Mlflow(Section):
    """Where the metrics are logged."""

    tracking_uri: str | None = "sqlite:///mlflow.db"
    """MLflow store; a relative SQLite path is relative to the working folder; null: no logging."""
    experiment: Annotated[str, Field(min_length=1)] = "dgmr"
    """Name of the MLflow experiment that the runs belong to."""


class Params(Section):
    """The whole of ``params.yaml``."""

    teacher: Teacher
    data: Data
    features: Features = Features()
    prune: Prune
    distill: Distill
    evaluate: Evaluate = Evaluate()
    sweep: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    """Values to try of keys of ``prune`` and of ``distill.stages``, such as ``prune.ratio: [2, 1, 0.5]``:
    every combination is a run of its own, under ``results/sweep``."""
    mlflow: Mlflow = Mlflow()

    def shaping(self) -> dict[str, Any]:
        """All that shapes what the run itself gives, as JSON: not how stages are run, where is logged,
        or what else is tried."""
        return self.model_dump(
            mode="json",
            exclude={"mlflow": True, "sweep": True, "distill": set(Running.model_fields)},
        )

    def values(self, names: Iterable[str]) -> dict[str, Any]:
        """The values of keys with dotted ``names``, as JSON."""
        shaping = self.shaping()
        return {
            name: functools.reduce(lambda section, part: section[part], name.split("."), shaping)
            for name in names
        }

    def combinations(self) -> dict[str, dict[str, Any]]:
        """Every combination of the values in ``sweep``, by a name that tells them.

        Raises:
            ValueError: two have the same name.
        """
        found: dict[str, dict[str, Any]] = {}
        for values in itertools.product(*self.sweep.values()) if self.sweep else ():
            tried = dict(zip(self.sweep, values, strict=True))
            name = _name_of_point(tried)
            if name in found:
                raise ValueError(f"sweep: two points would be called {name}: give each value once")
            found[name] = tried
        return found

    def points(self) -> dict[str, "Params"]:
        """The params of every combination of the values in ``sweep``, by its name.

        Raises:
            ValueError: a key is not to be swept, a combination is not allowed, or two are the same.
        """
        found: dict[str, Params] = {}
        names: dict[str, str] = {}
        for point, tried in self.combinations().items():
            values = self.model_dump(mode="json", exclude={"sweep"})
            for name, value in tried.items():
                _set(values, name, copy.deepcopy(value))
            told = ", ".join(f"{name}: {_told(value)}" for name, value in tried.items())
            try:
                found[point] = params = Params.model_validate(values)
            except ValidationError as error:
                sentences = _sentences(error, Params, f"sweep ({told})")
                raise ValueError(sentences.rstrip(".")) from None
            if (same := names.setdefault(params.model_dump_json(), point)) != point:
                raise ValueError(
                    f"sweep: the points {same} and {point} are the same run: give each value once"
                )
        return found

    @model_validator(mode="after")
    def _enough_to_hold_out(self) -> Self:
        if self.prune.compensate == "least_squares" and self.features.calibration.samples < 8:
            raise ValueError(
                "features.calibration.samples must be at least 8 for prune.compensate: least_squares,"
                f" which holds every eighth out ({self.features.calibration.samples} given)"
            )
        return self

    @model_validator(mode="after")
    def _asked_for(self) -> Self:
        for name, stage in self.distill.stages.items():
            if stage.loss.patch_tokens and self.features.patch_tokens is None:
                raise ValueError(
                    f"distill.stages.{name}.loss.patch_tokens is {stage.loss.patch_tokens:g}, but"
                    " features.patch_tokens is null: ask for them, or give the loss a weight of 0"
                )
            if stage.loss.blocks and not self.features.blocks:
                raise ValueError(
                    f"distill.stages.{name}.loss.blocks is {stage.loss.blocks:g}, but"
                    " features.blocks names none: name some, or give the loss a weight of 0"
                )
            if stage.prune is not None and stage.prune.ratio > self.prune.max_ratio:
                raise ValueError(
                    f"distill.stages.{name}.prune.ratio {stage.prune.ratio:g} must not exceed"
                    f" prune.max_ratio {self.prune.max_ratio:g}"
                )
        return self

    @model_validator(mode="after")
    def _sweepable(self) -> Self:  # last, so that what is wrong without a sweep is told as such
        self.points()
        return self


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    """Set what a dotted ``name`` of the section ``sweep`` stands for."""
    *sections, last = name.split(".")
    place: Any = values
    for section in sections:
        place = place.get(section) if isinstance(place, dict) else None
    # All runs have the same stages, so a stage is no value to try.
    is_of_a_stage = sections[:2] == ["distill", "stages"] and len(sections) > 2
    if not (sections[0:1] == ["prune"] or is_of_a_stage) or not isinstance(place, dict):
        raise ValueError(
            f"sweep.{name}: what can be swept are the keys of prune and of distill.stages.<stage>,"
            " of a section that is null the whole"
        )
    place[last] = value


def _name_of_point(tried: dict[str, Any]) -> str:
    """As a folder's name: ``ratio-0.5_all.lr-0.001``."""
    name = "_".join(
        f"{short_name(key)}-{re.sub(r'[^0-9A-Za-z.+-]+', '-', _told(value)).strip('-')}"
        for key, value in tried.items()
    )
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 13]}-{fingerprint.key(_told(tried))}"


def short_name(name: str) -> str:
    """A key of ``sweep`` without what all of them begin with: ``ratio``, ``all.lr``."""
    return name.removeprefix("prune.").removeprefix("distill.stages.")


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def validate(values: dict[str, Any], source: str = "params.yaml") -> Params:
    """Typed params from the parsed YAML.

    Raises:
        DgmrError: one sentence for each wrong key: its name, its value and what is allowed.
    """
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise DgmrError(_sentences(error, Params, source)) from None


def read(path: Path) -> Params:
    """Typed params of a file.

    Raises:
        DgmrError: the file is missing, is no YAML mapping, or has a wrong key or value.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DgmrError(f"{path} cannot be read as YAML: {error}.") from None
    if not isinstance(values, dict):
        raise DgmrError(f"{path} must be a mapping of sections ({', '.join(Params.model_fields)}).")
    return validate(values, str(path))


def section(kind: type[SectionT], text: str) -> SectionT:
    """A section from its JSON, as rules pass it, or from a params file (by hand).

    Raises:
        DgmrError: the text is neither, or a value is not allowed.
    """
    if text.endswith((".yaml", ".yml")):
        found = read(Path(text))
        for candidate in (found, *(getattr(found, name) for name in Params.model_fields)):
            if isinstance(candidate, kind):
                return candidate
        raise DgmrError(f"{text}: a {kind.__name__} must be given as JSON, not as a params file.")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise DgmrError(_sentences(error, kind, f"{kind.__name__.lower()} config")) from None


def schema() -> dict[str, Any]:
    """JSON schema of ``params.yaml``, for editors; ``workflow/schemas`` holds a copy."""
    return Params.model_json_schema()


def _sentences(error: ValidationError, kind: type[BaseModel], source: str) -> str:
    return "\n".join(_sentence(detail, kind, source) for detail in error.errors())


def _sentence(detail: Any, kind: type[BaseModel], source: str) -> str:
    location = [part for part in detail["loc"] if not str(part).startswith(("[", "<"))]
    key = ".".join(map(str, location))
    if detail["type"] == "extra_forbidden":
        allowed = _keys_beside(kind, location)
        near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        guess = f" (did you mean {near[0]}?)" if near else ""
        return f"{source}: unknown key {key}{guess}; allowed here: {', '.join(allowed)}."
    if detail["type"] == "missing":
        return f"{source}: {key} is missing; it has no default."
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{source}: {key}: {message}." if key else f"{source}: {message}."
    return f"{source}: {key or 'its text'} is {json.dumps(detail['input'], default=str)}: {_lower(message)}."


def _lower(message: str) -> str:
    return message[0].lower() + message[1:]


def _keys_beside(kind: type[BaseModel], location: list[int | str]) -> list[str]:
    """Names allowed where the unknown key at ``location`` stands."""
    parts = iter(location[:-1])
    for part in parts:
        annotation = kind.model_fields[str(part)].annotation
        if typing.get_origin(annotation) is dict:
            next(parts)  # a name the user chose; all values are of one kind
        kind = next(_sections_in(annotation))
    return list(kind.model_fields)


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _sections_in(inner)
