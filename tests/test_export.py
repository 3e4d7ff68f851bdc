"""The ONNX file computes what the artefact's model does, with the pruned widths, or does not appear."""

import json
import logging

import onnx
import onnx_ir
import onnxruntime
import pytest
import tiny
import torch
from dgmr import artefact, export
from dgmr.cli import app
from dgmr.errors import DgmrError
from dgmr.mlps import widths
from dgmr.prune.model import prune_model
from torch.onnx._internal.exporter import _onnx_program
from typer.testing import CliRunner


def uneven():
    """A ViT whose blocks differ in width."""
    return prune_model(tiny.vit(), hidden_features={"blocks.0.mlp": 20, "blocks.1.mlp": 50})


MODELS = {
    "class token": lambda: prune_model(tiny.vit(), 1.3),
    "registers": lambda: prune_model(tiny.registers_vit(), 1.3),
    "swin": lambda: prune_model(tiny.swin(), 1.3),
    "attention pool": lambda: prune_model(tiny.siglip(), 1.3),
    "uneven": uneven,
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """A model and its file."""
    folder = tmp_path_factory.mktemp("export")
    model = MODELS[request.param]()
    artefact.save(folder / "model", model, {})
    export.export(folder / "model", folder / "out/model.onnx")
    return model, folder / "out/model.onnx"


def one_block():
    return tiny.vit(depth=1)


@pytest.fixture
def saved(tmp_path):
    artefact.save(tmp_path / "model", one_block(), {})
    return tmp_path / "model"


def runs(file, images):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(output)


def perturbed_before_saving(monkeypatch, scale):
    """Let the file be written from other weights than the model has when it is checked."""

    def save(self, destination):
        model = one_block()
        with torch.no_grad():
            model.blocks[0].mlp.fc2.bias[0] += scale
        for name, value in model.state_dict().items():
            if name in self.model.graph.initializers:
                tensor = onnx_ir.tensor(value.numpy(), name=name)
                self.model.graph.initializers[name].const_value = tensor
        written(self, destination)

    written = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", save)


def test_computes_what_the_model_does_for_any_batch(exported):
    model, file = exported
    for count in (1, 2, 7):
        images = tiny.pixels(count, seed=9)
        with torch.inference_mode():
            expected = model(images)
        found = runs(file, images)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_file_has_the_pruned_widths(exported):
    model, file = exported
    loaded = onnx.load(file)
    onnx.checker.check_model(loaded, full_check=True)
    shapes = {tensor.name: list(tensor.dims) for tensor in loaded.graph.initializer}
    for name, width in widths(model).items():
        dim = model.get_submodule(name).fc2.out_features
        assert shapes[f"{name}.fc1.weight"] == [width, dim]
        assert shapes[f"{name}.fc1.bias"] == [width]
        assert shapes[f"{name}.fc2.weight"] == [dim, width]


def test_file_says_what_it_takes_gives_and_was_made_from(exported):
    model, file = exported
    loaded = onnx.load(file)
    assert [(entry.domain, entry.version) for entry in loaded.opset_import] == [("", export.OPSET)]
    (taken,), (given,) = loaded.graph.input, loaded.graph.output
    batch, *image = [dim.dim_param or dim.dim_value for dim in taken.type.tensor_type.shape.dim]
    assert taken.name == "images"
    assert batch == "batch" and image == [3, tiny.SIDE, tiny.SIDE]
    assert given.name == ("logits" if model.num_classes else "pooled")
    origin = json.loads({entry.key: entry.value for entry in loaded.metadata_props}["origin"])
    about = artefact.provenance(file.parents[1] / "model")
    assert origin["sha256"] == about["sha256"]
    assert origin["transform"]["mean"] == list(model.pretrained_cfg["mean"])


@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_other_weights_are_refused_and_nothing_changes(saved, tmp_path, monkeypatch, scale):
    output = tmp_path / "out/model.onnx"
    output.parent.mkdir()
    output.write_text("of before")
    perturbed_before_saving(monkeypatch, scale)
    with pytest.raises(DgmrError, match=r"differs from the model's by .* allowed are 0\.0001"):
        export.export(saved, output)
    assert output.read_text() == "of before"
    assert [path.name for path in output.parent.iterdir()] == ["model.onnx"]


def test_the_perturbing_save_alone_is_accepted(saved, tmp_path, monkeypatch):
    perturbed_before_saving(monkeypatch, 0.0)
    export.export(saved, tmp_path / "model.onnx")


def test_nan_is_refused(saved, tmp_path, monkeypatch):
    perturbed_before_saving(monkeypatch, float("nan"))
    with pytest.raises(DgmrError, match="by nan of its largest value"):
        export.export(saved, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_another_shape_is_refused(exported):
    _, file = exported
    with pytest.raises(DgmrError, match=r"of 1 images ONNX Runtime makes \[1, \d+\], the model"):
        export.check(file, tiny.vit(num_classes=7))


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(DgmrError, match="ONNX Runtime cannot run the model"):
        export.check(tmp_path / "model.onnx", tiny.vit())


def test_large_weights_lie_in_a_second_file(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1000)
    output = tmp_path / "out/model.onnx"
    export.export(saved, output)
    assert {path.name for path in output.parent.iterdir()} == {"model.onnx", "model.onnx.data"}
    with torch.inference_mode():
        expected = artefact.load(saved)(tiny.pixels())
    torch.testing.assert_close(runs(output, tiny.pixels()), expected)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(saved, tmp_path, monkeypatch, package):
    found = export.find_spec
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(DgmrError, match=rf"^export needs {package}: pip install 'dgmr\[export\]'"):
        export.export(saved, tmp_path / "model.onnx")


def test_command(saved, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    command = ["export", str(saved), "--format", "onnx", "--output", str(tmp_path / "m.onnx")]
    found = CliRunner().invoke(app, command, catch_exceptions=False)
    assert found.exit_code == 0 and (tmp_path / "m.onnx").is_file()
    assert CliRunner().invoke(app, [*command[:3], "tflite", *command[4:]]).exit_code == 2
