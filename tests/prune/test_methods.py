"""Each method orders as its definition, written out on the activations, does."""

import typing

import pytest
import tiny
import torch
from dgmr import artefact
from dgmr.mlps import mlps
from dgmr.params import Ordering
from dgmr.prune import saliency
from dgmr.prune.block import Block
from dgmr.prune.compensate import LeastSquares
from dgmr.prune.methods import METHODS, Request
from dgmr.targets import Manifest
from safetensors.torch import load_file

IMAGES, TOKENS = 24, 16


def without_bias():
    return tiny.vit(proj_bias=False)


FAMILIES = {
    "plain": tiny.vit,
    "without bias": without_bias,
    "gated with norm": tiny.eva02,
    "packed": tiny.dinov2,
}


class Case(typing.NamedTuple):
    block: Block
    inputs: torch.Tensor
    """All calibration inputs, ``[images, tokens, N]`` float64."""
    mlp: torch.nn.Module
    """In float64."""

    @property
    def hidden(self):
        """What enters fc2, ``[tokens, M]``."""
        found = []
        hook = self.mlp.fc2.register_forward_pre_hook(lambda _m, given: found.append(given[0]))
        self.mlp(self.inputs.flatten(0, 1))
        hook.remove()
        return found[0].detach()

    @property
    def centred(self):
        """Where fc2 has a bias to carry the means."""
        return self.hidden - (0 if self.mlp.fc2.bias is None else self.hidden.mean(0))

    @property
    def fc2(self):
        return self.mlp.fc2.weight.detach()

    @property
    def rows(self):
        """What reads the input, a row a hidden unit."""
        layers = [getattr(self.mlp, n, None) for n in ("fc1", "fc1_g", "fc1_x")]
        weights = [layer.weight.detach() for layer in layers if layer is not None]
        if type(self.mlp).__name__ == "GluMlp":
            weights = weights[0].chunk(2)
        return torch.cat(list(weights), dim=1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("methods") / "data", (IMAGES,))


def make(folder, model, pictures):
    teacher = tiny.write_teacher(folder / "teacher", model)
    calibrated = {"samples": IMAGES, "tokens": TOKENS}
    config = tiny.features_config(calibration=calibrated, views={"count": 1}, batch_size=8)
    room = tiny.write_features(folder, teacher, pictures, config)
    saliency.compute(teacher, pictures, config, 0, folder / "saliency")
    name = "blocks.1.mlp"
    skeleton = mlps(artefact.skeleton(teacher))[name]
    inputs = load_file(folder / "work" / "calibration" / f"{name}.safetensors")["inputs"]
    block = Block(teacher, name, skeleton, Manifest(room), folder / "saliency")
    module = mlps(artefact.load(teacher))[name].module.double()
    return Case(block, inputs.double(), module)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory, pictures):
    return make(tmp_path_factory.mktemp("family"), FAMILIES[request.param](), pictures)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, pictures):
    return make(tmp_path_factory.mktemp("plain"), tiny.vit(), pictures)


def ordered(case, method, width, **how):
    return METHODS[method](case.block, Request(width, **how))


def by_score(scores, width):
    gains, indices = scores.sort(descending=True)
    return indices[:width], gains[:width] / scores.sum()


def by_residuals(vectors, wanted, width):
    """The greedy loop: take the column that gains most, subtract the projections on it.

    ``wanted`` None: a column gains its squared residual; else what it explains of ``wanted``.
    """
    residuals, rest = vectors.clone(), wanted
    indices, gains = [], []
    for _ in range(width):
        squares = residuals.square().sum(0)
        scores = squares if rest is None else (residuals.T @ rest).square().sum(1) / squares
        scores[indices] = -1
        pick = int(scores.argmax())
        along = residuals[:, pick] / residuals[:, pick].norm()
        residuals = residuals - along.outer(along @ residuals)
        rest = None if rest is None else rest - along.outer(along @ rest)
        indices.append(pick)
        gains.append(float(scores[pick]))
    return torch.tensor(indices), torch.tensor(gains).double()


