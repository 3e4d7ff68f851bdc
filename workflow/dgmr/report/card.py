"""The model card: ``README.md`` of the exported student, as model hubs show it."""

from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import yaml

import dgmr
from dgmr.artefact import CONFIG, LOADER
from dgmr.files import read_json
from dgmr.report.metrics import PRUNED, TEACHER, Results, Row

CARD = "README.md"
# Of timm's licences, those that the hub knows by name; it refuses a card with another one.
_HUB_LICENCES = frozenset(
    {
        "apache-2.0",
        "apple-amlr",
        "apple-ascl",
        "bsd-3-clause",
        "cc-by-4.0",
        "cc-by-nc-4.0",
        "gemma",
        "mit",
    }
)


def render(found: Results, params: dict[str, Any], figures: list[list[str]]) -> str:
    """The card's Markdown, with the YAML block in front that hubs read.

    Args:
        found: what the rooms saved.
        params: the resolved ones.
        figures: the rows of the table of figures, as shown; the first has the titles.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["count"] = "{:,}".format
    pruned = found.provenance[PRUNED]
    teacher = params["teacher"]["model"]
    licence = _licence(found)
    return environment.get_template("card.md.jinja").render(
        front_matter=yaml.safe_dump(
            _front_matter(found, teacher, licence), sort_keys=False, allow_unicode=True
        ),
        teacher=teacher,
        licence=licence,
        architecture=_config(found)["architecture"],
        has_classifier=_has_classifier(found),
        needs_loader=(found.folders[found.last_stage] / LOADER).is_file(),
        widths=_widths(found.blocks),
        units={
            name: sum(block[key] for block in found.blocks.values())
            for name, key in (("before", "hidden_features"), ("after", "kept"))
        },
        method=pruned.get("method"),
        compensate=pruned.get("compensate"),
        stages={name: rows[-1]["samples"] for name, rows in found.histories.items()},
        data=params["data"],
        samples=found.data["samples"],
        figures=figures,
        evaluation=found.models[TEACHER],
        speed=found.speed,
        sha256=found.provenance[found.last_stage]["sha256"],
        version=dgmr.__version__,
    )


def _front_matter(found: Results, teacher: str, licence: str | None) -> Row:
    known = licence in _HUB_LICENCES
    return {
        "license": licence if known else "other",
        **({} if known or licence is None else {"license_name": licence}),
        "library_name": "timm",
        "pipeline_tag": (
            "image-classification" if _has_classifier(found) else "image-feature-extraction"
        ),
        "tags": ["timm", "vision-transformer", "pruning", "distillation", "dgmr"],
        "base_model": teacher.removeprefix("hf-hub:"),
    }


def _licence(found: Results) -> str | None:
    """What the teacher's ``pretrained_cfg`` states; None where it states none."""
    stated = _config(found).get("pretrained_cfg", {}).get("license")
    return None if stated in (None, "", "unknown") else str(stated)


def _config(found: Results) -> Row:
    return read_json(found.folders[TEACHER] / CONFIG)


def _has_classifier(found: Results) -> bool:
    return "top1" in found.models[TEACHER]


def _widths(blocks: dict[str, Row]) -> list[Row]:
    """Runs of MLPs of one width: the first and last name, how many, hidden units before and after."""
    runs = groupby(blocks.items(), key=lambda item: (item[1]["hidden_features"], item[1]["kept"]))
    found = []
    for (before, after), run in runs:
        names = [name for name, _ in run]
        found.append(
            {
                "first": names[0],
                "last": names[-1],
                "count": len(names),
                "before": before,
                "after": after,
            }
        )
    return found
