"""The report, on a hand-written results folder: no model is built, no image read."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from dgmr.errors import DgmrError
from dgmr.report import page
from dgmr.report.metrics import read
from dgmr.report.page import report

STAGES = ["mlp", "full"]
PARAMS = {
    "teacher": {"model": "vit_demo"},
    "data": {"source": "fashion-mnist"},
    "prune": {"ratio": 1.0},
    "views": (0.2, 1.0),
}
ACCURACIES = ("top1", "top5", "same_top1")
EVALUATIONS: dict[str, dict[str, Any]] = {
    "teacher": {"top1": 90.5, "top5": 99.5, "params": 4_000_000, "flops": 80_000_000},
    "pruned": {"top1": 71.25, "top5": 97.5, "same_top1": 72.5, "feature_mse": 0.51, "cosine": 0.7},
    "mlp": {"top1": 88.0, "top5": 99.0, "same_top1": 93.5, "feature_mse": 0.021, "cosine": 0.97},
    "full": {"top1": 89.3, "top5": 99.25, "same_top1": 95.5, "feature_mse": 0.012, "cosine": 0.98},
}
SPEEDS = {"teacher": 100.0, "pruned": 250.0, "mlp": 250.0, "full": 240.0}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def change(path: Path, **values: Any) -> None:
    write(path, json.loads(path.read_text()) | values)


def history(samples: int, start: float) -> list[dict[str, float]]:
    """Five rows of a falling loss."""
    return [
        {
            "step": row * 10,
            "samples": row * samples // 5,
            "lr": 1e-3 / row,
            "loss": start / row,
            "pooled": 0.25 * start / row,
            "patch_tokens": 0.75 * start / row,
            "images_per_s": 80.0,
        }
        for row in range(1, 6)
    ]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_chain(tmp_path / "results")


def write_chain(results: Path) -> Path:
    """A finished chain of two stages."""
    folders = {
        "teacher": results / "teacher",
        "pruned": results / "prune",
        "mlp": results / "distill/mlp",
        "full": results / "distill/full",
    }
    parent = None
    hashes: dict[str, str] = {}
    for model, folder in folders.items():
        weights = f"weights of {model}".encode()
        sha256 = hashlib.sha256(weights).hexdigest()
        about = {"stage": model, "sha256": sha256, "skipped_steps": len(model)}
        write(folder / "provenance.json", about | ({"parent_sha256": parent} if parent else {}))
        write(folder / "config.json", {"architecture": "vit_demo"})
        (folder / "model.safetensors").write_bytes(weights)
        parent = sha256
        size = {"params": 1_000_000, "flops": 20_000_000}
        hashes[model] = sha256
        about = {"sha256": sha256, "teacher_sha256": hashes["teacher"], "samples": 10_000}
        found = {"model": model} | about | size | EVALUATIONS[model]
        write(results / "evaluate" / f"{model}.json", found)
    write(
        results / "evaluate/speed.json",
        {"device": "cpu", "threads": 2, "batch_size": 64, "repeats": 10}
        | {"images_per_s": SPEEDS, "sha256": hashes},
    )
    write(folders["mlp"] / "history.json", history(5000, 0.5))
    write(folders["full"] / "history.json", history(20_000, 0.05))
    write(
        results / "prune/blocks.json",
        {
            f"blocks.{index}.mlp": {
                "hidden_features": 768,
                "kept": 96,
                "gains": [(2.0 - i / 96) ** 2 for i in range(192)],
                "error_plain": 0.4 + index,
                "error_refit": 0.01 * (1 + index),
                "ridge": 1e-4,
            }
            for index in range(3)
        },
    )
    write(
        results / "data/metrics.json",
        {
            "samples": 9_900,
            "table": {
                "rows": 60_000,
                "url not file": 7,
                "unsafe or unjudged": 11_111,
                "selected": 10_000,
            },
            "images": {"ok": 9_900, "broken image": 100},
        },
    )
    return results


def headless(results: Path) -> None:
    """Take from the evaluations what models without a classifier lack."""
    for file in (results / "evaluate").glob("*.json"):
        values = json.loads(file.read_text())
        write(file, {key: value for key, value in values.items() if key not in ACCURACIES})


def made(results: Path, params: dict[str, Any] = PARAMS) -> str:
    """The page's HTML."""
    report(results, STAGES, params, results, results)
    return (results / "report.html").read_text(encoding="utf-8")


def text(html: str) -> str:
    """What a reader sees, in one line."""
    seen = re.sub(r"<(style|svg).*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", seen).split())


