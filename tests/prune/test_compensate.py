"""The refit equals ridge regression on activations held in memory."""

import numpy as np
import pytest
import torch
from dgmr.prune import compensate
from dgmr.prune.compensate import LeastSquares
from timm.layers import Mlp
from torch import nn

N, M = 12, 40
RIDGE = 1e-3


def make_mlp(seed=0, dtype=torch.double, **arguments):
    torch.manual_seed(seed)
    mlp = Mlp(N, M, **arguments)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mlp.to(dtype).requires_grad_(False)


@pytest.fixture
def inputs():
    return 1 + torch.randn(500, N, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def some(k, seed=2):
    return torch.randperm(M, generator=torch.Generator().manual_seed(seed))[:k]


def refit(mlp, kept, *chunks, ridge=RIDGE):
    squares = LeastSquares(mlp, kept)
    for chunk in chunks:
        squares.add(chunk)
    return squares.solve(ridge)


def activations(mlp, inputs):
    return mlp.act(mlp.fc1(inputs)).double().numpy()


def output_error(mlp, kept, weight, bias, inputs):
    """Mean squared error of ``weight`` and ``bias`` on the kept units, over the output's variance."""
    expected = mlp(inputs).double().numpy()
    offset = 0 if bias is None else bias.double().numpy()
    found = activations(mlp, inputs)[:, kept] @ weight.double().numpy().T + offset
    variance = ((expected - expected.mean(0)) ** 2).sum(1).mean()
    return ((found - expected) ** 2).sum(1).mean() / variance


def direct(mlp, kept, inputs, ridge, intercept=True):
    """fc2's new weight and bias by ``numpy.linalg.lstsq`` on the stacked system, nothing clever."""
    hidden, weight = activations(mlp, inputs), mlp.fc2.weight.double().numpy()
    dropped = np.setdiff1d(np.arange(M), kept)
    here, lost = hidden[:, kept], hidden[:, dropped] @ weight[:, dropped].T
    mean_here, mean_lost = here.mean(0) * intercept, lost.mean(0) * intercept
    centred = here - mean_here
    strength = ridge * (centred**2).mean(0).mean()
    rows = np.vstack([centred, np.sqrt(len(here) * strength) * np.eye(len(kept))])
    answers = np.vstack([lost - mean_lost, np.zeros((len(kept), N))])
    fold = np.linalg.lstsq(rows, answers, rcond=None)[0]
    return weight[:, kept] + fold.T, mean_lost - mean_here @ fold


@pytest.mark.parametrize("k", [1, 8, 24, 39])
@pytest.mark.parametrize("ridge", [1e-4, 1e-1])
def test_refit_is_ridge_regression(inputs, k, ridge):
    mlp, kept = make_mlp(seed=k), some(k)
    found = refit(mlp, kept, inputs, ridge=ridge)
    weight, constant = direct(mlp, kept.numpy(), inputs, ridge)
    np.testing.assert_allclose(found.weight, weight, rtol=0, atol=1e-8)
    np.testing.assert_allclose(found.bias, mlp.fc2.bias.numpy() + constant, rtol=0, atol=1e-8)


@pytest.mark.parametrize("bias", [True, [True, False]], ids=["bias", "fc2 without bias"])
def test_errors_are_those_on_the_calibration_tokens(inputs, bias):
    mlp, kept = make_mlp(bias=bias), some(20)
    found = refit(mlp, kept, inputs)
    plain = output_error(mlp, kept, mlp.fc2.weight[:, kept], mlp.fc2.bias, inputs)
    refitted = output_error(mlp, kept, found.weight, found.bias, inputs)
    assert found.error_plain == pytest.approx(plain, rel=1e-9)
    assert found.error_refit == pytest.approx(refitted, rel=1e-7)
    assert 0 < found.error_refit < 0.5 * found.error_plain


def test_without_a_bias_no_constant_is_fitted(inputs):
    mlp, kept = make_mlp(bias=[True, False]), some(20)
    found = refit(mlp, kept, inputs)
    weight, _ = direct(mlp, kept.numpy(), inputs, RIDGE, intercept=False)
    assert found.bias is None
    np.testing.assert_allclose(found.weight, weight, rtol=0, atol=1e-8)


def test_affine_neurons_are_no_loss(inputs):
    # Without an activation, all neurons are affine in any 12 independent ones.
    mlp, kept = make_mlp(act_layer=nn.Identity), some(N)
    found = refit(mlp, kept, inputs, ridge=1e-13)
    assert found.error_plain > 0.1
    assert found.error_refit < 1e-8
    assert output_error(mlp, kept, found.weight, found.bias, inputs) < 1e-8


def test_copies_and_constants_are_no_loss(inputs):
    mlp = make_mlp()
    mlp.fc1.weight[20:], mlp.fc1.bias[20:] = mlp.fc1.weight[:20], mlp.fc1.bias[:20]
    mlp.fc1.weight[39] = 0
    kept = torch.cat([torch.arange(10), torch.arange(30, 39), torch.tensor([19])])
    found = refit(mlp, kept, inputs, ridge=1e-13)
    assert found.error_refit < 1e-8
    assert output_error(mlp, kept, found.weight, found.bias, inputs) < 1e-8


def test_dead_neurons_alone_keep_the_mean(inputs):
    mlp, kept = make_mlp(act_layer=nn.ReLU), torch.tensor([0, 1])
    mlp.fc1.weight[:2], mlp.fc1.bias[:2] = 0, -1
    found = refit(mlp, kept, inputs)
    assert found.weight.isfinite().all()
    expected = mlp(inputs).mean(0)
    torch.testing.assert_close(found.bias, expected)
    assert found.error_refit == pytest.approx(1)


def test_all_kept_change_nothing(inputs):
    mlp, kept = make_mlp(), some(M)
    found = refit(mlp, kept, inputs)
    assert torch.equal(found.weight, mlp.fc2.weight[:, kept])
    assert torch.equal(found.bias, mlp.fc2.bias)
    assert found.error_plain == found.error_refit == 0


def test_a_huge_ridge_is_plain_slicing_with_the_mean_in_the_bias(inputs):
    mlp, kept = make_mlp(), some(20)
    found = refit(mlp, kept, inputs, ridge=1e12)
    torch.testing.assert_close(found.weight, mlp.fc2.weight[:, kept], rtol=0, atol=1e-9)
    dropped = np.setdiff1d(np.arange(M), kept)
    mean = activations(mlp, inputs)[:, dropped].mean(0) @ mlp.fc2.weight[:, dropped].numpy().T
    np.testing.assert_allclose(found.bias, mlp.fc2.bias.numpy() + mean, rtol=0, atol=1e-8)


def test_chunks_make_no_difference(inputs, monkeypatch):
    mlp, kept = make_mlp(), some(20)
    whole = refit(mlp, kept, inputs)
    monkeypatch.setattr(compensate, "_TOKENS_AT_ONCE", 7)
    for found in (refit(mlp, kept, inputs), refit(mlp, kept, *inputs.split([499, 1]))):
        torch.testing.assert_close(found.weight, whole.weight, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.bias, whole.bias, rtol=0, atol=1e-10)
        assert found[2:] == pytest.approx(whole[2:], rel=1e-9)


def test_float32_models_get_a_float32_refit(inputs):
    mlp, kept = make_mlp(dtype=torch.float32), some(20)
    found = refit(mlp, kept, inputs.float())
    assert found.weight.dtype == found.bias.dtype == torch.float32
    weight, constant = direct(mlp, kept.numpy(), inputs.float(), RIDGE)
    np.testing.assert_allclose(found.weight, weight, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.bias, mlp.fc2.bias.numpy() + constant, rtol=0, atol=1e-4)


def test_mlp_is_left_as_it_is(inputs):
    mlp = make_mlp()
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    refit(mlp, some(20), inputs)
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())


def test_without_tokens_there_is_no_refit(inputs):
    for chunks in ((), (inputs[:0],)):
        with pytest.raises(ValueError, match="needs calibration tokens"):
            refit(make_mlp(), some(20), *chunks)
