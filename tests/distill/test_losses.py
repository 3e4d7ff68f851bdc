"""Loss terms against plain numpy."""

import numpy as np
import pytest
import torch
from dgmr.distill.losses import TERMS, weighted
from dgmr.models import Outputs
from dgmr.params import LossWeights


def said(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(3, 8, generator=generator).to(dtype)
    return Outputs(pooled, torch.randn(3, 5, 8, generator=generator).to(dtype))


def mean_square(a, b):
    return ((a.double().detach().numpy() - b.double().detach().numpy()) ** 2).mean()


@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_the_mean_squared_error(name):
    student, teacher = said(0), said(1)
    expected = mean_square(getattr(student, name), getattr(teacher, name))
    assert TERMS[name](student, teacher).item() == pytest.approx(expected, rel=1e-6)
    assert TERMS[name](teacher, teacher).item() == 0


def test_terms_have_the_names_of_their_weights():
    assert list(TERMS) == list(LossWeights.model_fields)


@pytest.mark.parametrize("weights", [(1, 1), (0.5, 2), (0, 3), (2, 0)])
def test_the_loss_is_the_weighted_sum_of_unweighted_terms(weights):
    student, teacher = said(0), said(1)
    loss, terms = weighted(
        LossWeights(pooled=weights[0], patch_tokens=weights[1]), student, teacher
    )
    errors = [mean_square(a, b) for a, b in zip(student, teacher, strict=True)]
    assert loss.item() == pytest.approx(np.dot(weights, errors), rel=1e-6)
    assert [term.item() for term in terms.values()] == pytest.approx(errors, rel=1e-6)


def test_a_weight_of_zero_gives_no_gradient():
    student = Outputs(*(value.requires_grad_() for value in said(0)))
    loss, terms = weighted(LossWeights(pooled=0), student, said(1))
    loss.backward()
    assert not student.pooled.grad.any()
    expected = 2 * (student.patch_tokens - said(1).patch_tokens) / student.patch_tokens.numel()
    torch.testing.assert_close(student.patch_tokens.grad, expected.detach())
    assert not any(term.requires_grad for term in terms.values())


def test_half_precision_is_compared_in_float32():
    student, teacher = said(0, torch.bfloat16), said(1, torch.float16)
    loss, _ = weighted(LossWeights(), student, teacher)
    expected = sum(mean_square(a, b) for a, b in zip(student, teacher, strict=True))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)
