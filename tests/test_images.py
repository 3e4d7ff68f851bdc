"""Calibration images are the first of the room, as the model's own transform makes them."""

import pytest
import timm
import tiny
import torch
from dgmr.errors import DgmrError
from dgmr.images import calibration_images, count_of, some_tokens

ALL = sum(tiny.COUNTS)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("images") / "data")


def loader(room, samples, batch_size=4, model=None):
    config = tiny.features_config(calibration={"samples": samples}, batch_size=batch_size)
    return calibration_images(room, model or tiny.vit(), config)


def expected(model, count):
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    return torch.stack([transform(tiny.image(index)) for index in range(count)])


@pytest.mark.parametrize("samples", [1, 5, 7, ALL, 1000])
def test_images_are_the_first_of_all_shards_in_order(room, samples):
    batches = loader(room, samples)
    count = min(samples, ALL)
    assert count_of(batches) == count
    assert torch.equal(torch.cat(list(batches)), expected(tiny.vit(), count))


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(1, [1] * ALL), (4, [4, 4, 1]), (ALL, [ALL]), (64, [ALL])]
)
def test_batches_are_full_but_for_the_last(room, batch_size, sizes):
    assert [len(batch) for batch in loader(room, ALL, batch_size)] == sizes


def test_a_second_pass_gives_the_same_again(room):
    batches = loader(room, ALL)
    assert all(map(torch.equal, batches, list(batches)))


def test_images_are_normalised_as_the_model_says(room):
    model = tiny.vit()
    model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 1.0), "crop_pct": 0.7}
    found = torch.cat(list(loader(room, 3, model=model)))
    assert torch.equal(found, expected(model, 3))
    assert not torch.equal(found, expected(tiny.vit(), 3))


@pytest.mark.parametrize("samples", [1, 5, 6, 1000])
def test_shards_are_verified_if_and_only_if_they_are_read(tmp_path, samples):
    """The first shard has five images, the second none, the third four."""
    room = tiny.write_data(tmp_path / "data")
    tiny.damage(room / "00002.tar")
    if samples > 5:
        with pytest.raises(
            DgmrError, match=r"00002\.tar is not the shard that manifest\.json lists"
        ):
            loader(room, samples)
    else:
        assert count_of(loader(room, samples)) == samples
    tiny.damage(room / "00000.tar")
    with pytest.raises(DgmrError, match=r"00000\.tar is not the shard that manifest\.json lists"):
        loader(room, samples)


# Tokens


def numbered(images, tokens, n=3):
    """Every token says of which image it is and which of its tokens, ``n`` times over."""
    image, token = torch.meshgrid(torch.arange(images), torch.arange(tokens), indexing="ij")
    return torch.stack([image, token], 2).float().repeat(1, 1, n)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("count", [1, 5, 16])
def test_tokens_are_whole_and_of_their_own_image(count):
    found = some_tokens(numbered(6, 17), count, seeded())
    assert found.shape == (6, count, 6)
    for image, tokens in enumerate(found):
        assert (tokens[:, 0::2] == image).all()
        assert (tokens[:, 1::2] == tokens[:, 1:2]).all()
        assert len(set(tokens[:, 1].tolist())) == count


@pytest.mark.parametrize("count", [17, 18, 1000])
def test_all_tokens_are_kept_in_order_where_there_are_no_more(count):
    inputs = numbered(2, 17)
    assert torch.equal(some_tokens(inputs, count, seeded()), inputs)


def test_tokens_are_drawn_anew_for_each_image_and_call():
    generator = seeded()
    first, second = (some_tokens(numbered(8, 17), 4, generator) for _ in range(2))
    choices = {tuple(tokens[:, 1].tolist()) for tokens in torch.cat([first, second])}
    assert len(choices) == 16


def test_draws_follow_the_generator_alone():
    inputs = numbered(8, 17)
    first = some_tokens(inputs, 4, seeded())
    torch.manual_seed(99)
    assert torch.equal(some_tokens(inputs, 4, seeded()), first)
    assert not torch.equal(some_tokens(inputs, 4, seeded(1)), first)


def test_every_token_is_as_likely_as_the_others():
    images, tokens, count = 4000, 10, 3
    found = some_tokens(numbered(images, tokens), count, seeded())[:, :, 1]
    share = found.long().flatten().bincount(minlength=tokens) / images
    # Five standard deviations of a share of 3 in 10.
    assert (share - count / tokens).abs().max() < 5 * (0.3 * 0.7 / images) ** 0.5