def test_metrics_are_flat_and_compare_the_student_with_the_teacher(results: Path) -> None:
    made(results)
    flat = json.loads((results / "metrics.json").read_text())
    assert flat["teacher.top1"] == 90.5
    assert flat["pruned.feature_mse"] == 0.51
    assert flat["mlp.images_per_s"] == 250.0
    student = {key.split(".")[1]: flat[key] for key in flat if key.startswith("student.")}
    assert student == EVALUATIONS["full"] | {
        "params": 1_000_000,
        "flops": 20_000_000,
        "images_per_s": 240.0,
    }
    assert flat["reduction.params"] == 0.75
    assert flat["reduction.flops"] == 0.75
    assert flat["speedup.images_per_s"] == 2.4
    assert flat["distill.skipped_steps"] == len("mlp") + len("full")
    assert "teacher.cosine" not in flat
    assert all(isinstance(value, int | float) for value in flat.values())


def test_curves_count_samples_over_the_stages(results: Path) -> None:
    made(results)
    rows = json.loads((results / "curves.json").read_text())
    assert [row["samples"] for row in rows] == [
        *(1000, 2000, 3000, 4000, 5000),
        *(9000, 13_000, 17_000, 21_000, 25_000),
    ]
    assert [row["stage"] for row in rows] == ["mlp"] * 5 + ["full"] * 5
    assert set(rows[0]) == {"stage", "step", "samples", "lr", "loss", "pooled", "patch_tokens"}
    assert rows[5]["step"] == 10 and rows[5]["loss"] == 0.05


def test_curves_have_the_terms_that_a_stage_had(results: Path) -> None:
    rows = history(20_000, 0.05)
    for row in rows:
        row["blocks"] = row.pop("patch_tokens")
    write(results / "distill/full/history.json", rows)
    made(results)
    curves = json.loads((results / "curves.json").read_text())
    assert "blocks" not in curves[0] and "patch_tokens" not in curves[5]
    assert curves[5]["blocks"] == rows[0]["blocks"]
    assert '<span class="key blocks">blocks</span>' in (results / "report.html").read_text()


def test_student_is_the_last_stage_and_shares_no_bytes_with_it(results: Path) -> None:
    (results / "student").mkdir()
    (results / "student/left.txt").write_text("of a former run")
    made(results)
    stage = {file.name: file.read_bytes() for file in (results / "distill/full").iterdir()}
    student = {file.name: file.read_bytes() for file in (results / "student").iterdir()}
    assert student.pop("README.md")
    assert student == stage
    with (results / "student/model.safetensors").open("ab") as file:
        file.write(b"changed by its user")
    assert (results / "distill/full/model.safetensors").read_bytes() == b"weights of full"


@pytest.mark.parametrize("model", ["teacher", "pruned", "mlp", "full"])
def test_evaluation_of_other_weights_is_refused(results: Path, model: str) -> None:
    change(results / "evaluate" / f"{model}.json", sha256="0" * 64)
    with pytest.raises(
        DgmrError, match=rf"evaluate/{model}\.json is about other .* snakemake again"
    ):
        made(results)
    assert not (results / "report.html").exists()
    assert not (results / "metrics.json").exists()


def test_stage_made_from_other_weights_is_refused(results: Path) -> None:
    change(results / "distill/full/provenance.json", parent_sha256="0" * 64)
    with pytest.raises(DgmrError, match=r"distill/full was not made from .*distill/mlp"):
        made(results)


def test_stage_that_pruned_first_is_followed_to_the_stage_before(results: Path) -> None:
    weights = b"weights pruned again"
    sha256 = hashlib.sha256(weights).hexdigest()
    between = results / "distill/pruned/full"
    parent = json.loads((results / "distill/full/provenance.json").read_text())["parent_sha256"]
    write(between / "provenance.json", {"sha256": sha256, "parent_sha256": parent})
    write(between / "config.json", {"architecture": "vit_demo"})
    (between / "model.safetensors").write_bytes(weights)
    made(results)  # what an earlier run left in between means nothing

    change(results / "distill/full/provenance.json", parent_sha256=sha256)
    made(results)
    change(results / "distill/full/provenance.json", parent_sha256="0" * 64)
    with pytest.raises(DgmrError, match=r"distill/full was not made from .*distill/mlp"):
        made(results)
    change(results / "distill/full/provenance.json", parent_sha256=sha256)
    change(between / "provenance.json", parent_sha256="0" * 64)
    with pytest.raises(DgmrError, match=r"distill/full was not made from .*distill/mlp"):
        made(results)


def test_damaged_student_is_refused_and_not_exported(results: Path) -> None:
    (results / "distill/full/model.safetensors").write_bytes(b"cut sho")
    with pytest.raises(DgmrError, match="is not the file"):
        made(results)
    assert not (results / "student").exists()


def test_missing_file_and_missing_speed_are_told(results: Path) -> None:
    change(results / "evaluate/speed.json", sha256={"teacher": "0"})
    with pytest.raises(DgmrError, match=r"speed\.json is about other weights"):
        made(results)
    (results / "evaluate/speed.json").unlink()
    with pytest.raises(DgmrError, match=r"speed\.json is missing"):
        made(results)


