"""The refit equals ridge regression on activations held in memory, and its errors those of others."""

import numpy as np
import pytest
import torch
from dgmr.mlps import PrunableMlp
from dgmr.prune.compensate import RIDGES, LeastSquares
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn

N, M = 12, 40
RIDGE = 1e-3
HELD_OUT = 120
KINDS = {
    "plain": (Mlp, {}),
    "without bias": (Mlp, {"bias": [True, False]}),
    "inner norm": (Mlp, {"norm_layer": nn.LayerNorm}),
    "gated": (SwiGLU, {"norm_layer": nn.LayerNorm}),
    "packed": (GluMlp, {"hidden_features": 2 * M}),
}


def make_mlp(kind="plain", seed=0, dtype=torch.double, **changes):
    torch.manual_seed(seed)
    make, arguments = KINDS[kind]
    mlp = make(**({"in_features": N, "hidden_features": M} | arguments | changes))
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.5)
    return PrunableMlp(mlp.to(dtype).requires_grad_(False))


@pytest.fixture
def inputs():
    return 1 + torch.randn(500, N, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def some(k, seed=2):
    return torch.randperm(M, generator=torch.Generator().manual_seed(seed))[:k]


def add(squares, mlp, pruned, inputs, held_out):
    hidden, output = pruned.hidden(inputs), mlp.module(inputs)
    squares.add(hidden, output - pruned.output(hidden), output, held_out)


def fold(mlp, kept, fit, held_out, ridge=RIDGE):
    pruned = mlp.pruned(kept)
    squares = LeastSquares(len(kept), N, mlp.has_bias)
    add(squares, mlp, pruned, fit, False)
    add(squares, mlp, pruned, held_out, True)
    return squares.solve(ridge)


def refit(mlp, kept, inputs, ridge=RIDGE):
    """New weight ``[N, k]`` and bias, and the fold; the last tokens are held out."""
    found = fold(mlp, kept, inputs[:-HELD_OUT], inputs[-HELD_OUT:], ridge)
    fc2 = mlp.pruned(kept).module.fc2
    return found.applied(fc2.weight, fc2.bias), found


def output_error(mlp, kept, weight, bias, inputs):
    """Mean squared error of ``weight`` and ``bias`` on the kept units, over the output's variance."""
    expected = mlp.module(inputs).double().numpy()
    offset = 0 if bias is None else np.asarray(bias)
    hidden = mlp.pruned(kept).hidden(inputs).double().numpy()
    found = hidden @ np.asarray(weight, dtype=np.float64).T + offset
    variance = ((expected - expected.mean(0)) ** 2).sum(1).mean()
    return ((found - expected) ** 2).sum(1).mean() / variance


def direct(mlp, kept, inputs, ridge):
    """fc2's new weight and bias by ``numpy.linalg.lstsq`` on one stacked system, nothing clever.

    The last column is the constant, which no row of the penalty holds down.
    """
    hidden = mlp.pruned(kept).hidden(inputs).double().numpy()
    weight = mlp.module.fc2.weight[:, kept].double().numpy()
    bias = mlp.module.fc2.bias.double().numpy() if mlp.has_bias else np.zeros(N)
    lost = mlp.module(inputs).double().numpy() - hidden @ weight.T - bias
    spread = hidden - hidden.mean(0) if mlp.has_bias else hidden
    penalty = np.sqrt(ridge * len(hidden) * np.square(spread).mean())
    rows = np.vstack([hidden, penalty * np.eye(len(kept))])
    if mlp.has_bias:
        ones = np.concatenate([np.ones(len(hidden)), np.zeros(len(kept))])
        rows = np.hstack([rows, ones[:, None]])
    answers = np.vstack([lost, np.zeros((len(kept), N))])
    found = np.linalg.lstsq(rows, answers, rcond=None)[0]
    return weight + found[: len(kept)].T, bias + found[-1] if mlp.has_bias else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 8, 24, 39])
