"""Greedy selection by moments takes what plain loops on the activations themselves take."""

import numpy as np
import pytest
import torch
from dgmr.prune import greedy

ROUNDING = 1e-6


def relu_activations(draw, tokens, units, inputs):
    """Of a random layer, centred, the units of very different strengths."""
    hidden = draw.standard_normal((tokens, inputs)) @ draw.standard_normal((inputs, units))
    hidden = np.maximum(hidden + draw.standard_normal(units), 0)
    return (hidden - hidden.mean(0)) * draw.uniform(0.1, 2, units)


def independent(draw):
    return relu_activations(draw, 60, 24, 8)


def collinear(draw):
    """Eight units and sums of them."""
    return relu_activations(draw, 40, 8, 8) @ draw.standard_normal((8, 24))


def duplicated(draw):
    hidden = relu_activations(draw, 50, 24, 10)
    hidden[:, 12:] = hidden[:, :12] * draw.choice([-1, 1, 0.5], 12)
    return hidden


def zeros(draw):
    hidden = relu_activations(draw, 50, 24, 10)
    hidden[:, draw.permutation(24)[:10]] = 0
    return hidden


def few_tokens(draw):
    """Fewer than units, so the rank is theirs."""
    return relu_activations(draw, 9, 24, 10)


CASES = [
    (kind, seed, outputs)
    for kind in (independent, collinear, duplicated, zeros, few_tokens)
    for seed in range(4)
    for outputs in (None, 1, 5, 30)  # none: Gram-Schmidt; 30: more outputs than units
]


def problem(kind, seed, outputs):
    """Activations ``[tokens, M]``, and fc2 ``[outputs, M]`` or None."""
    draw = np.random.default_rng(seed)
    fc2 = None if outputs is None else draw.standard_normal((outputs, 24))
    return kind(draw), fc2


def select(activations, fc2, width):
    gram = torch.from_numpy(activations.T @ activations)
    return greedy.select(gram, None if fc2 is None else gram @ torch.from_numpy(fc2).T, width)


def projected(residuals, output, pick):
    """Both without their part along the residual of unit ``pick``."""
    along = residuals[:, pick] / np.linalg.norm(residuals[:, pick])
    return [value - np.outer(along, along @ value) for value in (residuals, output)]


def plain_scores(residuals, output, fc2):
    """What each unit would gain: its residual variance, or the output that its direction explains."""
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(residuals, axis=0)
        return norms**2 if fc2 is None else np.square(residuals.T @ output / norms[:, None]).sum(1)


def assert_greedy(activations, fc2, found, tolerance=ROUNDING):
    """Walk along the picks: each is the best that the plain loop has, rounds and gains included.

    Equally good units may stand in for each other.
    """
    indices, gains = found.indices.tolist(), found.gains.numpy()
    assert len(set(indices)) == len(indices)
    assert np.isfinite(gains).all()
    variances = np.square(activations).sum(0)
    floors = np.maximum(greedy.FLOOR * variances, greedy.FLOOR**2 * variances.max())
    dense = activations @ (np.zeros((1, activations.shape[1])) if fc2 is None else fc2).T
    left = np.ones(len(variances), bool)
    residuals, output, started = activations, dense, False
    for pick, gain in zip(indices, gains, strict=True):
        takeable = left & (np.square(residuals).sum(0) > floors)
        if started and not takeable.any():  # a new round
            residuals, output, started = activations, dense, False
            takeable = left & (variances > floors)
        if not takeable.any():  # by index
            assert pick == left.argmax() and gain == 0
        else:
            scores = np.where(takeable, plain_scores(residuals, output, fc2), -1)
            worth = tolerance * max(scores.max(), 1e-6 * np.square(dense).sum())
            assert scores[pick] >= scores.max() - worth
            assert gain == pytest.approx(scores[pick], abs=worth)
            residuals, output = projected(residuals, output, pick)
            started = True
        left[pick] = False


@pytest.mark.parametrize(("block", "width"), [(1, 11), (5, 24)])
def test_picks_are_those_of_the_plain_loop(monkeypatch, block, width):
    monkeypatch.setattr(greedy, "BLOCK", block)
    for case in CASES:
        activations, fc2 = problem(*case)
        found = select(activations, fc2, width)
        assert len(found.indices) == len(found.gains) == width
        assert_greedy(activations, fc2, found)


