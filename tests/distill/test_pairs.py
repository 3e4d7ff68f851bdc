"""Which pairs a stage sees, in which order, with which pixels and targets."""

import itertools
import pickle
from collections import Counter

import pytest
import tiny
import torch
from dgmr import artefact
from dgmr.answers import Answers
from dgmr.distill.pairs import Batches, PairOrder, Pairs
from dgmr.errors import DgmrError
from dgmr.params import Views
from dgmr.views import ViewTransform
from torch.utils.data import DataLoader, Dataset

SAMPLES = sum(tiny.COUNTS)


def first(order, count, start=0):
    return list(itertools.islice(order.pairs(start), count))


def test_order_is_a_pure_function_of_its_arguments():
    order = PairOrder(10, 2, seed=4)
    shown = first(order, 35)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert first(order, 35) == first(PairOrder(10, 2, seed=4), 35) == shown
    assert torch.equal(torch.get_rng_state(), before)
    assert first(PairOrder(10, 2, seed=5), 35) != shown


@pytest.mark.parametrize("views", [1, 2, 3])
def test_an_epoch_shows_every_sample_once_in_view_e_mod_k(views):
    pairs = first(PairOrder(11, views, seed=0), 11 * 7)
    permutations = set()
    for epoch in range(7):
        shown = pairs[11 * epoch : 11 * (epoch + 1)]
        assert sorted(index for index, _ in shown) == list(range(11))
        assert {view for _, view in shown} == {epoch % views}
        permutations.add(tuple(index for index, _ in shown))
    assert len(permutations) == 7


def test_an_epoch_does_not_depend_on_those_before_it():
    """It is a function of (seed, epoch) alone."""
    for epoch in (3, 10**6):
        generator = torch.Generator().manual_seed(2 * 1_000_003 + epoch)
        expected = torch.randperm(9, generator=generator).tolist()
        shown = first(PairOrder(9, 4, seed=2), 9, start=9 * epoch)
        assert shown == [(index, epoch % 4) for index in expected]


def test_from_any_position_the_order_is_the_tail_of_the_whole():
    order = PairOrder(11, 2, seed=3)
    whole = first(order, 60)
    for start in range(48):
        assert first(order, 12, start) == whole[start : start + 12]


def test_epochs_of_neighbouring_seeds_differ():
    shown = [tuple(first(PairOrder(20, 1, seed), 40)) for seed in range(-2, 6)]
    epochs = [epoch for pairs in shown for epoch in (pairs[:20], pairs[20:])]
    assert len(set(epochs)) == 16


def test_more_pairs_than_samples_come_evenly():
    counts = Counter(first(PairOrder(5, 2, seed=0), 20))
    assert set(counts.values()) == {2} and len(counts) == 10


def joined(parts):
    """A step's pairs from the ranks' shares of it: rank r took step[r::R]."""
    step = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        step[rank :: len(parts)] = part
    return step


class Asked(Dataset):
    """Gives what it is asked for."""

    def __getitem__(self, pairs):
        return pairs


def loaded(sampler, workers):
    loader = DataLoader(Asked(), batch_size=None, sampler=sampler, num_workers=workers)
    return [[tuple(pair) for pair in step] for step in loader]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_ranks_and_workers_share_one_global_order(ranks, workers):
    order = PairOrder(11, 2, seed=6)
    pairs = first(order, 70)
    whole = [pairs[start : start + 7] for start in range(0, 70, 7)]
    found = [loaded(Batches(order, 7, range(10), r, ranks), workers) for r in range(ranks)]
    assert [joined(parts) for parts in zip(*found, strict=True)] == whole
    assert all(len(part) in (7 // ranks, 7 // ranks + 1) for steps in found for part in steps)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_from_any_step_each_rank_sees_the_tail_of_its_share(ranks):
    order = PairOrder(12, 3, seed=1)  # every third step of 4 ends an epoch
    for rank in range(ranks):
        whole = list(Batches(order, 4, range(9), rank, ranks))
        for start in range(9):
            sampler = Batches(order, 4, range(start, 9), rank, ranks)
            assert list(sampler) == whole[start:] and len(sampler) == 9 - start


@pytest.fixture(scope="module")
def rooms(tmp_path_factory, teacher, data):
    """Features rooms by what they hold."""
    folder = tmp_path_factory.mktemp("rooms")
    ways = {
        "plain": {},
        "with pixels": {"pixels": True},
        "online": {"cache": "none"},
        "some": {"patch_tokens": 4, "blocks": [1]},
    }
    return {
        name: tiny.write_features(folder / name, teacher, data, tiny.features_config(**changes))
        for name, changes in ways.items()
    }


@pytest.mark.parametrize("way", ["plain", "with pixels", "online", "some"])
def test_a_batch_holds_the_views_pixels_and_what_the_teacher_said_of_them(
    teacher, data, rooms, way
):
    model = artefact.load(teacher)
    pairs = Pairs(data, rooms[way], model)
    assert len(pairs.images) == SAMPLES
    transform = ViewTransform.for_model(model, Views.model_validate(tiny.VIEWS))
    asked = [(index, view) for index in range(SAMPLES) for view in (1, 0)]
    batch = pairs[asked]
    assert batch.pairs == asked
    expected = [transform(tiny.image(index), f"sample-{index}", view) for index, view in asked]
    assert batch.pixels.dtype == torch.uint8 and torch.equal(batch.pixels, torch.stack(expected))
    if way == "online":
        assert batch.answers == {} and pairs.targets is None
        return
    changes = {"patch_tokens": 4, "blocks": [1]} if way == "some" else {}
    answers = Answers(model, tiny.features_config(**changes))
    with torch.inference_mode():
        said = answers(transform.normalised(batch.pixels))
    assert batch.answers.keys() == said.keys()
    for name, tensor in said.items():
        torch.testing.assert_close(batch.answers[name], tensor, rtol=1e-5, atol=1e-5)


def test_a_loaders_copy_reads_the_same(teacher, data, features):
    pairs = Pairs(data, features, artefact.load(teacher))
    expected = pairs[[(3, 1), (0, 0)]]
    copy = pickle.loads(pickle.dumps(pairs))[[(3, 1), (0, 0)]]  # noqa: S301 - our own bytes
    assert torch.equal(copy.pixels, expected.pixels)
    assert torch.equal(copy.answers["pooled"], expected.answers["pooled"])


def test_missing_rooms_are_told(tmp_path, teacher, data, features):
    model = artefact.load(teacher)
    with pytest.raises(DgmrError, match="run the features stage first"):
        Pairs(data, tmp_path, model)
    with pytest.raises(DgmrError, match="run the data stage first"):
        Pairs(tmp_path, features, model)


def test_features_of_other_views_are_refused(teacher, data, features):
    model = artefact.load(teacher)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    with pytest.raises(DgmrError, match="is about other views: mean was"):
        Pairs(data, features, model)


@pytest.mark.parametrize("verify", [True, False])
def test_targets_are_verified_by_the_one_who_is_to(tmp_path, teacher, data, verify):
    room = tiny.write_features(tmp_path, teacher, data, tiny.features_config())
    tiny.damage(next((tmp_path / "work" / "targets").rglob("*.view1.safetensors")))
    if verify:
        with pytest.raises(DgmrError, match=r"view1\.safetensors is missing or is not"):
            Pairs(data, room, artefact.load(teacher))
    else:
        Pairs(data, room, artefact.load(teacher), verify=False)