@pytest.mark.parametrize("ridge", [1e-4, 1e-1])
def test_refit_is_ridge_regression_on_all_tokens(inputs, kind, k, ridge):
    mlp, kept = make_mlp(kind, seed=k), some(k)
    found, _ = refit(mlp, kept, inputs, ridge)
    weight, bias = direct(mlp, kept, inputs, ridge)
    np.testing.assert_allclose(found.weight, weight, rtol=0, atol=1e-8)
    if bias is not None:
        np.testing.assert_allclose(found.bias, bias, rtol=0, atol=1e-8)
    assert (found.bias is None) == (bias is None) == (kind == "without bias")


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_on_held_out_tokens_by_a_fold_fitted_without_them(inputs, kind):
    mlp, kept = make_mlp(kind), some(20)
    _, found = refit(mlp, kept, inputs)
    fitted, held_out = inputs[:-HELD_OUT], inputs[-HELD_OUT:]
    fc2 = mlp.pruned(kept).module.fc2
    plain = output_error(mlp, kept, fc2.weight, fc2.bias, held_out)
    refitted = output_error(mlp, kept, *direct(mlp, kept, fitted, RIDGE), held_out)
    assert found.error_plain == pytest.approx(plain, rel=1e-9)
    assert found.error_refit == pytest.approx(refitted, rel=1e-7)
    seen = output_error(mlp, kept, *direct(mlp, kept, inputs, RIDGE), held_out)
    assert seen < refitted * (1 - 1e-4)  # so it makes a difference which tokens are fitted


@pytest.mark.parametrize("tokens", [24, 60, 500])
def test_ridge_is_the_one_of_least_held_out_error(inputs, tokens):
    """Few tokens call for a strong one."""
    fitted, held_out = inputs[: tokens - 12], inputs[tokens - 12 : tokens]
    mlp, kept = make_mlp(), some(20)
    found = fold(mlp, kept, fitted, held_out, ridge=None)
    errors = {
        ridge: output_error(mlp, kept, *direct(mlp, kept, fitted, ridge), held_out)
        for ridge in RIDGES
    }
    best = min(errors, key=errors.get)
    assert found.ridge == best
    assert found.error_refit == pytest.approx(errors[best], rel=1e-6)
    weight, _ = direct(mlp, kept, inputs[:tokens], best)  # on all tokens
    np.testing.assert_allclose(
        found.weight.T, weight - mlp.module.fc2.weight[:, kept].numpy(), atol=1e-6
    )


def test_chosen_ridges_differ(inputs):
    mlp, kept = make_mlp(), some(20)
    ridges = {
        fold(mlp, kept, inputs[: n - 12], inputs[n - 12 : n], None).ridge for n in (24, 60, 500)
    }
    assert len(ridges) > 1 and ridges <= set(RIDGES)


@pytest.mark.parametrize("kind", KINDS)
def test_refit_is_never_worse_than_slicing_on_the_fitted_tokens(inputs, kind):
    for ridge in (1e-9, 1.0):
        for k in (1, 20, 39):
            mlp, kept = make_mlp(kind, seed=k), some(k)
            found, _ = refit(mlp, kept, inputs, ridge)
            fc2 = mlp.pruned(kept).module.fc2
            errors = [
                output_error(mlp, kept, *both, inputs) for both in (found, (fc2.weight, fc2.bias))
            ]
            assert errors[0] < errors[1]


def test_affine_neurons_are_no_loss(inputs):
    # Without an activation, all neurons are affine in any 12 independent ones.
    mlp, kept = make_mlp(act_layer=nn.Identity), some(N)
    found, told = refit(mlp, kept, inputs, ridge=1e-13)
    assert told.error_plain > 0.1
    assert told.error_refit < 1e-8
    assert output_error(mlp, kept, *found, inputs) < 1e-8