def assert_same(found, expected):
    indices, gains = expected
    assert found.indices.tolist() == indices.tolist()
    torch.testing.assert_close(found.gains, gains.double(), rtol=1e-4, atol=1e-7)


def test_params_allow_just_the_methods_there_are():
    assert set(METHODS) == set(typing.get_args(Ordering.model_fields["method"].annotation))


def test_every_method_says_whether_it_needs_calibration(case):
    bare = Block(case.block.teacher, case.block.name, case.block.skeleton, None, case.block.scores)
    for name, method in METHODS.items():
        if Ordering(method=name).needs_calibration:
            with pytest.raises(AssertionError):
                method(bare, Request(3))
        else:
            assert method(bare, Request(3)).indices.shape == (3,)


def test_magnitude_is_by_the_norm_of_the_rows(case):
    expected = by_score(case.rows.square().sum(1), 40)
    assert_same(ordered(case, "magnitude", 40), expected)


def test_gram_schmidt_is_on_the_rows(case):
    indices, gains = by_residuals(case.rows.T, None, 24)
    assert_same(ordered(case, "gram_schmidt", 24), (indices, gains / case.rows.square().sum()))


def test_active_energy_is_energy_times_how_often_a_unit_fires(case):
    squares = case.hidden.square()
    energy = squares.mean(0)
    fires = (case.hidden.abs() > 0.01 * energy.sqrt()).double().mean(0)
    assert_same(ordered(case, "active_energy", 40), by_score(energy * fires, 40))
    assert fires.min() < 1  # otherwise it would say nothing


def test_activation_gram_schmidt_is_on_activations_scaled_by_fc2(case):
    scaled = case.centred * case.fc2.norm(dim=0)
    indices, gains = by_residuals(scaled, None, 40)
    expected = indices, gains / scaled.square().sum()
    assert_same(ordered(case, "activation_gram_schmidt", 40), expected)


def test_output_gram_schmidt_explains_the_output(case):
    output = case.centred @ case.fc2.T
    indices, gains = by_residuals(case.centred, output, 40)
    found = ordered(case, "output_gram_schmidt", 40)
    assert_same(found, (indices, gains / output.square().sum()))
    assert found.gains.sum() < 1


def test_means_count_just_where_no_bias_carries_them(tmp_path, pictures, plain):
    bare = make(tmp_path, without_bias(), pictures)
    for case, centred in ((plain, True), (bare, False)):
        total = (case.centred if centred else case.hidden).square().sum()
        assert case.mlp.fc2.weight.shape == (32, 128)
        other = (case.hidden if centred else case.hidden - case.hidden.mean(0)).square().sum()
        assert abs(other / total - 1) > 0.01  # so the tests above tell them apart


def test_taylor_is_by_saliency(case):
    scores = load_file(case.block.scores / "blocks.1.mlp.safetensors")["scores"]
    assert_same(ordered(case, "taylor", 40), by_score(scores, 40))


def test_random_is_without_replacement_by_seed_and_block(plain):
    other = Block(plain.block.teacher, "blocks.0.mlp", plain.block.skeleton)
    found = {
        name: METHODS["random"](block, Request(128, seed))
        for name, block, seed in (
            ("one", plain.block, 0),
            ("seed", plain.block, 1),
            ("block", other, 0),
        )
    }
    again = METHODS["random"](plain.block, Request(128, 0))
    assert torch.equal(found["one"].indices, again.indices)
    assert len({tuple(order.indices.tolist()) for order in found.values()}) == 3
    for order in found.values():
        assert sorted(order.indices.tolist()) == list(range(128))
        assert float(order.gains.sum()) == pytest.approx(1)


