"""Loss terms against plain numpy."""

import numpy as np
import pytest
import torch
from dgmr.distill import losses
from dgmr.distill.losses import TERMS, weighted
from dgmr.params import LossWeights

SHAPES = {
    "pooled": (3, 8),
    "patch_tokens": (3, 5, 8),
    "blocks.1": (3, 6, 8),
    "blocks.4": (3, 2, 16),  # Swin's blocks differ
}
NAMES = {name: [key for key in SHAPES if key.startswith(name)] for name in TERMS}


def said(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(*s, generator=generator).to(dtype) for n, s in SHAPES.items()}


def mean_square(a, b):
    return ((a.double().detach().numpy() - b.double().detach().numpy()) ** 2).mean()


def error(name, student, teacher):
    return np.mean([mean_square(student[key], teacher[key]) for key in NAMES[name]])


@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_the_mean_squared_error(name):
    student, teacher = said(0), said(1)
    expected = error(name, student, teacher)
    assert TERMS[name](student, teacher).item() == pytest.approx(expected, rel=1e-6)
    assert TERMS[name](teacher, teacher).item() == 0


def test_blocks_count_alike_whatever_their_size():
    student, teacher = said(0), said(1)
    student["blocks.4"] = teacher["blocks.4"]
    expected = mean_square(student["blocks.1"], teacher["blocks.1"]) / 2
    assert TERMS["blocks"](student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_terms_have_the_names_of_their_weights():
    assert list(TERMS) == list(LossWeights.model_fields)


@pytest.mark.parametrize("given", [(1, 1, 0), (0.5, 2, 3), (0, 3, 0), (2, 0, 0.25), (0, 0, 1)])
def test_the_loss_is_the_weighted_sum_of_unweighted_terms(given):
    student, teacher = said(0), said(1)
    loss, terms = weighted(LossWeights(**dict(zip(TERMS, given, strict=True))), student, teacher)
    errors = [error(name, student, teacher) for name in TERMS]
    assert loss.item() == pytest.approx(np.dot(given, errors), rel=1e-6)
    used = {name: e for name, weight, e in zip(TERMS, given, errors, strict=True) if weight}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(used, rel=1e-6)


@pytest.mark.parametrize("name", TERMS)
def test_a_weight_of_zero_is_not_computed_and_gives_no_gradient(monkeypatch, name):
    def never(*_):
        raise AssertionError(f"{name} was computed")

    monkeypatch.setitem(losses.TERMS, name, never)
    student = {key: value.requires_grad_() for key, value in said(0).items()}
    teacher = {key: value for key, value in said(1).items() if key not in NAMES[name]}
    weights = LossWeights(**{other: float(other != name) for other in TERMS})
    loss, terms = weighted(weights, student, teacher)
    loss.backward()
    assert name not in terms and len(terms) == 2
    for key, value in student.items():
        assert (value.grad is None) == (key in NAMES[name])
    assert not any(term.requires_grad for term in terms.values())


def test_gradients_are_those_of_the_means():
    student = {key: value.requires_grad_() for key, value in said(0).items()}
    teacher = said(1)
    weighted(LossWeights(pooled=3, blocks=0.5), student, teacher)[0].backward()
    weights = {"pooled": 3, "patch_tokens": 1, "blocks.1": 0.25, "blocks.4": 0.25}
    for key, value in student.items():
        expected = weights[key] * 2 * (value - teacher[key]) / value.numel()
        torch.testing.assert_close(value.grad, expected.detach())


def test_half_precision_is_compared_in_float32():
    student, teacher = said(0, torch.bfloat16), said(1, torch.float16)
    loss, _ = weighted(LossWeights(blocks=1), student, teacher)
    assert loss.dtype == torch.float32
    expected = sum(error(name, student, teacher) for name in TERMS)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
