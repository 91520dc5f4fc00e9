"""Scorers: planted truth, slow rewritings of their definitions, and the hybrid that a swapped head stands for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hydrasurgery.choose import plan_heads
from hydrasurgery.conversion import rewrite
from hydrasurgery.errors import PlanError, ProbeError
from hydrasurgery.ir.taps import HeadTap, head_taps
from hydrasurgery.selection import METHODS, fuse_scores, score_heads, swap_check
from hydrasurgery.selection.attention import attention_at
from hydrasurgery.selection.effects import readout
from hydrasurgery.selection.measuring import open_meter
from hydrasurgery.selection.scorers import SCORERS
from hydrasurgery.selection.watching import LastAttention, watch_taps
from hydrasurgery.transfer.start import calibrate
from tests.families import FusedAttention, GroupedAttention, PlainDecoder, tiny
from tests.planted import HEADS, LAYERS, Planted, planted_pairs
from tests.test_selection import OneLinearLayer, Recorder, answered_pairs, measured, tiny_model

SEEDS = (0, 1, 2)
FINDING = (  # those that change the head, without sender-patching, for which the finder is no sender; and two that look
    "activation-patching activation-patching-unfrozen attribution-patching attribution path-patching mean-ablation swap swap-kl "
    "gates logit-contribution retrieval"
).split()
THROUGH = ("activation-patching-unfrozen", "path-patching", "mean-ablation")  # they see the carrier of the value too


class OutputGate(GroupedAttention):
    """A gate on what the heads give, as wide as they are."""

    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.gate = torch.nn.Linear(width, width)

    def forward(self, x):
        gate = self.gate(x)
        q, k, v = (w(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(out.transpose(1, 2).flatten(2) * gate.sigmoid())


def ranking(model, pairs, method):
    return score_heads(model, pairs=pairs, method=method, progress=False, batch_size=12).ranking


def check_found(rank):
    """The planted finder is first on every seed; `rank(model, pairs)` gives (layer, head)s, best first."""
    for seed in SEEDS:
        model = Planted(seed)
        assert rank(model, planted_pairs(model))[0] == model.finders[0]


@pytest.mark.parametrize("method", FINDING)
def test_the_planted_head_is_first(method):
    count = 2 if method == "gates" else 6  # forty steps per pair
    check_found(lambda model, pairs: ranking(model, pairs[:count], method))


def test_noise_is_found_out():
    draw = torch.Generator().manual_seed(0)

    def noise(model, pairs):
        order = torch.randperm(LAYERS * HEADS, generator=draw)
        return [divmod(int(i), HEADS) for i in order]

    with pytest.raises(AssertionError):
        check_found(noise)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_carrier_of_the_value_is_a_sender(seed):
    model = Planted(seed, carry="value")
    pairs = planted_pairs(model, carry="value")
    assert ranking(model, pairs, "sender-patching")[0] == model.carrier
    for method in THROUGH:
        assert set(ranking(model, pairs, method)[:2]) == {model.carrier, *model.finders}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_swap_check_confirms_what_converts(seed):
    """The carrier looks at places, which are orthogonal: its stand-in is exact. The finder parts like codes: it is not."""
    model = Planted(seed)
    scores = score_heads(model, pairs=planted_pairs(model), method="swap", progress=False)
    values = {at: scores.layers[at[0]].importance[at[1]] for at in scores.ranking}
    assert values.pop(model.finders[0]) > 0.3
    assert max(map(abs, values.values())) < 0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_two_planted_heads_of_one_group_are_found_by_group(seed):
    model = Planted(seed, finders=2)
    scores = score_heads(model, pairs=planted_pairs(model), progress=False)
    assert set(scores.ranking[:2]) == set(model.finders)
    (layer, head), _ = model.finders
    plan = plan_heads(scores, ratio="5:1", unit="kv-group", strategy="global")
    assert [row.kept_key_value_heads for row in plan.layers] == [
        (head // 2,) if i == layer else () for i in range(LAYERS)
    ]


# --- definitions --------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_share(model, pair, patched):
    """(m(x) - m(patched)) / (m(x) - m(x')) of eq. 10, `patched(clean, corrupt)` gives outputs to put in by layer."""
    runs = []
    for ids in (pair.clean_ids, pair.corrupt_ids):
        with Recorder(model) as outputs:
            runs.append((model(ids[None]).logits[0, pair.answer_positions], outputs))
    (clean_logits, clean), (corrupt_logits, corrupt) = runs
    with Recorder(model, patched(clean, corrupt)):
        logits = model(pair.clean_ids[None]).logits[0, pair.answer_positions]
    m = [readout(z, pair) for z in (clean_logits, corrupt_logits, logits)]
    return (m[0] - m[2]) / (m[0] - m[1])


def slow_scores(model, pairs, patched):
    shape = len(model.model.layers), model.config.num_attention_heads
    rows = [
        [
            slow_share(model, pair, lambda a, b, at=at: patched(a, b, *at))
            for at in torch.cartesian_prod(*map(torch.arange, shape)).tolist()
        ]
        for pair in pairs
    ]
    return torch.tensor(rows).view(len(pairs), *shape)


def test_unfrozen_patching_is_its_definition():
    model = tiny_model()
    pairs = answered_pairs(model)

    def patched(clean, corrupt, layer, head):
        out = clean[layer].clone()
        out[:, :, head] = corrupt[layer][:, :, head]
        return {layer: out}

    expected = slow_scores(model, pairs, patched)
    assert (expected - measured(model, pairs)[0]).abs().max() > 0.01  # the paths through later heads count
    got, _ = measured(model, pairs, "activation-patching-unfrozen", batch_size=3)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_mean_ablation_is_its_definition():
    model = tiny_model()
    pairs = answered_pairs(model)
    with torch.no_grad(), Recorder(model) as outputs:
        model(torch.stack([pair.clean_ids for pair in pairs]))
    means = {layer: out.mean((0, 1)) for layer, out in outputs.items()}

    def patched(clean, _corrupt, layer, head):
        out = clean[layer].clone()
        out[:, :, head] = means[layer][head]
        return {layer: out}

    got, _ = measured(model, pairs, "mean-ablation")
    torch.testing.assert_close(got, slow_scores(model, pairs, patched), atol=1e-4, rtol=1e-4)


def test_senders_reach_the_answer_through_chosen_heads_alone():
    """Two layers, so that a sender's path is one step: every head of the second that is chosen, and nothing else."""
    model = tiny_model(layers=2, seed=3)
    pairs = answered_pairs(model)
    receivers, _ = measured(model, pairs)
    chosen = [head for head in range(4) if receivers[:, 1, head].mean() > 0.01]
    got, _ = measured(model, pairs, "sender-patching")
    assert chosen

    @torch.no_grad()
    def patched(clean, corrupt, layer, head):
        out = clean[0].clone()
        out[:, :, head] = corrupt[0][:, :, head]
        with Recorder(model, {0: out}) as seen:
            model(current.clean_ids[None])
        second = clean[1].clone()
        second[:, :, chosen] = seen[1][:, :, chosen]
        return {0: clean[0], 1: second}

    for number, current in enumerate(pairs):
        expected = slow_scores(model, [current], patched)[0, 0]
        torch.testing.assert_close(got[number, 0], expected, atol=1e-4, rtol=1e-4)
    assert got[:, 0].abs().max() > 0.01
    assert not got[:, 1].any()  # nothing comes after the last chosen head


def test_attribution_is_exact_where_the_readout_is_linear_and_verified_at_the_top():
    torch.manual_seed(0)
    linear = OneLinearLayer()
    pairs = answered_pairs(linear, 3)
    exact, estimate = (measured(linear, pairs, m)[0] for m in ("activation-patching", "attribution"))
    torch.testing.assert_close(estimate, exact, atol=1e-4, rtol=1e-3)
    model = tiny_model()
    pairs = answered_pairs(model)
    exact, estimate, verified = (
        measured(model, pairs, m)[0] for m in ("activation-patching", "attribution", "attribution-patching")
    )
    same = (verified == estimate).all(0).flatten()
    top = estimate.abs().mean(0).flatten().topk(2).indices  # an eighth of 12 heads, rounded up
    assert not same[top].any()
    assert same.sum() == 10
    torch.testing.assert_close(verified.flatten(1)[:, top], exact.flatten(1)[:, top], atol=1e-4, rtol=1e-4)
    assert torch.corrcoef(torch.stack([exact.mean(0).flatten(), estimate.mean(0).flatten()]))[0, 1] > 0.5


@torch.no_grad()
def test_a_swapped_head_is_the_calibrated_hybrid():
    model = tiny_model()
    pairs = answered_pairs(model, 2)
    got, meter = measured(model, pairs, "swap")
    lost, _ = measured(model, pairs, "swap-kl")
    ids = torch.stack([pair.clean_ids for pair in pairs])
    for at in ((0, 1), (2, 3)):
        everyone = [(layer, head) for layer in range(3) for head in range(4)]
        plan = plan_heads(model, strategy="all-linear", keep=[one for one in everyone if one != at])
        hybrid = rewrite(model, plan)
        calibrate(hybrid, model, ids)
        for number, pair in enumerate(pairs):
            clean, corrupt = model(torch.stack([pair.clean_ids, pair.corrupt_ids])).logits[:, pair.answer_positions]
            z = hybrid.eval()(pair.clean_ids[None]).logits[0, pair.answer_positions]
            share = (readout(clean, pair) - readout(z, pair)) / (readout(clean, pair) - readout(corrupt, pair))
            torch.testing.assert_close(got[number, at[0], at[1]], share, atol=1e-4, rtol=1e-3)
            p, other = clean.log_softmax(-1), z.log_softmax(-1)
            kl = (p.exp() * (p - other)).sum(-1).mean()
            torch.testing.assert_close(lost[number, at[0], at[1]], kl, atol=1e-5, rtol=1e-3)
    assert meter.fits.keys() == {f"model.layers.{i}.self_attn" for i in range(3)}


def test_contributions_to_the_logits_sum_to_the_attention_part():
    torch.manual_seed(0)
    model = OneLinearLayer()
    pairs = answered_pairs(model, 3)
    got, _ = measured(model, pairs, "logit-contribution")
    for number, pair in enumerate(pairs):
        x = model.embed(pair.clean_ids[None])
        whole, without = model.head(x + model.attend(x)), model.head(x)
        expected = 1 - readout(without[0, pair.answer_positions], pair) / readout(whole[0, pair.answer_positions], pair)
        torch.testing.assert_close(got[number].sum(), expected, atol=1e-4, rtol=1e-3)


def test_contributions_pass_the_final_norm():
    """With the last MLP silent, a small part of a last layer's head changes the readout by its contribution."""
    model = tiny_model()
    model.model.layers[-1].mlp.down_proj.weight.data.zero_()
    pair = answered_pairs(model, 1)[0]
    got, _ = measured(model, [pair], "logit-contribution")
    for head in range(4):
        leads = []
        for scale in (1.0, 1.0 - 1e-2):
            with torch.no_grad(), Recorder(model) as outputs:
                model(pair.clean_ids[None])
            out = outputs[2].clone()
            out[:, :, head] *= scale
            with torch.no_grad(), Recorder(model, {2: out}):
                leads.append(readout(model(pair.clean_ids[None]).logits[0, pair.answer_positions], pair))
        slope = (leads[0] - leads[1]) / 1e-2 / leads[0]
        torch.testing.assert_close(got[0, 2, head], slope, atol=5e-3, rtol=5e-2)


def test_gates_stay_between_none_and_whole():
    model = tiny_model()
    got, _ = measured(model, answered_pairs(model, 1), "gates")
    assert ((got >= 0) & (got <= 1)).all()
    assert got.std() > 0.05


# --- attention patterns -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral", "gpt_oss"])
def test_attention_weights_give_the_heads_outputs(family):
    """Windows, soft caps, sinks and grouped heads: weights times values is what the layer's heads gave."""
    try:
        model = tiny(family).eval()
    except (KeyError, ValueError):
        pytest.skip(f"no tiny {family}")
    ids = torch.randint(40, (2, 12))
    places, seen = torch.tensor([3, 11]), {}

    def visit(name, last: LastAttention, out):
        v = last.v.repeat_interleave(last.q.shape[1] // last.v.shape[1], 1)
        seen[name] = (last.weights(places) @ v.float()).transpose(1, 2), out[:, places]

    with torch.no_grad(), head_taps(model) as taps, watch_taps(taps, visit):
        model(ids)
    assert seen
    for again, out in seen.values():
        torch.testing.assert_close(again, out, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_induction_and_echo_are_means_of_the_weights():
    model = tiny_model()
    pairs = answered_pairs(model, 1)
    behind, own = (measured(model, pairs, m)[0][0] for m in ("induction", "echo"))
    with open_meter(model, pairs) as meter:
        tokens = pairs[0].clean_ids.unique()
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
        once = tokens[order][:7]
        weights = torch.stack(list(attention_at(meter, once.repeat(2), torch.arange(14)).values()))
    size = len(once)
    for got, shift in ((behind, 1), (own, 0)):
        parts = [weights[:, :, t, t - size + shift] for t in range(size, 2 * size - 1)]
        torch.testing.assert_close(got, torch.stack(parts).mean(0))


def test_retrieval_needs_a_stated_answer():
    model = tiny_model()
    with pytest.raises(ProbeError, match="does not state"):
        score_heads(model, pairs=answered_pairs(model, 1), method="retrieval", progress=False)


# --- all of them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_where_its_scores_come_from(method):
    model = Planted(0)
    pairs = planted_pairs(model, 2)
    one, two = (score_heads(model, pairs=pairs, method=method, seed=5, progress=False) for _ in range(2))
    assert one == two
    assert (one.method, one.pairs, one.seed, one.tasks) == (method, 2, 5, ("planted", "planted"))
    assert all(len(layer.samples) == (2 if method in SCORERS else 0) for layer in one.layers)
    assert not any(isinstance(m, HeadTap) for m in model.modules())


@pytest.mark.parametrize("method", [m for m in SCORERS if m != "gates"])
def test_batches_of_pairs_and_rows_change_nothing(method):
    model = Planted(1)
    pairs = planted_pairs(model, 3)
    one, many = (measured(model, pairs, method, batch_size=size, rows=rows)[0] for size, rows in ((1, 2), (3, 64)))
    torch.testing.assert_close(one, many, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_plans_are_checked_as_the_hybrids_they_stand_for():
    model = tiny_model()
    pairs = answered_pairs(model, 2)
    plans = {
        "none": plan_heads(model, strategy="all-full"),
        "some": plan_heads(model, ratio="1:1", strategy="random"),
        "all": plan_heads(model, strategy="all-linear"),
    }
    found = swap_check(model, plans, pairs, rows=2)
    assert found["none"].accuracy == 1
    assert found["none"].lead == pytest.approx(1, abs=1e-5)
    assert found["none"].divergence == pytest.approx(0, abs=1e-6)
    ids = torch.stack([pair.clean_ids for pair in pairs])
    for name in ("some", "all"):
        hybrid = rewrite(model, plans[name])
        calibrate(hybrid, model, ids)
        right, lead = [], []
        for pair in pairs:
            clean, z = (m.eval()(pair.clean_ids[None]).logits[0, pair.answer_positions] for m in (model, hybrid))
            right.append(float(torch.equal(z.argmax(-1), pair.answer_ids)))
            lead.append(float(readout(z, pair) / readout(clean, pair)))
        assert found[name].accuracy == sum(right) / 2
        assert found[name].lead == pytest.approx(sum(lead) / 2, abs=1e-3)
    with pytest.raises(PlanError, match="another architecture"):
        swap_check(tiny_model(layers=2), plans, answered_pairs(tiny_model(layers=2), 1))


def test_the_same_seed_gives_the_same_plan_file_byte_for_byte(tmp_path):
    files = []
    for number in range(2):
        model = Planted(0)
        scores = score_heads(model, pairs=planted_pairs(model), method="path-patching", seed=3, progress=False)
        fused = fuse_scores({"planted": scores}, seed=3)
        plan = plan_heads(fused, ratio="3:1", unit="kv-group", seed=3)
        files.append([x.save(tmp_path / f"{number}{i}.json").read_bytes() for i, x in enumerate((scores, fused, plan))])
    assert files[0] == files[1]


LIVE = ("activation-patching-unfrozen", "mean-ablation", "swap")
FAMILIES = ["llama", "gpt2", "gemma2", "gemma3_text", "mistral", "gpt_neox", "opt", "cohere", "phi", "mixtral"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_in_front_of_a_change_is_run_once(family):
    """Rows that join at the changed layer, after recorded keys, and leave as the answer's tokens give what whole prompts give."""
    model = tiny(family)
    pair = answered_pairs(model, 1, vocabulary=90)[0]
    with open_meter(model, [pair], batch_size=3) as meter:
        assert meter.replayer.joins
        assert meter.replayer.resumes
        joined = [SCORERS[method](meter) for method in LIVE]
        assert not any("forward" in vars(block) for block in meter.replayer.blocks.values())
        meter.replayer.joins = meter.replayer.resumes = False
        whole = [SCORERS[method](meter) for method in LIVE]
    for found, expected in zip(joined, whole, strict=True):
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("attention", [GroupedAttention, FusedAttention, OutputGate])
@torch.no_grad()
def test_rows_that_join_at_the_tap_are_rows_of_the_whole_attention(attention):
    torch.manual_seed(0)
    model, x = PlainDecoder(attention), torch.randn(2, 7, 32)
    other = torch.randn(3, 7, 4, 8)  # of the new rows

    def replace(_tap, _args, output):
        return torch.cat([output[:2], other])

    with head_taps(model) as taps:
        module = model.attention[0]
        with taps["attention.0"].register_forward_hook(replace):
            joined, whole = module(x), module(torch.cat([x, x[:1].expand(3, -1, -1)]))
    torch.testing.assert_close(joined, whole)


@torch.no_grad()
def test_keys_and_hidden_states_are_kept_for_live_replays_alone():
    model = tiny_model()
    with open_meter(model, answered_pairs(model, 1)) as meter:
        for options, live in (({}, False), ({"whole": True}, False), ({"live": True}, True)):
            (_, run), *_ = meter.runs(**options)
            assert (bool(run.attended), bool(run.leaving)) == (live, live)
