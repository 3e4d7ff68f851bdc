"""The greedy order equals a plain loop's, and column-pivoted QR's within a round."""

import numpy as np
import pytest
import scipy.linalg
import torch
from dgmr.prune import gram_schmidt_order
from dgmr.prune.gram_schmidt import gram_schmidt


def plain_loop(weight, width):
    """The definition, a row at a time, in float64."""
    original = np.asarray(weight, dtype=np.float64)
    free, order, norms = list(range(len(original))), [], []
    while len(order) < width:
        residuals = {row: original[row].copy() for row in free}
        first, taken = None, 0
        while free and len(order) < width and taken < original.shape[1]:
            lengths = {row: np.sqrt((residuals[row] ** 2).sum()) for row in free}
            largest = max(lengths.values())
            first = largest if first is None else first
            if largest <= 1e-10 * first:
                break
            best = min(row for row in free if lengths[row] >= largest - 1e-12 * first)
            direction = residuals[best] / lengths[best]
            free.remove(best)
            for row in free:
                residuals[row] -= (residuals[row] @ direction) * direction
            order.append(best)
            norms.append(lengths[best])
            taken += 1
        if taken == 0:
            rest = free[: width - len(order)]
            order += rest
            norms += [0.0] * len(rest)
    return order, norms


def gaussian(draw, rows, columns):
    return draw.standard_normal((rows, columns))


def heavy_tailed(draw, rows, columns):
    return draw.standard_t(1.5, (rows, columns))


def scales_apart(draw, rows, columns):
    return gaussian(draw, rows, columns) * 10.0 ** draw.uniform(-6, 3, (rows, 1))


