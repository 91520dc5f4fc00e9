"""Plans: counts, floors, ties, units, files and forecasts, on layers of arbitrary shapes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from hydrasurgery.choose import NEEDS_SCORES, STRATEGIES, plan_heads
from hydrasurgery.costs import forecast
from hydrasurgery.dialect.names import FULL, LINEAR
from hydrasurgery.errors import PlanError
from hydrasurgery.ir.capture import capture
from hydrasurgery.plan import Plan
from hydrasurgery.selection.agreement import compare, spearman
from hydrasurgery.selection.scores import HeadScores, LayerScores


def region(layer=0, heads=8, shared=4, dim=16, window=None, **more):
    name = f"model.layers.{layer}.self_attn"
    shape = {"num_heads": heads, "num_key_value_heads": shared, "head_dim": dim, "value_dim": dim, "window": window}
    return SimpleNamespace(name=name, **shape, **more)


def regions(layers=6, heads=8, shared=4, **more):
    return [region(layer, heads, shared, **more) for layer in range(layers)]


def scores(importance, error=None, shared=4):
    zeros = (0.0,) * len(importance[0])
    return HeadScores(
        tuple(
            LayerScores(f"l{i}", shared, 16, 16, None, tuple(row), zeros, tuple(error[i]) if error else None)
            for i, row in enumerate(importance)
        ),
        method="activation-patching",
    )


def full(plan):
    return {(layer, head) for layer, row in enumerate(plan.layers) for head in row.full_heads}


tables = st.integers(1, 6).flatmap(
    lambda layers: st.lists(
        st.lists(st.floats(-1, 1, allow_nan=False), min_size=8, max_size=8), min_size=layers, max_size=layers
    )
)


@settings(deadline=None, max_examples=60)
@given(tables, st.integers(0, 7), st.integers(1, 4), st.integers(0, 2), st.sampled_from(["head", "kv-group"]))
def test_constrained_keeps_the_count_the_floor_and_the_best(table, linear, share, floor, unit):
    plan = plan_heads(scores(table), ratio=f"{linear}:{share}", unit=unit, min_full_per_layer=floor, tie=0)
    size = 2 if unit == "kv-group" else 1
    total = len(table) * 8 // size
    target = int(total * share / (linear + share) + 0.5)
    assert plan.num_full == size * max(target, floor * len(table))
    assert all(len(layer.full_heads) >= floor * size for layer in plan.layers)
    best = {(i, u): max(row[u * size : (u + 1) * size]) for i, row in enumerate(table) for u in range(8 // size)}
    kept = {(layer, head // size) for layer, head in full(plan)}
    # A unit that was left out may beat a kept one only where the kept one holds its layer's floor.
    for layer, unit_ in kept:
        if sum(1 for at in kept if at[0] == layer) > floor:
            assert best[layer, unit_] >= max((best[u] for u in best.keys() - kept), default=-9)
    for left in best.keys() - kept:
        assert best[left] <= min((best[u] for u in kept if u[0] == left[0]), default=9)


def test_global_may_leave_a_layer_empty_and_constrained_may_not():
    table = [[0.0] * 8, [0.9] * 8, [0.0] * 8, [0.0] * 8]
    free, floored = (plan_heads(scores(table), ratio="3:1", strategy=s) for s in ("global", "constrained"))
    assert full(free) == {(1, head) for head in range(8)}
    assert [len(layer.full_heads) for layer in floored.layers] == [1, 5, 1, 1]
    assert free.num_full == floored.num_full == 8


def test_ties_fall_to_the_worse_converted_head_then_to_the_lower_index():
    error = [[0.1] * 8, [0.1] * 7 + [0.9]]
    noise = [[1e-5 * head for head in range(8)], [0.0] * 8]  # below the resolution of a score
    assert full(plan_heads(scores(noise, error), ratio="15:1", strategy="global")) == {(1, 7)}
    assert full(plan_heads(scores(noise), ratio="15:1", strategy="global")) == {(0, 0)}
    assert full(plan_heads(scores(noise), ratio="15:1", strategy="global", tie=0)) == {(0, 7)}


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s not in NEEDS_SCORES])
@pytest.mark.parametrize("unit", ["head", "kv-group"])
def test_baselines_need_no_scores_and_hold_their_promise(strategy, unit):
    plan = plan_heads(regions(), ratio="7:1", strategy=strategy, unit=unit, seed=3)
    counts = [len(layer.full_heads) for layer in plan.layers]
    size = 2 if unit == "kv-group" else 1
    if strategy == "all-full":
        assert counts == [8] * 6
    elif strategy == "all-linear":
        assert counts == [0] * 6
    elif strategy == "layerwise":
        assert sorted(counts) == [0] * 5 + [8]
    elif strategy == "fixed":
        assert len({layer.kinds for layer in plan.layers}) == 1
        assert counts == [size] * 6
    else:
        assert sum(counts) == 6 * size
        assert min(counts) == size
    plan.validate(regions())


def test_layerwise_rounds_up_and_spaces_evenly():
    plan = plan_heads(regions(28, 16, 8), ratio="3:1", strategy="layerwise")
    assert [i for i, layer in enumerate(plan.layers) if layer.full_heads] == [3, 7, 11, 15, 19, 23, 27]
    assert plan.notes == ()
    up = plan_heads(regions(6), ratio="2:1", strategy="layerwise", unit="kv-group")
    assert up.num_full == 16
    assert plan_heads(regions(6), ratio="3:1", strategy="layerwise").num_full == 16  # 12 heads asked


def test_random_depends_on_the_seed_alone():
    same = [plan_heads(regions(), strategy="random", seed=5).to_json() for _ in range(2)]
    assert same[0] == same[1]
    assert full(plan_heads(regions(), strategy="random", seed=6)) != full(
        plan_heads(regions(), strategy="random", seed=5)
    )
    free = [plan_heads(regions(), strategy="random", seed=s, min_full_per_layer=0) for s in range(20)]
    assert all(plan.num_full == 6 for plan in free)
    assert any(not layer.full_heads for plan in free for layer in plan.layers)


def test_a_model_is_captured_for_its_shapes():
    config = Qwen3Config(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = Qwen3ForCausalLM(config)
    plan = plan_heads(model, ratio="1:1", strategy="fixed", unit="kv-group")
    assert (plan.model.architecture, plan.model.model_type, plan.model.num_layers) == ("Qwen3ForCausalLM", "qwen3", 2)
    assert plan.num_full == 4
    plan.validate(capture(model))


def test_a_kept_head_stays_and_counts():
    table = [[0.0] * 8 for _ in range(4)]
    plan = plan_heads(scores(table), ratio="7:1", keep=[(2, 5), (2, 5)])
    assert (2, 5) in full(plan)
    assert plan.num_full == 4
    crowded = plan_heads(scores(table), ratio="7:1", keep=[(2, head) for head in range(8)])
    assert crowded.num_full == 11
    assert "11 full heads instead of 4" in crowded.notes[0]
    group = plan_heads(regions(), strategy="all-linear", unit="kv-group", keep=[(1, 3)])
    assert full(group) == {(1, 2), (1, 3)}


@pytest.mark.parametrize(("how", "group"), [("max", 0), ("mean", 1), ("sum", 1)])
def test_group_scores(how, group):
    plan = plan_heads(scores([[0.6, 0.0, 0.4, 0.4]], shared=2), ratio="1:1", unit="kv-group", group_score=how)
    assert plan.layers[0].kept_key_value_heads == (group,)


def test_rounding_is_said():
    plan = plan_heads(regions(3, 5, 5), ratio="7:1", strategy="random")
    assert plan.num_full == 3
    assert plan.notes == (
        "the ratio asks for 1.875 full heads, rounded to 2",
        "3 full heads instead of 2 (min_full_per_layer or keep)",
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": "7"}, "L:F"),
        ({"ratio": "0:0"}, "L:F"),
        ({"ratio": "-1:1"}, "L:F"),
        ({"unit": "layer"}, "unit"),
        ({"strategy": "best"}, "strategy"),
        ({"strategy": "constrained"}, "score_heads"),
        ({"keep": [(9, 0)]}, "layers 0 to 5"),
        ({"keep": [(0, 8)]}, "model.layers.0.self_attn"),
        ({"min_full_per_layer": 9}, "only 8 units"),
        ({"group_score": "median"}, "group_score"),
    ],
)
def test_bad_options_say_what_to_do(options, said):
    with pytest.raises(PlanError, match=said):
        plan_heads(regions(), **{"strategy": "random", **options})


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(PlanError, match="l0: importance"):
        plan_heads(scores([[float("nan")] * 8]))


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 4),
    st.sampled_from([(8, 4), (6, 2), (4, 4), (5, 1)]),
    st.integers(0, 99),
    st.sampled_from(["head", "kv-group"]),
)
def test_json_round_trip_is_exact(layers, shape, seed, unit):
    plan = plan_heads(
        regions(layers, *shape, window=None if seed % 2 else 7), ratio="3:1", strategy="random", seed=seed, unit=unit
    )
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    assert json.loads(plan.to_json()) == json.loads(json.dumps(plan.to_dict()))


def test_save_and_load(tmp_path):
    plan = plan_heads(regions(), strategy="random")
    assert Plan.load(plan.save(tmp_path / "deep" / "plan.json")) == plan
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["plan.json"]


def edited(**changes):
    value = plan_heads(regions(), strategy="random").to_dict()
    layer = {key: changes.pop(key) for key in list(changes) if key in value["layers"][2]}
    value["layers"][2].update(layer)
    return json.dumps({**value, **changes})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not json", "not JSON"),
        (b"\xff\xfe", "utf-8"),
        ("[]", "not a plan"),
        ("{}", "not a plan"),
        (edited(version=99), "version 99"),
        (edited(layers=[]), "no layers"),
        (edited(version=True), "version true"),
        (edited(layers=None), "layers is null; give a list"),
        (edited(keep=[1]), r"keep\[0\] is 1; give a list of 2"),
        (edited(model={"size": 1}), "model has the unknown field 'size'; known are architecture"),
        (edited(seed=-1), "seed is -1; give a whole number from 0"),
        (edited(num_heads=10**9), r"layers\[2\]\.num_heads is 1000000000; give a whole number from 0 to 2048"),
        (edited(head_dim=1.5), r"layers\[2\]\.head_dim is 1\.5"),
        (edited(full=[1, 1]), r"layers\[2\] .*keeps a head twice"),
        (edited(layer={"conv": None}), "layer.conv is null; give one of residual-unrotated, residual, native, none"),
        (edited(layer={"full_gate": True, "gate": False}), "layer .*full_gate=true needs gate=true"),
        (edited(full=[1, 8]), "unknown head 8"),
        (edited(num_heads=0, full=[]), r"model\.layers\.2\.self_attn lists no heads"),
        (edited(num_key_value_heads=9), "9 KV heads"),
        (edited(unit="layer"), "unit 'layer'"),
        (edited(unit="kv-group", full=[0]), "splits KV group"),
    ],
)
def test_a_file_that_is_no_plan_names_the_file(tmp_path, text, said):
    path = tmp_path / "broken.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError, match=said) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_a_plan_error(tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (regions(5), "6 layers, the model has 5"),
        (
            [region(layer + 1) for layer in range(6)],
            r"model\.layers\.0\.self_attn where the model has model\.layers\.1",
        ),
        (regions(6, 4, 4), "head 4 of the plan is unknown"),
        (regions(6, 16, 4), "num_heads 8 in the plan and 16"),
        (regions(6, 8, 2), "num_key_value_heads 4 in the plan and 2"),
        (regions(6, dim=32), "head_dim 16 in the plan and 32"),
    ],
)
def test_a_plan_for_another_architecture_says_how_they_differ(model, said):
    with pytest.raises(PlanError, match=said):
        plan_heads(regions(), strategy="random").validate(model)


def test_a_split_group_is_refused_only_by_its_unit():
    plan = plan_heads(regions(2, 4, 2), strategy="all-linear", keep=[(0, 0)])
    plan.validate(regions(2, 4, 2))
    value = plan.to_dict() | {"unit": "kv-group"}
    with pytest.raises(PlanError, match="splits KV group 0"):
        Plan.from_dict(value)


@pytest.mark.parametrize(("layers", "heads", "shared"), [(6, 8, 4), (28, 16, 8), (3, 7, 1)])
def test_the_picture_has_a_cell_for_each_head(layers, heads, shared):
    plan = plan_heads(regions(layers, heads, shared), strategy="random", seed=1)
    rows = str(plan).split("KV kept\n")[1].splitlines()[:layers]
    for row, layer in zip(rows, plan.layers, strict=True):
        cells = "".join(FULL[0] if c == "█" else LINEAR[0] for c in row if c in "█·")
        assert cells == "".join(kind[0] for kind in layer.kinds)
    assert max(map(len, str(plan).splitlines())) <= 120
    assert f"full {plan.num_full} of {plan.num_heads} heads" in str(plan)
    assert "\x1b" not in str(plan)


def test_forecast_counts_what_a_loop_counts():
    layers = [
        region(0, window=5, kinds=(FULL,) + (LINEAR,) * 7),
        region(1, kinds=(LINEAR,) * 8),
        region(2, kinds=(FULL,) * 8),
    ]
    cost = forecast(layers, length=12, batch=3, bytes_per_element=2, conv_width=4)
    assert cost.teacher_kv == 3 * 4 * 32 * 2 * (5 + 12 + 12)
    assert cost.hybrid_kv == 3 * 32 * 2 * (1 * 5 + 0 + 4 * 12)
    assert cost.state == 3 * 15 * 16 * 16 * 4
    assert cost.conv == 3 * 15 * 48 * 3 * 2
    pairs = {w: sum(min(t, w) for t in range(1, 13)) for w in (5, 12)}
    assert cost.teacher_flops == 3 * 8 * 64 * (pairs[5] + 2 * pairs[12])
    softmax = 3 * 64 * (pairs[5] + 8 * pairs[12])
    assert (cost.hybrid_flops - softmax) % (3 * 15 * 12) == 0


def test_forecast_of_a_plan_without_linear_heads_is_the_teacher():
    cost = forecast(plan_heads(regions(), strategy="all-full"), length=1000)
    assert cost.cache_ratio == cost.flops_ratio == 1.0
    assert cost.hybrid_bytes == cost.hybrid_kv


def test_by_group_the_cache_shrinks_with_the_ratio():
    model = regions(28, 16, 8, dim=128)
    grouped, single = (plan_heads(model, strategy="random", unit=unit) for unit in ("kv-group", "head"))
    ratio = [forecast(plan, length=131072).cache_ratio for plan in (grouped, single)]
    assert ratio[0] == pytest.approx(1 / 8, rel=0.03)
    assert ratio[1] > 1.5 * ratio[0]
    assert "131,072 tokens" in str(forecast(grouped, length=131072))


# --- budgets, never, agreement ------------------------------------------------------------------------------------


def test_per_layer_keeps_the_best_of_each_layer():
    table = [[0.1 * head + layer for head in range(8)] for layer in range(4)]
    plan = plan_heads(scores(table), ratio="3:1", strategy="per-layer")
    assert [layer.full_heads for layer in plan.layers] == [(6, 7)] * 4


def test_a_head_on_the_never_list_becomes_linear_whatever_the_strategy():
    table = [[0.9] * 8 for _ in range(4)]
    for strategy in STRATEGIES:
        plan = plan_heads(scores(table), ratio="3:1", strategy=strategy, never=[(1, 0), (3, 7)])
        assert not full(plan) & {(1, 0), (3, 7)}
        assert Plan.from_json(plan.to_json()) == plan
    assert plan.strategy == "all-full"
    assert plan.num_full == 30
    assert "never 1.0, 3.7" in str(plan)
    group = plan_heads(scores(table), ratio="0:1", unit="kv-group", never=[(1, 3)])
    assert full(group) == {(layer, head) for layer in range(4) for head in range(8)} - {(1, 2), (1, 3)}
    assert "15 full KV groups instead of 16 (never)" in group.notes
    with pytest.raises(PlanError, match="keep and never both name kv-group 1"):
        plan_heads(scores(table), unit="kv-group", keep=[(0, 2)], never=[(0, 3)])
    with pytest.raises(PlanError, match="never names head 9"):
        plan_heads(scores(table), never=[(0, 9)])
    with pytest.raises(PlanError, match="only 0 units"):
        plan_heads(scores(table), never=[(0, head) for head in range(8)])


def test_by_bytes_heads_of_a_kept_key_value_head_are_free():
    table = [[1.0, 0.9, 0.2, 0.1, 0.8, 0.0, 0.0, 0.0]] + [[0.0] * 8] * 3
    plan = plan_heads(scores(table), ratio="7:1", strategy="global", budget="kv-bytes", length=64)
    assert full(plan) == {(0, 0), (0, 1), (0, 4), (0, 5)}  # 2 of 16 KV heads, and whoever reads them
    assert plan.notes == (
        "full heads spend 12.50% of the teacher's KV bytes, 12.50% asked",
        "1 of 4 full units score below tie=0.001: reconstruction error chose them",
    )
    assert Plan.from_json(plan.to_json()).budget == "kv-bytes"


@settings(deadline=None, max_examples=30)
@given(tables, st.integers(1, 7), st.sampled_from(["kv-bytes", "flops"]), st.sampled_from(["head", "kv-group"]))
def test_a_budget_is_held_and_no_unit_more_would_fit(table, linear, budget, unit):
    source = scores(table)
    windows = [None if i % 2 else 100 for i in range(len(table))]
    layers = [
        LayerScores(x.name, 4, 16, 16, w, x.importance, x.spread) for x, w in zip(source.layers, windows, strict=True)
    ]
    source = HeadScores(tuple(layers), method="any")
    options = {"ratio": f"{linear}:1", "strategy": "global", "unit": unit}
    plan = plan_heads(source, budget=budget, length=1000, **options)

    def spent(layers):
        cost = forecast(layers, length=1000)
        if budget == "kv-bytes":
            return cost.hybrid_kv / cost.teacher_kv
        softmax = [1000 * 1001 // 2 if w is None else 100 * 1000 - 100 * 99 // 2 for w in windows]
        fulls = [sum(k == FULL for k in layer.kinds) for layer in layers]
        return sum(s * f for s, f in zip(softmax, fulls, strict=True)) / (8 * sum(softmax))

    assert spent(plan.layers) <= 1 / (linear + 1) + 1e-9
    size = 2 if unit == "kv-group" else 1
    for index, layer in enumerate(plan.layers):
        for u in range(8 // size):
            heads = range(u * size, (u + 1) * size)
            if layer.kinds[heads[0]] == LINEAR:
                kinds = tuple(FULL if h in heads else kind for h, kind in enumerate(layer.kinds))
                more = [*plan.layers]
                more[index] = replace(layer, kinds=kinds)
                assert spent(more) > 1 / (linear + 1)


def test_a_window_makes_heads_cheap():
    mixed = [region(0, window=64), region(1)]
    plan = plan_heads(mixed, ratio="15:1", strategy="random", budget="flops", min_full_per_layer=0, length=32768)
    assert [len(layer.full_heads) for layer in plan.layers][0] == 8


@pytest.mark.parametrize("strategy", ["fixed", "layerwise", "all-full"])
def test_budgets_are_for_strategies_that_choose_one_by_one(strategy):
    with pytest.raises(PlanError, match="needs the strategy constrained, global or random"):
        plan_heads(regions(), strategy=strategy, budget="flops")
    with pytest.raises(PlanError, match="budget='money'"):
        plan_heads(regions(), strategy=strategy, budget="money")


def test_an_eighth_of_the_key_value_heads_is_exact_where_it_divides():
    for strategy in ("constrained", "global", "random"):
        table = [[0.01 * ((7 * layer + head) % 16) for head in range(16)] for layer in range(28)]
        plan = plan_heads(scores(table, shared=8), ratio="7:1", unit="kv-group", strategy=strategy)
        assert sum(len(layer.kept_key_value_heads) for layer in plan.layers) == 28
        assert plan.notes == ()
    odd = plan_heads(regions(3), ratio="7:1", unit="kv-group", strategy="random", min_full_per_layer=0)
    assert odd.notes == ("the ratio asks for 1.5 full KV groups, rounded to 2",)


def test_plans_and_scores_are_compared():
    table = [[0.1 * head for head in range(8)] for _ in range(2)]
    plans = {
        "top": plan_heads(scores(table), ratio="7:1", strategy="global"),
        "more": plan_heads(scores(table), ratio="3:1", strategy="global"),
        "scores": scores(table),
    }
    found = compare(plans)
    assert found.jaccard == {("top", "more"): 0.5, ("top", "scores"): 1.0, ("more", "scores"): 0.5}
    assert found.spearman["top", "more"] == pytest.approx((2 / 16 - 2 / 16 * 4 / 16) / (7 / 64 * 3 / 16) ** 0.5)
    assert str(found).splitlines()[1].split() == ["top", "/", "more", "0.500", "0.655"]
    with pytest.raises(PlanError, match="at least two"):
        compare({"one": scores(table)})
    with pytest.raises(PlanError, match="other has 24 heads in 3 layers"):
        compare({"one": scores(table), "other": scores([*table, table[0]])})


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=3, max_size=12), st.integers(0, 99))
def test_rank_correlation_shares_ranks(values, seed):
    a = np.array(values, dtype=float)
    b = np.random.default_rng(seed).permutation(a)

    def rank(x):
        return np.array([np.mean([j for j, y in enumerate(sorted(x)) if y == z]) for z in x])

    expected = np.corrcoef(rank(a), rank(b))[0, 1] if len(set(values)) > 1 else math.nan
    assert spearman(a, b) == pytest.approx(expected, nan_ok=True)
    assert spearman(a, np.exp(a)) == pytest.approx(1.0 if len(set(values)) > 1 else math.nan, nan_ok=True)
