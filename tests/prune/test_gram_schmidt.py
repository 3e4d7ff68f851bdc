"""The greedy order equals a plain loop's, and column-pivoted QR's within a round."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from dgmr.prune import gram_schmidt_order
from dgmr.prune.gram_schmidt import _Round, gram_schmidt
from safetensors import safe_open

TEACHER = Path(__file__).parents[2] / "resources/teachers/fashion-vit/model.safetensors"


def plain_loop(weight, width):
    """The definition, a row at a time, in float64."""
    original = np.asarray(weight, dtype=np.float64)
    free, order, norms = np.ones(len(original), dtype=bool), [], []
    while len(order) < width:
        residuals = original.copy()
        first, taken = None, 0
        while free.any() and len(order) < width and taken < original.shape[1]:
            lengths = np.where(free, np.sqrt((residuals**2).sum(1)), -1)
            largest = lengths.max()
            first = largest if first is None else first
            if largest <= 1e-10 * first:
                break
            best = np.flatnonzero(lengths >= largest - 1e-12 * first)[0]
            direction = residuals[best] / lengths[best]
            free[best] = False
            for row in np.flatnonzero(free):
                residuals[row] -= (residuals[row] @ direction) * direction
            order.append(int(best))
            norms.append(lengths[best])
            taken += 1
        if taken == 0:
            rest = np.flatnonzero(free)[: width - len(order)].tolist()
            order += rest
            norms += [0.0] * len(rest)
    return order, norms


def gaussian(draw, rows, columns):
    return draw.standard_normal((rows, columns))


def heavy_tailed(draw, rows, columns):
    return draw.standard_t(1.5, (rows, columns))


def scaled(draw, rows, columns):
    return gaussian(draw, rows, columns) * draw.random((rows, 1))


def nearly_collinear(draw, rows, columns):
    return gaussian(draw, 1, columns) + 1e-4 * gaussian(draw, rows, columns)


def low_precision(draw, rows, columns):
    weight = torch.tensor(0.02 * gaussian(draw, rows, columns))
    return weight.bfloat16().double().numpy()


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


KINDS = [gaussian, scaled, heavy_tailed, nearly_collinear, low_precision, scales_apart, duplicated]
KINDS += [negated_and_zero, rank_deficient, whole_numbers, nearly_tied, zero]
# Rows in the pool that the next ones are picked from, and in its head; the module's own is larger than
# these matrices.
POOLS = [(512, 160), (12, 4), (2, 1)]
SHAPES = [
    (40, 10),
    (24, 24),
    (7, 20),
    (1, 9),
    (30, 1),
    (33, 8),
]  # the third: more columns than rows


@pytest.fixture(params=POOLS, ids=str)
def pool(request, monkeypatch):
    size, head = request.param
    monkeypatch.setattr("dgmr.prune.gram_schmidt._POOL", size)
    monkeypatch.setattr("dgmr.prune.gram_schmidt._HEAD", head)


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


@pytest.mark.parametrize("shape", [(700, 40), (600, 150)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_order_is_the_plain_loop_s_where_the_pool_is_a_part(kind, shape):
    weight, width = kind(np.random.default_rng(0), *shape), 180
    order, norms = plain_loop(weight, width)
    found = gram_schmidt(torch.tensor(weight), width)
    assert found.indices.tolist() == order
    np.testing.assert_allclose(found.residual_norms, norms, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("block", [0, 5])
def test_order_of_trained_weights_is_the_plain_loop_s(block):
    with safe_open(TEACHER, framework="pt") as file:
        weight = file.get_tensor(f"blocks.{block}.mlp.fc1.weight")
    width = 2 * weight.shape[1] + 10
    assert gram_schmidt_order(weight, width).tolist() == plain_loop(weight, width)[0]


@pytest.mark.parametrize("shape", [(300, 100), (100, 100), (60, 100), (700, 200)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_takes_rows_as_diverse_as_the_best(kind, shape, monkeypatch):
    rounds = []

    def recorded(self, most, run=_Round.run):
        taken = run(self, most)
        rounds.append(len(taken[0]))
        return taken

    monkeypatch.setattr(_Round, "run", recorded)
    for seed in range(2):
        weight = kind(np.random.default_rng(seed), *shape).astype(np.float32)
        width = min(shape[0], shape[1] + shape[1] // 2)
        rounds.clear()
        found = gram_schmidt(torch.tensor(weight), width, dtype=torch.float32)
        assert found.residual_norms.dtype == torch.float64
        assert len(set(found.indices.tolist())) == width
        order, free = iter(found.indices.tolist()), np.ones(len(weight), dtype=bool)
        norms = iter(found.residual_norms.tolist())
        for length in rounds:
            residuals = weight.astype(np.float64)
            first = np.linalg.norm(residuals[free], axis=1).max()
            for _ in range(length):
                row = next(order)
                lengths = np.linalg.norm(residuals, axis=1)
                assert lengths[row] >= lengths[free].max() - 5e-6 * first
                assert next(norms) == pytest.approx(lengths[row], abs=5e-6 * first)
                direction = residuals[row] / lengths[row]
                residuals -= np.outer(residuals @ direction, direction)
                free[row] = False
            left = np.linalg.norm(residuals[free], axis=1).max(initial=0)
            ended_early = length < shape[1] and sum(~free) < width
            assert not ended_early or left <= 1.1e-5 * first


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
        (torch.tensor([[1.0, 1e200]], dtype=torch.double), 1, "too large for torch.float64"),
    ],
)
def test_what_cannot_be_ordered_is_refused(weight, width, said):
    with pytest.raises(ValueError, match=said):
        gram_schmidt(weight, width)


def test_it_computes_in_float64_or_float32():
    with pytest.raises(ValueError, match="not torch.float16"):
        gram_schmidt_order(torch.ones(2, 2), 1, dtype=torch.float16)
