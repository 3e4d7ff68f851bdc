"""Keys and code hashes change when, and only when, what they stand for does."""

import ast
import importlib.metadata
import shutil
from pathlib import Path

import pytest
from dgmr import fingerprint

PACKAGE = Path(fingerprint.__file__).parent


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package, to be edited; ``edit(file, old, new)`` makes later hashes see it."""
    copy = tmp_path / "dgmr"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprint, "PACKAGE", copy)

    def forget():
        fingerprint.code.cache_clear()
        fingerprint._imports.cache_clear()
        fingerprint._tree.cache_clear()

    def edit(file, old, new):
        text = (copy / file).read_text()
        assert old in text, f"{file} has changed: mend this test"
        (copy / file).write_text(text.replace(old, new, 1))
        forget()

    forget()
    yield edit
    monkeypatch.undo()
    forget()


def test_key_is_short_stable_and_made_of_all_parts():
    key = fingerprint.key("a", {"ratio": 1.0, "parts": [1, None]})
    assert key == "ee0002f1102c"  # elsewhere and tomorrow too: work folders live on
    assert len(fingerprint.key()) == 12 and int(fingerprint.key(), 16) >= 0


def test_key_changes_with_any_part():
    parts = [
        (),
        ("a",),
        ("b",),
        ("a", "b"),
        ("b", "a"),
        ("ab",),
        (["a", "b"],),
        ("a", None),
        ({"a": 1},),
        ({"a": 2},),
        ({"a": "1"},),
        ({"a": True},),
        ({"a": 1, "b": None},),
    ]
    assert len({fingerprint.key(*each) for each in parts}) == len(parts)


def test_key_does_not_depend_on_the_order_of_a_mapping():
    assert fingerprint.key({"a": 1, "b": 2}) == fingerprint.key({"b": 2, "a": 1})


def test_key_refuses_what_has_no_stable_text():
    with pytest.raises(TypeError):
        fingerprint.key(object())


def test_code_does_not_depend_on_the_place(package, monkeypatch):
    copied = fingerprint.code("dgmr.prune.orders")
    monkeypatch.setattr(fingerprint, "PACKAGE", PACKAGE)
    fingerprint.code.cache_clear()
    fingerprint._tree.cache_clear()
    assert fingerprint.code("dgmr.prune.orders") == copied


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("prune/orders.py", "[part ::", "[part + 1 ::"),
        ("prune/gram_schmidt.py", "import torch", "import torch\nEXTRA = 1"),
        # imported by dgmr.artefact, which orders imports
        ("files.py", '_TEMPORARY = ".partial"', '_TEMPORARY = ".part"'),
        ("models.py", "import timm\n", "import timm\nEXTRA = 1\n"),
        ("mlps.py", "import copy\n", "import copy\nEXTRA = 1\n"),
    ],
)
def test_code_changes_with_what_a_step_imports_in_the_end(package, file, old, new):
    before = fingerprint.code("dgmr.prune.orders")
    package(file, old, new)
    assert fingerprint.code("dgmr.prune.orders") != before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("track/tell.py", "import ", "EXTRA = 1\nimport "),
        ("data/pack.py", "import io", "import io\nEXTRA = 1"),
        ("cli.py", "import json", "import json\nEXTRA = 1"),
        ("prune/orders.py", "import ", "# A comment.\nimport "),
        ("prune/orders.py", '"""The order', '"""Another text on the order'),
        ("models.py", '"""What a model says', '"""Another text on what a model says'),
        (
            "models.py",
            '"""``[B, D]``: class',
            '"""An attribute is described, too. ``[B, D]``: class',
        ),
        ("mlps.py", '"""Hidden units of every', '"""Another text on hidden units of every'),
    ],
)
def test_code_does_not_change_with_anything_else(package, file, old, new):
    before = fingerprint.code("dgmr.prune.orders")
    package(file, old, new)
    assert fingerprint.code("dgmr.prune.orders") == before


def test_params_reach_a_step_by_its_command_line_not_its_code(package):
    before = fingerprint.code("dgmr.data.select")
    package("params.py", "import json", "import json\nEXTRA = 1")
    package("errors.py", "class ", "EXTRA = 1\n\n\nclass ")
    assert fingerprint.code("dgmr.data.select") == before
    assert "dgmr.params" in fingerprint._imports("dgmr.data.select")


