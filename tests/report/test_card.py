"""The student's model card: hubs can read it, and its numbers are those of the saved files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from report.test_report import EVALUATIONS, PARAMS, SPEEDS, change, headless, made, write

BLOCKS = {"blocks.0.mlp": (768, 96), "blocks.1.mlp": (768, 96), "blocks.2.mlp": (1024, 300)}


def card(results: Path, params: dict[str, Any] = PARAMS) -> str:
    made(results, params)
    return (results / "student/README.md").read_text(encoding="utf-8")


def front(text: str) -> dict[str, Any]:
    """What a hub reads."""
    empty, block, _ = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(block)


def table(text: str, heading: str) -> list[list[str]]:
    """Rows of the table below a heading, without the rule."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    titles, _, *others = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in (titles, *others)]


def licensed(results: Path, licence: str | None) -> None:
    pretrained = {} if licence is None else {"license": licence}
    change(results / "teacher/config.json", pretrained_cfg=pretrained)


def test_front_matter_is_what_hubs_read(results: Path) -> None:
    licensed(results, "apache-2.0")
    assert front(card(results)) == {
        "license": "apache-2.0",
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["timm", "vision-transformer", "pruning", "distillation", "dgmr"],
        "base_model": "vit_demo",
    }


def test_base_model_is_a_name_that_yaml_keeps(results: Path) -> None:
    for model, named in {"hf-hub:org/vit": "org/vit", "a: 'b' # c": "a: 'b' # c"}.items():
        text = card(results, PARAMS | {"teacher": {"model": model}})
        assert front(text)["base_model"] == named
        assert f"- **Teacher:** `{model}`" in text


@pytest.mark.parametrize(
    ("stated", "license", "name"),
    [
        ("mit", "mit", None),
        ("dinov3-license", "other", "dinov3-license"),  # one that the hub does not know
        ("unknown", "other", None),
        (None, "other", None),
    ],
)
def test_licence_is_the_teacher_s(
    results: Path, stated: str | None, license: str, name: str | None
) -> None:
    licensed(results, stated)
    text = card(results)
    found = front(text)
    assert (found["license"], found.get("license_name")) == (license, name)
    assert ("the teacher's configuration states none" in text) == (stated in (None, "unknown"))
    assert (f"**Licence:** `{stated}`" in text) == (stated not in (None, "unknown"))


def test_a_config_without_pretrained_cfg_states_no_licence(results: Path) -> None:
    assert "the teacher's configuration states none" in card(results)


def test_figures_are_those_of_the_metrics(results: Path) -> None:
    titles, *rows = table(card(results), "Figures")
    assert titles == [
        *("model", "Top-1, %", "Top-5, %", "Same top-1, %", "Feature MSE", "Cosine"),
        *("Params, M", "GFLOPs", "Images/s"),
    ]
    flat = json.loads((results / "metrics.json").read_text())
    metrics = ("top1", "top5", "same_top1", "feature_mse", "cosine", "params", "flops")
    units = {"params": 1e6, "flops": 1e9}
    assert [row[0] for row in rows] == ["teacher", "pruned", "student"]
    for model, *cells in rows:
        for metric, cell in zip((*metrics, "images_per_s"), cells, strict=True):
            value = flat.get(f"{model}.{metric}")
            if value is None:
                assert model == "teacher" and cell == "–"
            else:
                assert float(cell) == pytest.approx(value / units.get(metric, 1), rel=5e-3)


def test_every_number_moves_with_its_file(results: Path) -> None:
    """The table of figures and all counts, after every value in the files has changed."""
    before = card(results)
    for name, values in EVALUATIONS.items():
        moved = {key: value * 0.875 for key, value in values.items()} | {"samples": 7_654}
        moved |= {"params": 3_210_000, "flops": 43_200_000}
        change(results / f"evaluate/{name}.json", **moved)
    speeds = {name: 3 * value for name, value in SPEEDS.items()}
    change(
        results / "evaluate/speed.json", images_per_s=speeds, threads=5, batch_size=17, repeats=3
    )
    change(results / "data/metrics.json", samples=8_642)
    history = json.loads((results / "distill/full/history.json").read_text())
    write(results / "distill/full/history.json", history[:2])
    write(
        results / "prune/blocks.json",
        {
            name: {"hidden_features": dense, "kept": kept, "gains": [1.0] * dense}
            for name, (dense, kept) in BLOCKS.items()
        },
    )
    after = card(results)
    for old, new in zip(table(before, "Figures")[1:], table(after, "Figures")[1:], strict=True):
        assert all(a != b or a == "–" for a, b in zip(old[1:], new[1:], strict=True))
    for old, new in {
        "10,000 labelled images": "7,654 labelled images",
        "median of 10 passes of 64 images": "median of 3 passes of 17 images",
        "(2 CPU threads)": "(5 CPU threads)",
        "9,900 training images": "8,642 training images",
        "`full` (20,000 samples)": "`full` (8,000 samples)",
        "without 2,016 of the\n2,304 hidden units": "without 2,068 of the\n2,560 hidden units",
    }.items():
        assert old in before and old not in after and new in after