def test_all_of_it_or_nothing(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> str:
        raise RuntimeError

    monkeypatch.setattr(page, "render", fail)
    with pytest.raises(RuntimeError):
        made(results)
    written = {"metrics.json", "curves.json", "student", "report.html"}
    assert not written & {path.name for path in results.iterdir()}


def test_page_tells_the_outcome_in_numbers(results: Path) -> None:
    seen = text(made(results))
    assert (
        "keeps 25% of the teacher’s parameters and 25% of its FLOPs, runs 2.4 times as fast,"
        " and loses 1.20 points of top-1 accuracy: 89.30% against 90.50%."
    ) in seen
    assert "it scored 71.25%; 25,000 samples of distillation brought it to 89.30%" in seen
    assert (
        "full the student 89.30 −1.20 99.25 −0.25 95.50 0.0120 0.9800"
        " 1.00 −75.0% 0.0200 −75.0% 240 × 2.40"
    ) in seen
    assert "teacher 90.50 99.50 – – – 4.00 0.0800 100 pruned" in seen
    assert "Of 2,304 hidden units in 3 MLPs, 288 stay (12.5%)" in seen
    assert "blocks.2.mlp 768 96 240.00 3.00 1e-04 50.5" in seen
    assert "dropped: unsafe or unjudged 11,111 18.5%" in seen
    assert "passed, not drawn 38,882" in seen
    assert "broken image 100 1.0%" in seen
    assert hashlib.sha256(b"weights of mlp").hexdigest() in seen


def test_page_stands_alone(results: Path) -> None:
    html = made(results)
    links = re.findall(r"(?:src|href|action|data|poster)\s*=\s*[\"']?([^\"'>\s]+)", html)
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"<(script|link|iframe|object|img)\b|@import|url\((?!#)", html)
    assert html.count("<svg ") == 2 + 3  # two charts, and one a block
    identifiers = re.findall(r'\bid="([^"]+)"', html)
    assert len(identifiers) == len(set(identifiers))
    assert set(link[1:] for link in links) <= set(identifiers)


def test_charts_show_stages_and_models_in_the_page_s_colours(results: Path) -> None:
    charts = re.findall(r"<figure>.*?</figure>", made(results), flags=re.DOTALL)
    assert [chart.count("<svg ") for chart in charts] == [1, 1]
    assert 'aria-label="Loss curves"' in charts[0]
    assert re.findall(r">(mlp|full)</text>", charts[0]) == ["mlp", "full"]
    assert all(f">{label}</text>" in charts[1] for label in ("teacher 90.5%", "full 89.3%"))
    assert "stroke: var(--accent)" in charts[0]
    assert not re.search("#00000[1-9]", "".join(charts))


def test_texts_of_others_are_escaped(results: Path) -> None:
    params = PARAMS | {"teacher": {"model": "<script>alert(1)</script>"}, "note": "a < b & é"}
    html = made(results, params)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;, pruned and distilled" in html
    assert "note: a &lt; b &amp; é" in html
    assert "views:\n- 0.2\n- 1.0" in html


@pytest.mark.parametrize(
    ("top1", "said"),
    [(91.0, "gains 0.50 points of"), (90.503, "has the same"), (90.4, "loses 0.10 points of")],
)
def test_headline_names_the_direction(results: Path, top1: float, said: str) -> None:
    change(results / "evaluate/full.json", top1=top1)
    assert f"and {said} top-1 accuracy" in text(made(results))


def test_headless_teacher_is_compared_by_cosine(results: Path) -> None:
    headless(results)
    html = made(results)
    seen = text(html)
    assert "its output has a cosine of 0.9800 to the teacher" in seen
    assert "Right after pruning it was 0.7000" in seen
    assert "full the student – – – 0.0120 0.9800" in seen
    assert "Cosine to the teacher against size" in seen and "(95%)" not in seen
    assert ">teacher 1.0000</text>" in html and ">pruned 0.7000</text>" in html
    flat = json.loads((results / "metrics.json").read_text())
    assert not any(key.endswith(ACCURACIES) for key in flat)
    assert flat["student.cosine"] == 0.98


def test_without_refit_there_are_no_errors(results: Path) -> None:
    assert "Error refitted" in made(results)
    blocks = json.loads((results / "prune/blocks.json").read_text())
    for block in blocks.values():
        del block["error_plain"], block["error_refit"], block["ridge"]
    write(results / "prune/blocks.json", blocks)
    seen = text(made(results))
    assert "Error" not in seen and "refitted" not in seen
    assert "blocks.2.mlp 768 96 50.5" in seen


def test_same_results_give_the_same_page(results: Path) -> None:
    found = read(results, STAGES, results)
    assert found.last_stage == "full"
    assert made(results) == made(results)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (3.2e-6, "3.2e-06"), (0.0123456, "0.0123"), (1.5, "1.50"), (1012.6, "1,013")],
)
def test_three_significant_digits(value: float, shown: str) -> None:
    assert page._significant(value) == shown
