"""How many hidden units stay: each knob's arithmetic, and a budget that is kept and well spent."""

import itertools
import random
import re

import pytest
import tiny
import torch
from dgmr import artefact, loader
from dgmr.errors import DgmrError
from dgmr.mlps import PrunableMlp, mlps, widths
from dgmr.params import Prune, Stage, StagePrune
from dgmr.prune import orders
from dgmr.prune.assemble import assemble
from dgmr.prune.model import build
from dgmr.prune.widths import reach, resolve, shrunk, students
from timm.layers import Mlp


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def skeleton(family):
    with torch.device("meta"):
        return tiny.FAMILIES[family]()


def planned(model, gains=None, **knobs):
    return resolve(mlps(model), Prune(**knobs), parameters(model), gains)


def falling(model, seed=0, max_ratio=2.0):
    """Random gains that fall, each MLP's at its own pace."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for index, (name, mlp) in enumerate(mlps(model).items()):
        gains = torch.rand(reach(mlp, max_ratio), generator=draw, dtype=torch.double)
        found[name] = gains.sort(descending=True).values.pow(1 + 3 * index)
    return found


@pytest.mark.parametrize(
    ("family", "knobs", "expected"),
    [
        ("class token", {"ratio": 1.3}, [41, 41]),
        ("swin", {"ratio": 1.3}, [20, 41]),
        ("class token", {"keep": 0.3}, [38, 38]),
        ("swin", {"keep": 0.3}, [19, 38]),
        ("class token", {"hidden_features": {"blocks.1.mlp": 9}}, [128, 9]),
        ("class token", {"ratio": 1.3, "round_to": 16}, [48, 48]),
        ("class token", {"ratio": 1.5, "round_to": 16}, [48, 48]),
        ("class token", {"hidden_features": {"blocks.1.mlp": 9}, "round_to": 8}, [128, 16]),
        ("attention pool", {"ratio": 1.3}, [41, 41]),
        ("attention pool", {"ratio": 1.3, "include_pool_head": False}, [41, 86]),
        ("attention pool", {"ratio": 2.5, "max_ratio": 3.0, "round_to": 100}, [86, 86]),  # all
    ],
)
def test_widths_are_what_the_knobs_say(family, knobs, expected):
    model = skeleton(family)
    found = planned(model, **knobs)
    assert list(found) == list(widths(model))
    assert list(found.values()) == expected


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        (
            {"ratio": 0.03},
            "blocks.0.mlp would keep 0 hidden units, but it has 128 .* from 1 to 128",
        ),
        ({"ratio": 4.5, "max_ratio": 5.0}, "would keep 144 hidden units, but it has 128"),
        ({"keep": 0.001}, "blocks.0.mlp would keep 0 hidden units"),
        (
            {"hidden_features": {"blocks.7.mlp": 3}},
            "no MLP blocks.7.mlp to be pruned; it has blocks.0.mlp",
        ),
        ({"hidden_features": {"blocks.1.mlp": 200}}, "blocks.1.mlp would keep 200 hidden units"),
        ({"keep": 0.6}, "would keep 76 .*max_ratio 2 orders only 64: raise it to at least 2.375"),
        ({"ratio": 1.9, "round_to": 50}, "would keep 100 .*orders only 64: .* at least 3.125"),
    ],
)
def test_impossible_widths_are_refused(knobs, says):
    with pytest.raises(DgmrError, match=says):
        planned(skeleton("class token"), **knobs)


def test_pool_head_cannot_be_named_where_it_is_left_out():
    model = skeleton("attention pool")
    wanted = {"hidden_features": {"attn_pool.mlp": 20}}
    assert planned(model, **wanted)["attn_pool.mlp"] == 20
    with pytest.raises(DgmrError, match="no MLP attn_pool.mlp"):
        planned(model, **wanted, include_pool_head=False)


@pytest.mark.parametrize("dim", [29, 100, 1024])
def test_advice_on_max_ratio_is_enough(dim):
    found = {"mlp": PrunableMlp(Mlp(dim, 4 * dim, device="meta"))}
    for width in range(dim + 1, 4 * dim, 1 + dim // 25):
        knobs = {"hidden_features": {"mlp": width}}
        with pytest.raises(DgmrError, match="raise it to at least") as error:
            resolve(found, Prune(**knobs, max_ratio=1.0), 10**9)
        advised = float(re.search(r"at least ([\d.]+)\.$", str(error.value))[1])
        assert resolve(found, Prune(**knobs, max_ratio=advised), 10**9) == {"mlp": width}
        assert advised < (width + 1) / dim + 1e-4  # and no more than needed


@pytest.mark.parametrize("family", ["class token", "swin", "attention pool", "packed"])
@pytest.mark.parametrize("round_to", [1, 7])
def test_student_is_within_its_budget_and_a_step_of_it(family, round_to):
    model = skeleton(family)
    whole, found = parameters(model), mlps(model)
    knobs = {"round_to": round_to, "max_ratio": 1.9}
    most = planned(model, hidden_features={name: 7 for name in found}, **knobs)
    with torch.device("meta"):
        least = parameters(build(model, most)) / whole
    beyond = sum((m.hidden_features - reach(m, 1.9)) * m.unit_parameters for m in found.values())
    for part in (0.2, 0.8):
        budget = least + part * (1 - beyond / whole - least)
        gains = falling(model, max_ratio=1.9)
        chosen = planned(model, gains, budget=budget, **knobs)
        with torch.device("meta"):
            student = build(model, chosen)
        assert widths(student) == chosen
        left = budget * whole - parameters(student)
        assert left >= 0
        for name, mlp in found.items():
            limit = reach(mlp, 1.9)
            if limit < mlp.hidden_features:
                limit -= limit % round_to
            assert chosen[name] % round_to == 0 or chosen[name] == mlp.hidden_features
            step = min(round_to, limit - chosen[name])
            assert step == 0 or left <= step * mlp.unit_parameters


def test_more_units_go_where_gains_fall_slower():
    model = skeleton("class token")
    steep, flat = 0.8 ** torch.arange(64.0), 0.99 ** torch.arange(64.0)
    one, other = mlps(model)
    by_gains = planned(model, {one: steep, other: flat}, budget=0.5)
    assert by_gains[other] > 2 * by_gains[one]
    swapped = planned(model, {one: flat, other: steep}, budget=0.5)
    assert (swapped[one], swapped[other]) == (by_gains[other], by_gains[one])
    alike = planned(model, budget=0.5)
    assert abs(alike[one] - alike[other]) <= 1
    assert sum(alike.values()) == sum(by_gains.values())


def swaps(chosen, step, reaches):
    """All widths with one step taken from an MLP and given to another."""
    for one, other in itertools.permutations(chosen, 2):
        if chosen[one] > step and chosen[other] + step <= reaches[other]:
            yield chosen | {one: chosen[one] - step, other: chosen[other] + step}


@pytest.mark.parametrize("step", [1, 4])
def test_no_swap_gains_more_within_the_budget(step):
    model = skeleton("registers")
    for seed in range(10):
        draw = random.Random(seed)
        gains = falling(model, seed)
        chosen = planned(model, gains, budget=draw.uniform(0.55, 0.65), round_to=step)

        def gained(found, gains=gains):
            return sum(float(gains[name][:width].sum()) for name, width in found.items())

        others = list(swaps(chosen, step, dict.fromkeys(chosen, 64)))
        assert others
        assert max(map(gained, others)) <= gained(chosen) + 1e-12


def test_best_of_all_widths_is_found():
    """Every pair of widths of two small MLPs, tried."""
    found = {name: PrunableMlp(Mlp(4, 12, device="meta")) for name in "ab"}
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        gains = {n: torch.rand(12, generator=draw).sort(descending=True).values for n in found}
        unit = found["a"].unit_parameters
        params = 24 * unit + 30
        for budget in (0.3, 0.5, 0.8):
            chosen = resolve(found, Prune(budget=budget, max_ratio=3.0), params, gains)
            possible = [
                (float(gains["a"][:a].sum() + gains["b"][:b].sum()), a, b)
                for a, b in itertools.product(range(1, 13), repeat=2)
                if (a + b) * unit + 30 <= budget * params
            ]
            assert (chosen["a"], chosen["b"]) == max(possible)[1:]


def test_constant_gains_spend_all_whatever_the_last_step():
    """Rounding in the mean over a short last step must not put it before the others."""
    for units in range(20, 100, 6):
        found = {name: PrunableMlp(Mlp(8, units, device="meta")) for name in "ab"}
        gains = {name: torch.full((units,), 1 / units, dtype=torch.double) for name in found}
        unit = found["a"].unit_parameters
        for round_to, budget in itertools.product((3, 7, 11), (0.7, 0.9, 1.0)):
            knobs = Prune(budget=budget, round_to=round_to, max_ratio=units / 8 + 1)
            chosen = resolve(found, knobs, 2 * units * unit, gains)
            left = int(budget * (2 * units * unit)) // unit - sum(chosen.values())
            assert left >= 0
            steps = [min(round_to, units - width) for width in chosen.values() if width < units]
            assert all(left < step for step in steps), (units, round_to, budget, chosen)


def test_gains_that_rise_again_are_held_down():
    """A second round of Gram-Schmidt starts high; its units are not worth more than those before."""
    model = skeleton("class token")
    one, other = mlps(model)
    rising = torch.cat([torch.linspace(1, 0.01, 32), torch.linspace(1, 0.01, 32)])
    steady = torch.linspace(0.9, 0.02, 64)
    chosen = planned(model, {one: rising, other: steady}, budget=0.6)
    assert chosen[one] <= 33 < chosen[other]


@pytest.mark.parametrize("given", [None, falling])
def test_budgets_out_of_range_are_told_the_range(given):
    model = skeleton("class token")
    gains = given and given(model)
    with pytest.raises(
        DgmrError, match=r"budget 0.1 is too small: .* still has 0\.\d{4} of"
    ) as low:
        planned(model, gains, budget=0.1)
    least = float(re.search(r"still has ([\d.]+) of", str(low.value))[1])
    with torch.device("meta"):
        thin = build(model, {name: 1 for name in mlps(model)})
        wide = build(model, {name: 64 for name in mlps(model)})
    assert least == pytest.approx(parameters(thin) / parameters(model), abs=1e-4)
    assert planned(model, gains, budget=least + 1e-3)
    with pytest.raises(DgmrError, match="budget 0.95 is more than prune.max_ratio 2 lets") as high:
        planned(model, gains, budget=0.95)
    most = float(re.search(r"student have \(([\d.]+) of", str(high.value))[1])
    assert most == pytest.approx(parameters(wide) / parameters(model), abs=1e-4)
    assert set(planned(model, gains, budget=most + 1e-3).values()) == {64}
    assert set(planned(model, budget=0.999, max_ratio=4.0).values()) <= {127, 128}


def test_student_of_a_dense_pool_head_is_loaded_by_its_loader(tmp_path):
    teacher = tiny.write_teacher(tmp_path / "teacher", tiny.siglip())
    config = Prune(ratio=1.0, include_pool_head=False, compensate="none")
    orders.compute(teacher, config, 0, tmp_path / "orders")
    assemble(teacher, tmp_path / "orders", [], config, tmp_path / "pruned")
    assert (tmp_path / "pruned" / "loader.py").is_file()
    student = loader.load(tmp_path / "pruned")
    assert widths(student) == {"blocks.0.mlp": 32, "attn_pool.mlp": 86}
    dense = artefact.load(teacher).attn_pool.state_dict()
    assert all(torch.equal(student.attn_pool.state_dict()[key], t) for key, t in dense.items())
    with torch.inference_mode():
        assert student(tiny.pixels()).isfinite().all()


def shrunk_to(model, config=None, **stage):
    return list(shrunk(model, StagePrune(**stage), Prune(**(config or {"ratio": 2.0}))).values())


def test_a_stage_shrinks_what_it_names():
    model = skeleton("class token")
    assert shrunk_to(model, ratio=1.3) == [41, 41]
    assert shrunk_to(model, ratio=1.3, blocks=[1, 1]) == [128, 41]
    assert shrunk_to(model, {"ratio": 2.0, "round_to": 16}, ratio=1.3) == [48, 48]
    assert shrunk_to(skeleton("swin"), ratio=1.3) == [20, 41]
    siglip = skeleton("attention pool")
    assert shrunk_to(siglip, ratio=1.3) == [41, 41]
    assert shrunk_to(siglip, ratio=1.3, blocks=[0, 0]) == [41, 86]
    assert shrunk_to(siglip, {"ratio": 2.0, "include_pool_head": False}, ratio=1.3) == [41, 86]


def test_a_stage_that_would_grow_an_mlp_is_refused():
    with torch.device("meta"):
        model = build(skeleton("class token"), {"blocks.0.mlp": 60, "blocks.1.mlp": 40})
    assert shrunk_to(model, ratio=1.25) == [40, 40]
    with pytest.raises(
        DgmrError, match=r"blocks\.1\.mlp would keep 41 .*, but it has only 40 left"
    ):
        shrunk_to(model, ratio=1.3)
    assert shrunk_to(model, ratio=1.3, blocks=[0, 0]) == [41, 40]
    with pytest.raises(DgmrError, match="there are no blocks 0 to 2; the student's are 0 to 1"):
        shrunk_to(model, ratio=1.0, blocks=[0, 2])


def test_students_are_what_each_stage_leaves():
    about = {"train": "mlp", "samples": 64, "lr": 1e-3}
    stages = {
        "one": Stage(**about, prune=StagePrune(ratio=1.5, blocks=[0, 0])),
        "two": Stage(**about),
        "three": Stage(**about, prune=StagePrune(ratio=1.0)),
    }
    found = students(skeleton("class token"), Prune(ratio=2.0), stages)
    expected = {"pruned": [64, 64], "one": [48, 64], "two": [48, 64], "three": [32, 32]}
    assert {name: list(widths(model).values()) for name, model in found.items()} == expected
    assert all(p.is_meta for model in found.values() for p in model.parameters())


def test_a_stage_that_cannot_prune_is_told_by_its_name():
    about = {"train": "mlp", "samples": 64, "lr": 1e-3}
    stages = {"one": Stage(**about), "two": Stage(**about, prune=StagePrune(ratio=1.5))}
    says = r"distill\.stages\.two\.prune.*blocks\.0\.mlp would keep 48 .* only 32 left"
    with pytest.raises(DgmrError, match=says):
        students(skeleton("class token"), Prune(ratio=1.0), stages)