def test_copies_and_constants_are_no_loss(inputs):
    mlp = make_mlp()
    fc1 = mlp.module.fc1
    fc1.weight[20:], fc1.bias[20:] = fc1.weight[:20], fc1.bias[:20]
    fc1.weight[39] = 0
    kept = torch.cat([torch.arange(10), torch.arange(30, 39), torch.tensor([19])])
    found, told = refit(mlp, kept, inputs, ridge=1e-13)
    assert told.error_refit < 1e-8 < 0.1 < told.error_plain
    assert output_error(mlp, kept, *found, inputs) < 1e-8
    chosen, told = refit(mlp, kept, inputs, ridge=None)
    assert told.error_refit < 1e-8
    assert output_error(mlp, kept, *chosen, inputs) < 1e-8


@pytest.mark.parametrize("ridge", [RIDGE, None])
@pytest.mark.parametrize("constant", [-1, 3])
def test_units_that_never_change_keep_the_mean(inputs, ridge, constant):
    mlp, kept = make_mlp(act_layer=nn.ReLU), torch.tensor([0, 1])
    mlp.module.fc1.weight[:2], mlp.module.fc1.bias[:2] = 0, constant
    found, told = refit(mlp, kept, inputs, ridge)
    assert found.weight.isfinite().all()
    mean = max(constant, 0) * found.weight.sum(1) + found.bias
    torch.testing.assert_close(mean, mlp.module(inputs).mean(0))
    assert (found.weight - mlp.module.fc2.weight[:, kept]).abs().max() < 0.1
    assert told.error_refit == pytest.approx(1, abs=0.1)


def test_all_kept_change_nothing(inputs):
    mlp, kept = make_mlp(), some(M)
    found, told = refit(mlp, kept, inputs)
    torch.testing.assert_close(found.weight, mlp.module.fc2.weight[:, kept], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.bias, mlp.module.fc2.bias, rtol=0, atol=1e-12)
    assert max(told.error_plain, told.error_refit) < 1e-24


def test_a_huge_ridge_is_plain_slicing_with_the_mean_in_the_bias(inputs):
    mlp, kept = make_mlp(), some(20)
    found, _ = refit(mlp, kept, inputs, ridge=1e12)
    fc2 = mlp.pruned(kept).module.fc2
    torch.testing.assert_close(found.weight, fc2.weight, rtol=0, atol=1e-9)
    lost = mlp.module(inputs) - mlp.pruned(kept).module(inputs)
    torch.testing.assert_close(found.bias, fc2.bias + lost.mean(0), rtol=0, atol=1e-8)


@pytest.mark.parametrize("ridge", [RIDGE, None])
def test_pieces_make_no_difference(inputs, ridge):
    mlp, kept = make_mlp(), some(20)
    _, whole = refit(mlp, kept, inputs, ridge)
    squares = LeastSquares(20, N)
    for start in range(0, 500, 10):  # in any order, the last 120 held out
        at = 490 - start
        add(squares, mlp, mlp.pruned(kept), inputs[at : at + 10], at >= 500 - HELD_OUT)
    found = squares.solve(ridge)
    torch.testing.assert_close(found.weight, whole.weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.bias, whole.bias, rtol=0, atol=1e-9)
    assert found[2:] == pytest.approx(whole[2:], rel=1e-8)


def test_float32_models_get_a_float32_refit(inputs):
    mlp, kept = make_mlp(dtype=torch.float32), some(20)
    found, _ = refit(mlp, kept, inputs.float())
    assert found.weight.dtype == found.bias.dtype == torch.float32
    weight, bias = direct(mlp, kept, inputs.float(), RIDGE)
    np.testing.assert_allclose(found.weight, weight, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.bias, bias, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("fitted", "held_out"), [(0, 0), (500, 0), (0, 500)])
def test_without_tokens_of_both_kinds_there_is_no_refit(inputs, fitted, held_out):
    with pytest.raises(ValueError, match="needs calibration tokens") as error:
        fold(make_mlp(), some(20), inputs[:fitted], inputs[:held_out])
    assert str(error.value) == (
        f"least squares needs calibration tokens to fit ({fitted} given)"
        f" and to hold out ({held_out} given)"
    )