@pytest.mark.parametrize("method", METHODS)
def test_a_shorter_order_is_the_beginning_of_a_longer_one(case, method):
    units = case.block.skeleton.hidden_features
    whole = ordered(case, method, units)
    assert sorted(whole.indices.tolist()) == list(range(units))
    assert whole.gains.dtype == torch.double and whole.gains.isfinite().all()
    for width in (1, 20):
        part = ordered(case, method, width)
        assert torch.equal(part.indices, whole.indices[:width])
        torch.testing.assert_close(part.gains, whole.gains[:width])


@pytest.mark.parametrize(
    "method", [name for name in METHODS if Ordering(method=name).needs_calibration]
)
@pytest.mark.parametrize("tokens", [IMAGES * TOKENS // 4, 10])
def test_tokens_limits_what_is_looked_at(monkeypatch, plain, method, tokens):
    seen = []
    inputs = Block.inputs

    def watched(block, most=None):
        for piece, held_out in inputs(block, most):
            seen.append(piece)
            yield piece, held_out

    monkeypatch.setattr(Block, "inputs", watched)
    few = ordered(plain, method, 24, tokens=tokens)
    passes = 2 if method == "active_energy" else 1
    assert sum(map(len, seen)) == passes * tokens
    monkeypatch.undo()
    whole = ordered(plain, method, 24, tokens=IMAGES * TOKENS)
    assert torch.equal(whole.indices, ordered(plain, method, 24).indices)
    assert not torch.equal(whole.indices, few.indices)


@pytest.mark.parametrize("most", [1, 10, 96, IMAGES * TOKENS, 10**6, None])
def test_inputs_are_distinct_tokens_of_all_and_say_which_are_held_out(plain, most):
    seen = set()
    for piece, held_out in plain.block.inputs(most):
        for token in piece.double():
            image, place = (plain.inputs == token).all(2).nonzero()[0].tolist()
            seen.add((image, place))
            assert held_out == (image % 8 == 7)
    assert len(seen) == min(most or 10**6, IMAGES * TOKENS)


def test_a_draw_leaves_out_no_place_of_the_image(plain):
    # A quarter of the tokens: in a grid, three of four places would never be seen.
    seen = torch.cat([piece for piece, _ in plain.block.inputs(IMAGES * TOKENS // 4)])
    where = (plain.inputs[:, :, None] == seen.double()).all(3).any(2)
    assert where.sum() == IMAGES * TOKENS // 4
    assert where.any(0).all()
    assert where.any(1).double().mean() > 0.75  # nor are they those of the first images


def output_error(case, order, width):
    """Of the output, with fc2 refitted, on held-out images."""
    kept, mlp = order.indices[:width], case.block.mlp()
    pruned = mlp.pruned(kept)
    squares = LeastSquares(width, mlp.out_features)
    for inputs, held_out in case.block.inputs():
        hidden, output = pruned.hidden(inputs), mlp.module(inputs)
        squares.add(hidden, output - pruned.output(hidden), output, held_out)
    return squares.solve().error_refit


def test_output_gram_schmidt_beats_active_energy_on_redundant_units(tmp_path, pictures):
    model = tiny.vit()
    with torch.no_grad():
        fc1 = model.blocks[1].mlp.fc1
        fc1.weight[64:], fc1.bias[64:] = fc1.weight[:64], fc1.bias[:64]
    case = make(tmp_path, model, pictures)
    errors = {
        method: output_error(case, ordered(case, method, 64), 32)
        for method in ("output_gram_schmidt", "active_energy")
    }
    assert errors["output_gram_schmidt"] < 0.6 * errors["active_energy"]
    chosen = ordered(case, "output_gram_schmidt", 64).indices[:32] % 64
    assert len(chosen.unique()) == 32  # no unit and its copy


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("random", "taylor")])
def test_weights_with_nan_are_refused(tmp_path, plain, method):
    model = artefact.load(plain.block.teacher)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 4] = float("nan")
    teacher = tiny.write_teacher(tmp_path / "teacher", model)
    block = Block(teacher, plain.block.name, plain.block.skeleton, plain.block.features)
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        METHODS[method](block, Request(8))