def test_widths_are_told_by_runs_of_equal_mlps(results: Path) -> None:
    assert table(card(results), "What it is")[1:] == [
        ["`blocks.0.mlp` to `blocks.2.mlp` (3)", "768", "96"],
        ["all", "2,304", "288"],
    ]
    blocks = json.loads((results / "prune/blocks.json").read_text())
    blocks["blocks.1.mlp"]["kept"] = 100
    write(results / "prune/blocks.json", blocks)
    assert table(card(results), "What it is")[1:] == [
        ["`blocks.0.mlp`", "768", "96"],
        ["`blocks.1.mlp`", "768", "100"],
        ["`blocks.2.mlp`", "768", "96"],
        ["all", "2,304", "292"],
    ]


def test_method_compensation_and_stages_are_told_where_they_are_known(results: Path) -> None:
    text = card(results)
    assert "Compensation" not in text and "chosen by" not in text
    assert "- **Stages of distillation:** `mlp` (5,000 samples), `full` (20,000 samples)\n" in text
    change(results / "prune/provenance.json", method="gram_schmidt", compensate="least_squares")
    text = card(results)
    assert "chosen by `gram_schmidt`, and" in text
    assert "- **Compensation:** `least_squares`; the second layer of the MLPs was refitted" in text
    change(results / "prune/provenance.json", compensate="none")
    assert "- **Compensation:** none; the second layer of the MLPs was sliced" in card(results)


def test_a_student_of_one_width_loads_in_plain_timm(results: Path) -> None:
    text = card(results)
    assert 'timm.create_model("local-dir:path/to/this/folder", pretrained=True).eval()' in text
    assert "features_only=True" in text
    assert "loader" not in text


def test_a_student_of_several_widths_loads_with_its_loader(results: Path) -> None:
    (results / "distill/full/loader.py").write_text("def load(folder): ...")
    text = card(results)
    assert "from loader import load" in text
    assert "features_only" not in text and "pretrained=True" not in text
    assert (results / "student/loader.py").exists()


def test_code_on_the_card_is_python(results: Path) -> None:
    for _ in range(2):
        snippets = re.findall(r"^```python\n(.*?)^```$", card(results), re.MULTILINE | re.DOTALL)
        assert len(snippets) >= 2
        for snippet in snippets:
            compile(snippet, "card", "exec")
        (results / "distill/full/loader.py").touch()


def test_a_model_without_classifier_has_no_accuracies(results: Path) -> None:
    headless(results)
    text = card(results)
    assert front(text)["pipeline_tag"] == "image-feature-extraction"
    assert "it has no classifier" in text and "It classifies" not in text
    titles, *rows = table(text, "Figures")
    assert titles == ["model", "Feature MSE", "Cosine", "Params, M", "GFLOPs", "Images/s"]
    assert rows[2] == ["student", "0.0120", "0.9800", "1.00", "0.0200", "240"]


def test_data_names_its_source(results: Path) -> None:
    assert "Source: `fashion-mnist`.\n" in card(results)
    source = {"source": "table", "table": "/data/part-*.parquet"}
    text = card(results, PARAMS | {"data": source})
    assert "Source: images of the table `/data/part-*.parquet`.\n" in text
    assert "without labels" in text


def test_card_has_its_sections_and_citations(results: Path) -> None:
    text = card(results)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        *("What it is", "How to load it", "Data", "Figures", "Limits", "Citation"),
    ]
    assert text.count("2506.08591") == 4
    assert "@software{dgmr," in text
    about = json.loads((results / "distill/full/provenance.json").read_text())
    assert about["sha256"] in text
    assert "{%" not in text and "None" not in text and not re.search(r"\n{3,}", text)