def test_cases_have_several_rounds_and_units_of_no_use():
    rounds, idle = 0, 0
    for case in CASES:
        activations, fc2 = problem(*case)
        gains = select(activations, fc2, 24).gains
        rounds += fc2 is None and bool((gains.diff() > 1e-9).any())
        idle += bool((gains == 0).any())
    assert rounds >= 8 and idle >= 8


@pytest.mark.parametrize("pool", [1, 6])
def test_gram_schmidt_is_exact_with_a_pool_of_some_units(monkeypatch, pool):
    monkeypatch.setattr(greedy, "POOL", pool)
    monkeypatch.setattr(greedy, "BLOCK", 4)
    for kind, seed, _ in CASES[::4]:
        activations, _ = problem(kind, seed, None)
        assert_greedy(activations, None, select(activations, None, 24))


@pytest.mark.parametrize("pool", [6])
def test_least_squares_with_a_pool_of_some_units_is_an_order(monkeypatch, pool):
    monkeypatch.setattr(greedy, "POOL", pool)
    monkeypatch.setattr(greedy, "BLOCK", 4)
    for kind, seed, outputs in CASES:
        if outputs:
            activations, fc2 = problem(kind, seed, outputs)
            found = select(activations, fc2, 24)
            assert sorted(found.indices.tolist()) == list(range(24))
            assert found.gains.isfinite().all() and found.gains.min() >= 0


def explained(activations, fc2, indices):
    """Part of the output's variance that the units explain together, by ``lstsq``."""
    output, kept = activations @ fc2.T, activations[:, indices]
    rest = output - kept @ np.linalg.lstsq(kept, output, rcond=None)[0]
    return 1 - np.square(rest).sum() / np.square(output).sum()


def correlated(seed, units=600):
    """More units than the pool holds; many alike, as in a wide MLP."""
    draw = np.random.default_rng(seed)
    activations = relu_activations(draw, 1500, units, 40)
    activations[:, 1::3] += activations[:, ::3]
    fc2 = draw.standard_normal((32, units)) * draw.uniform(0.01, 1, units)
    return activations, fc2


@pytest.mark.parametrize("seed", [0, 1])
def test_large_gram_schmidt_is_exact(seed):
    activations, _ = correlated(seed)
    assert activations.shape[1] > greedy.POOL
    assert_greedy(activations, None, select(activations, None, 200))


@pytest.mark.parametrize("seed", [0, 1])
def test_large_least_squares_loses_under_a_hundredth_to_the_exact_one(monkeypatch, seed):
    activations, fc2 = correlated(seed)
    found = select(activations, fc2, 300)
    monkeypatch.setattr(greedy, "POOL", 600)
    exact = select(activations, fc2, 300)
    assert_greedy(
        activations, fc2, exact._replace(indices=exact.indices[:40], gains=exact.gains[:40])
    )
    output = np.square(activations @ fc2.T).sum()
    for width in (20, 100, 300):
        gained = [float(order.gains[:width].sum()) / output for order in (found, exact)]
        by_hand = explained(activations, fc2, found.indices[:width].numpy())
        assert gained[0] == pytest.approx(by_hand, rel=1e-6)
        assert 0.99 * gained[1] <= gained[0] < 1


def test_all_zero_activations_are_taken_by_index():
    gram = torch.zeros(6, 6, dtype=torch.double)
    for cross in (None, torch.zeros(6, 3, dtype=torch.double)):
        found = greedy.select(gram, cross, 4)
        assert found.indices.tolist() == [0, 1, 2, 3]
        assert found.gains.tolist() == [0] * 4


def test_moments_are_left_as_they_are():
    activations, fc2 = problem(independent, 0, 5)
    gram = torch.from_numpy(activations.T @ activations)
    cross = gram @ torch.from_numpy(fc2).T
    before = gram.clone(), cross.clone()
    greedy.select(gram, cross, 20)
    assert torch.equal(gram, before[0]) and torch.equal(cross, before[1])
