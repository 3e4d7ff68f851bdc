"""Every knob of ``params.yaml``: types, defaults, allowed values. Unknown keys are refused.

Importing this module is cheap (no torch), so a bad file is told at parse time.
"""

import difflib
import json
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from dgmr.errors import DgmrError

Fraction = Annotated[float, Field(ge=0, le=1)]
SectionT = typing.TypeVar("SectionT", bound="Section")
StageName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]*$")]
RESERVED_MODELS = ("teacher", "pruned", "student", "speed")


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
        groups = range(0, len(self.shards), self.shards_per_job)
        return {
            f"{job:05d}": self.shards[start : start + self.shards_per_job]
            for job, start in enumerate(groups)
        }


class Views(Section):
    """Random crops and flips of an image: a pure function of (seed, sample key, view)."""

    count: Annotated[int, Field(ge=1)] = 1
    """Views of a sample."""
    seed: int = 0
    """Of the crops and flips."""
    crop_scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (
        0.2,
        1.0,
    )
    """Area of the crop as a fraction of the image, smallest and largest."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""

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
    """What the frozen teacher says of the images."""

    views: Views = Views()
    calibration: Calibration = Calibration()
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the targets on disk."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Images a forward pass."""


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

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.pooled == self.patch_tokens == 0:
            raise ValueError("loss: pooled and patch_tokens must not both be 0")
        return self


class Stage(Section):
    """One stage of distillation; it starts from what the stage before it left."""

    train: Literal["mlp", "all"]
    """Parameters that learn: those of the MLPs, or all."""
    samples: Annotated[int, Field(ge=1)]
    """(sample, view) pairs seen."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Images a step."""
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate of AdamW."""
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the end of the cosine."""
    warmup: Fraction = 0.1
    """Part of the stage in which the learning rate rises linearly from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.04
    """Of AdamW; biases and the scales of norms do not decay."""
    clip_grad: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm; null: no clipping."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the student's forward pass (autocast); weights and optimizer stay in float32."""
    loss: LossWeights = LossWeights()
    seed: int = 0
    """Of the order of the samples."""

    @model_validator(mode="after")
    def _at_least_a_step(self) -> Self:
        if self.samples < self.batch_size:
            raise ValueError(
                f"samples {self.samples} must be at least one batch_size {self.batch_size}"
            )
        return self


class Distill(Section):
    """Stages of distillation, in this order."""

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
    mlflow: Mlflow = Mlflow()

    @model_validator(mode="after")
    def _enough_to_hold_out(self) -> Self:
        if self.prune.compensate == "least_squares" and self.features.calibration.samples < 8:
            raise ValueError(
                "features.calibration.samples must be at least 8 for prune.compensate: least_squares,"
                f" which holds every eighth out ({self.features.calibration.samples} given)"
            )
        return self


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
    key = ".".join(str(part) for part in detail["loc"] if part != "[key]")
    if detail["type"] == "extra_forbidden":
        allowed = _keys_beside(kind, detail["loc"])
        near = difflib.get_close_matches(str(detail["loc"][-1]), allowed, n=1)
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


def _keys_beside(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names allowed where the unknown key at ``location`` stands."""
    parts = iter(location[:-1])
    for part in parts:
        annotation = kind.model_fields[str(part)].annotation
        if typing.get_origin(annotation) is dict:
            next(parts)  # a name the user chose; all values are of one kind
        candidates = [annotation, *typing.get_args(annotation)]
        kind = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(kind.model_fields)