def test_code_changes_with_an_import_inside_a_function(package):
    before = fingerprint.code("dgmr.fashion_mnist")
    package("fashion_mnist.py", "import FashionMNIST", "import FashionMNIST\n    import dgmr.views")
    with_import = fingerprint.code("dgmr.fashion_mnist")
    package("views.py", "_SOLARIZE_FROM = 128", "_SOLARIZE_FROM = 127")
    assert len({before, with_import, fingerprint.code("dgmr.fashion_mnist")}) == 3


def test_trees_are_the_same_to_every_python_and_differ_with_every_value(tmp_path):
    texts = [
        "f(None)",
        "f(False)",
        "f(0)",
        "f(0.0)",
        "f('0')",
        "f()",
        "f(b'0')",
        "f(...)",
        "f(x=0)",
    ]
    trees = []
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.py").write_text(text)
        trees.append(fingerprint._tree(tmp_path / f"{number}.py"))
    assert len(set(trees)) == len(texts)
    # No field that is empty here, for newer Pythons have more of them.
    (tmp_path / "old.py").write_text("def f(a=1):\n    'A docstring.'\n    return f'{a!r}'")
    assert fingerprint._tree(tmp_path / "old.py") == "0e9b8f34bd02"


def test_code_changes_with_a_text_that_is_used(package):
    before = fingerprint.code("dgmr.files")
    package("files.py", '"rb"', '"br"')
    assert fingerprint.code("dgmr.files") != before


def test_code_changes_with_a_template_of_its_folder_only(package):
    page, metrics = fingerprint.code("dgmr.report.page"), fingerprint.code("dgmr.data.pack")
    package("report/template.html.jinja", "<", "<!-- new --><")
    assert fingerprint.code("dgmr.report.page") != page
    assert fingerprint.code("dgmr.data.pack") == metrics


def test_closures_hold_the_shared_rooms_and_no_foreign_stage():
    orders = fingerprint._closure("dgmr.prune.orders")
    assert {"dgmr.artefact", "dgmr.files", "dgmr.mlps", "dgmr.prune.gram_schmidt"} <= orders
    assert not [name for name in orders if name.startswith(("dgmr.data", "dgmr.distill"))]

    pack = fingerprint._closure("dgmr.data.pack")
    assert pack == {"dgmr.data.pack", "dgmr.files", "dgmr.shards"}

    calibration = fingerprint._closure("dgmr.features.calibration")
    assert {"dgmr.models", "dgmr.shards"} <= calibration
    assert not [name for name in calibration if name.startswith(("dgmr.prune", "dgmr.report"))]


def test_targets_depend_on_views_and_answers_not_on_the_training():
    targets = fingerprint._closure("dgmr.features.targets")
    shared = {"answers", "views", "targets", "shards", "models", "mlps", "weights"}
    assert {f"dgmr.{name}" for name in shared} <= targets
    assert not [name for name in targets if name.startswith(("dgmr.distill", "dgmr.prune"))]

    trainer = fingerprint._closure("dgmr.distill.trainer")
    assert {"dgmr.answers", "dgmr.views", "dgmr.targets", "dgmr.distill.losses"} <= trainer
    assert not [name for name in trainer if name.startswith(("dgmr.features", "dgmr.prune"))]

    publish = fingerprint._closure("dgmr.features.publish")
    assert {"dgmr.targets", "dgmr.views"} <= publish and "dgmr.features.targets" not in publish


@pytest.mark.parametrize("file", ["views.py", "answers.py", "weights.py", "features/targets.py"])
def test_code_of_the_targets_changes_with(package, file):
    before = fingerprint.code("dgmr.features.targets")
    package(file, "\nimport ", "\nEXTRA = 1\nimport ")
    assert fingerprint.code("dgmr.features.targets") != before


def test_versions_are_the_installed_ones():
    installed = importlib.metadata.version
    assert fingerprint.versions("torch", "pillow") == {
        "torch": installed("torch"),
        "pillow": installed("pillow"),
    }


def test_every_import_of_the_package_is_one_that_closures_follow():
    """No relative imports, and none of what a package's ``__init__`` holds: code() would miss both."""
    missed = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                module = node.module or ""
                folder = PACKAGE.joinpath(*module.split(".")[1:])
                within = module.split(".")[0] == "dgmr" and path.name != "__init__.py"
                missed += [
                    f"{path.name}: from {module} import {alias.name}"
                    for alias in node.names
                    if node.level
                    or (within and folder.is_dir() and not (folder / f"{alias.name}.py").is_file())
                ]
    assert [each for each in missed if "import __version__" not in each] == []
