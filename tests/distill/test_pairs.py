"""Which pairs a stage sees, in which order, with which pixels and targets."""

import pickle
from collections import Counter

import pytest
import tiny
import torch
from dgmr import artefact
from dgmr.distill.pairs import PairOrder, Pairs
from dgmr.errors import DgmrError
from dgmr.models import outputs
from dgmr.params import Views
from dgmr.views import ViewTransform

SAMPLES = sum(tiny.COUNTS)


def test_order_is_a_pure_function_of_its_arguments():
    order = PairOrder(10, 2, 35, seed=4)
    first = list(order)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert list(order) == list(PairOrder(10, 2, 35, seed=4)) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert list(PairOrder(10, 2, 35, seed=5)) != first
    assert len(order) == len(first) == 35


@pytest.mark.parametrize("views", [1, 2, 3])
def test_an_epoch_shows_every_sample_once_in_one_view(views):
    pairs = list(PairOrder(11, views, 11 * 7, seed=0))
    permutations = set()
    for epoch in range(7):
        shown = pairs[11 * epoch : 11 * (epoch + 1)]
        assert sorted(index for index, _ in shown) == list(range(11))
        assert {view for _, view in shown} == {epoch % views}
        permutations.add(tuple(index for index, _ in shown))
    assert len(permutations) == 7


def test_fewer_pairs_are_the_first_ones():
    whole = list(PairOrder(11, 2, 50, seed=3))
    for total in (1, 11, 12, 49):
        assert list(PairOrder(11, 2, total, seed=3)) == whole[:total]


def test_epochs_of_neighbouring_seeds_differ():
    shown = [tuple(PairOrder(20, 1, 40, seed)) for seed in range(-2, 6)]
    epochs = [epoch for pairs in shown for epoch in (pairs[:20], pairs[20:])]
    assert len(set(epochs)) == 16


def test_a_pair_holds_the_view_s_pixels_and_what_the_teacher_said_of_them(teacher, data, features):
    model = artefact.load(teacher)
    pairs = Pairs(data, features, model)
    assert (len(pairs.images), pairs.views.count) == (SAMPLES, 2)
    transform = ViewTransform.for_model(model, Views.model_validate(tiny.VIEWS))
    for index in range(SAMPLES):
        for view in (0, 1):
            pair = pairs[index, view]
            assert torch.equal(pair.image, transform(tiny.image(index), f"sample-{index}", view))
            with torch.inference_mode():
                said = outputs(model, pair.image[None])
            torch.testing.assert_close(pair.teacher.pooled, said.pooled[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                pair.teacher.patch_tokens, said.patch_tokens[0], rtol=1e-5, atol=1e-5
            )


def test_a_loader_s_copy_reads_the_same(teacher, data, features):
    pairs = Pairs(data, features, artefact.load(teacher))
    expected = pairs[3, 1]
    copy = pickle.loads(pickle.dumps(pairs))  # noqa: S301 - our own bytes
    assert torch.equal(copy[3, 1].image, expected.image)
    assert torch.equal(copy[3, 1].teacher.pooled, expected.teacher.pooled)


def test_missing_rooms_are_told(tmp_path, teacher, data, features):
    model = artefact.load(teacher)
    with pytest.raises(DgmrError, match="run the features stage first"):
        Pairs(data, tmp_path, model)
    with pytest.raises(DgmrError, match="run the data stage first"):
        Pairs(tmp_path, features, model)


def test_more_pairs_than_samples_come_evenly():
    counts = Counter(PairOrder(5, 2, 20, seed=0))
    assert set(counts.values()) == {2} and len(counts) == 10