def duplicated(draw, rows, columns):
    few = gaussian(draw, max(rows // 3, 1), columns)
    return few[draw.integers(0, len(few), rows)]


def negated_and_zero(draw, rows, columns):
    weight = duplicated(draw, rows, columns) * draw.choice([-1, 1], (rows, 1))
    weight[draw.random(rows) < 0.3] = 0
    return weight


def rank_deficient(draw, rows, columns):
    rank = max(columns // 3, 1)
    return gaussian(draw, rows, rank) @ gaussian(draw, rank, columns)


def whole_numbers(draw, rows, columns):
    """Ties everywhere."""
    return draw.integers(-1, 2, (rows, columns)).astype(float)


def nearly_tied(draw, rows, columns):
    """Ties that are none by bits."""
    return whole_numbers(draw, rows, columns) * (1 + draw.uniform(-2e-13, 2e-13, (rows, 1)))


def zero(_draw, rows, columns):
    return np.zeros((rows, columns))


KINDS = [gaussian, heavy_tailed, scales_apart, duplicated, negated_and_zero, rank_deficient]
KINDS += [whole_numbers, nearly_tied, zero]
# Rows in the pool that the next ones are picked from; the module's own is larger than these matrices.
POOLS = [256, 12, 2]
SHAPES = [
    (40, 10),
    (24, 24),
    (7, 20),
    (1, 9),
    (30, 1),
    (33, 8),
]  # the third: more columns than rows


@pytest.fixture(params=POOLS)
def pool(request, monkeypatch):
    monkeypatch.setattr("dgmr.prune.gram_schmidt._POOL", request.param)


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_order_is_the_plain_loop_s(kind, shape):
    for seed in range(3):
        weight = kind(np.random.default_rng(seed), *shape)
        for width in {shape[0], max(shape[0] // 2, 1)}:
            found = gram_schmidt(torch.tensor(weight), width)
            order, norms = plain_loop(weight, width)
            assert found.indices.tolist() == order, (seed, width)
            np.testing.assert_allclose(found.residual_norms, norms, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_lower_precision_are_taken_as_they_are(dtype):
    for seed in range(4):
        torch.manual_seed(seed)
        weight = torch.nn.Parameter(torch.randn(40, 10).to(dtype))
        order, _ = plain_loop(weight.detach().double().numpy(), 40)
        found = gram_schmidt_order(weight, 40)
        assert found.tolist() == order
        assert found.dtype == torch.long and not found.requires_grad


@pytest.mark.parametrize("kind", [gaussian, duplicated, whole_numbers])
def test_order_is_the_plain_loop_s_where_the_pool_is_a_part(kind):
    weight = kind(np.random.default_rng(0), 320, 40)
    order, norms = plain_loop(weight, 90)
    found = gram_schmidt(torch.tensor(weight), 90)
    assert found.indices.tolist() == order
    np.testing.assert_allclose(found.residual_norms, norms, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("shape", [(60, 20), (20, 20), (12, 20), (900, 300)], ids=str)
def test_a_round_is_pivoted_qr(shape):
    for seed in range(3):
        weight = np.random.default_rng(seed).standard_normal(shape)
        triangle, pivots = scipy.linalg.qr(weight.T, mode="r", pivoting=True)
        width = min(shape)
        found = gram_schmidt(torch.tensor(weight), width)
        assert found.indices.tolist() == pivots[:width].tolist()
        diagonal = np.abs(np.diag(triangle))[:width]
        np.testing.assert_allclose(found.residual_norms, diagonal, rtol=1e-10)


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("kind", KINDS)
def test_order_is_nested_and_takes_no_row_twice(kind):
    weight = torch.tensor(kind(np.random.default_rng(5), 40, 10))
    whole = gram_schmidt(weight, 40)
    assert sorted(whole.indices.tolist()) == list(range(40))
    for width in (0, 1, 2, 9, 10, 11, 25, 39):
        found = gram_schmidt(weight, width)
        assert torch.equal(found.indices, whole.indices[:width])
        torch.testing.assert_close(
            found.residual_norms, whole.residual_norms[:width], rtol=1e-9, atol=1e-12
        )
        assert torch.equal(gram_schmidt_order(weight, width), found.indices)


def test_norms_fall_within_a_round_and_rise_with_the_next():
    weight = torch.tensor(gaussian(np.random.default_rng(0), 40, 10))
    rounds = gram_schmidt(weight, 40).residual_norms.split(10)
    for norms in rounds:
        assert (norms.diff() <= 0).all()
    for before, after in zip(rounds, rounds[1:], strict=False):
        assert after[0] > before[-1]


def test_rounds_start_from_the_original_weights():
    weight = torch.tensor([[3.0, 0], [0, 2], [2.5, 0.1], [0.1, 1]], dtype=torch.double)
    found = gram_schmidt(weight, 4)
    assert found.indices.tolist() == [0, 1, 2, 3]
    expected = [3, 2, np.hypot(2.5, 0.1), (2.5 - 0.01) / np.hypot(2.5, 0.1)]
    np.testing.assert_allclose(found.residual_norms, expected)


def test_ties_go_to_the_lowest_index_and_floor_ends_a_round():
    tie = torch.eye(3, dtype=torch.double)
    tie[2] *= 1 + 1e-13
    assert gram_schmidt_order(tie, 3).tolist() == [0, 1, 2]
    tie[2] *= 1 + 1e-11
    assert gram_schmidt_order(tie, 3).tolist() == [2, 0, 1]
    # Row 1 adds 1e-11 to row 2: under the floor, so a new round starts, with it and its own norm.
    flat = torch.tensor([[0.1, 0], [0.5, 1e-11], [1, 0]], dtype=torch.double)
    found = gram_schmidt(flat, 3)
    assert found.indices.tolist() == [2, 1, 0]
    np.testing.assert_allclose(found.residual_norms, [1, 0.5, 0.1])


@pytest.mark.usefixtures("pool")
def test_a_row_outside_the_pool_may_tie_with_the_best_within():
    rows = torch.diag(torch.tensor([1, 2, 1 + 1e-13], dtype=torch.double))
    assert gram_schmidt_order(rows, 3).tolist() == [1, 0, 2]


def test_weight_is_left_as_it_is():
    weight = torch.randn(12, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    gram_schmidt(weight, 12)
    assert torch.equal(weight, before)


def test_no_rows_wanted():
    found = gram_schmidt(torch.randn(3, 2), 0)
    assert found.indices.shape == found.residual_norms.shape == (0,)
    assert found.indices.dtype == torch.long


@pytest.mark.parametrize(
    ("weight", "width", "said"),
    [
        (torch.zeros(4), 2, r"matrix \[M, N\], not \[4\]"),
        (torch.zeros(4, 2, 1), 2, r"not \[4, 2, 1\]"),
        (torch.zeros(4, 2), 5, "width 5 must be between 0 and the 4 rows"),
        (torch.zeros(4, 2), -1, "width -1"),
        (torch.tensor([[1.0, float("nan")]]), 1, "NaN or infinity"),
        (torch.tensor([[1.0, float("-inf")]]), 1, "NaN or infinity"),
    ],
)
def test_what_cannot_be_ordered_is_refused(weight, width, said):
    with pytest.raises(ValueError, match=said):
        gram_schmidt(weight, width)
