"""Scores: patching against a slow rewriting of its definition, planted truths, the linear fit, files and pictures."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from hydrasurgery.calibration import BETAS, HALF_LIVES, fit_linear_heads
from hydrasurgery.choose import plan_heads
from hydrasurgery.errors import DataError, ProbeError, SequenceLengthError
from hydrasurgery.evaluation import KEY_TOKENS, VALUE_TOKENS, Pair
from hydrasurgery.ir.taps import head_taps
from hydrasurgery.layers import l2_norm
from hydrasurgery.selection import HeadScores, score_heads
from hydrasurgery.selection.effects import readout
from hydrasurgery.selection.measuring import open_meter
from hydrasurgery.selection.scorers import SCORERS
from hydrasurgery.selection.watching import LastAttention, watch_taps

LENGTH, VOCABULARY = 14, 48


def tiny_model(layers=3, seed=0):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).eval()


def logits_of(model, ids):
    out = model(ids)
    return getattr(out, "logits", out)


@torch.no_grad()
def answered_pairs(model, count=3, seed=0, length=LENGTH, vocabulary=VOCABULARY):
    """Pairs that the model answers by construction: its guess against the token that the corruption favours."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    while len(pairs) < count:
        clean = torch.randint(vocabulary, (length,), generator=generator)
        corrupt, stated = clean.clone(), torch.tensor([3, 4])
        corrupt[stated] = (clean[stated] + torch.randint(1, vocabulary, (2,), generator=generator)) % vocabulary
        asked = torch.tensor([length - 3, length - 1])
        z, other = logits_of(model, torch.stack([clean, corrupt]))[:, asked]
        answer = z.argmax(-1)
        gain = (other - z).scatter(-1, answer[:, None], -math.inf)
        pairs.append(Pair(clean, corrupt, asked, answer, gain.argmax(-1), stated))
    return pairs


class Recorder:
    """Reads, or replaces, what each layer gives to its output projection, [1, T, H, D]."""

    def __init__(self, model, replace=None):
        self.values, self.replace = {}, replace or {}
        self.handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(self.hook(index, layer.self_attn.head_dim))
            for index, layer in enumerate(model.model.layers)
        ]

    def hook(self, index, dim):
        def read(_module, args):
            self.values[index] = args[0].unflatten(-1, (-1, dim))
            return (self.replace[index].flatten(2),) if index in self.replace else None

        return read

    def __enter__(self):
        return self.values

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def slow_effects(model, pair):
    """Eq. 9 and 10 by the letter: one whole forward per head, earlier layers running, later ones held."""

    def measure(ids, replace=None):
        with Recorder(model, replace) as outputs:
            z = model(ids[None]).logits[0, pair.answer_positions]
        score = norm = 0.0
        for j, (right, wrong) in enumerate(zip(pair.answer_ids, pair.distractor_ids, strict=True)):
            score, norm = score + 0.9**j * float(z[j, right] - z[j, wrong]), norm + 0.9**j
        return score / norm, outputs

    clean_score, clean = measure(pair.clean_ids)
    corrupt_score, corrupt = measure(pair.corrupt_ids)
    effects = torch.zeros(len(clean), clean[0].shape[2])
    for layer, head in torch.cartesian_prod(*map(torch.arange, effects.shape)).tolist():
        patched = clean[layer].clone()
        patched[:, :, head] = corrupt[layer][:, :, head]
        held = {later: clean[later] for later in range(layer + 1, len(clean))}
        score, _ = measure(pair.clean_ids, {layer: patched, **held})
        effects[layer, head] = (clean_score - score) / (clean_score - corrupt_score)
    return effects


def measured(model, pairs, method="activation-patching", **options):
    """Scores [pairs, layers, heads], and the meter they were measured on."""
    with open_meter(model, pairs, **options) as meter:
        return torch.stack(list(SCORERS[method](meter).values()), dim=1), meter


def test_effects_equal_the_definition():
    model = tiny_model()
    pairs = answered_pairs(model)
    effects, meter = measured(model, pairs, rows=5)
    assert meter.replayer.local
    expected = torch.stack([slow_effects(model, pair) for pair in pairs])
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(effects, expected, atol=1e-4, rtol=1e-4)


class Mixing(nn.Module):
    """An MLP that also looks one token back."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + 0.5 * F.pad(x, (0, 0, 1, 0))[:, :-1])


def test_a_model_that_mixes_tokens_elsewhere_is_replayed_whole():
    model = tiny_model()
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp)
    pairs = answered_pairs(model, 2)
    with pytest.warns(UserWarning, match="mixes tokens outside"):
        effects, meter = measured(model, pairs)
    assert not meter.replayer.local
    expected = torch.stack([slow_effects(model, pair) for pair in pairs])
    torch.testing.assert_close(effects, expected, atol=1e-4, rtol=1e-4)


def test_batching_changes_nothing():
    model = tiny_model()
    pairs = [*answered_pairs(model, 3), *answered_pairs(model, 2, seed=1, length=11)]
    one, many = (measured(model, pairs, batch_size=size, rows=rows)[0] for size, rows in ((1, 1), (4, 100)))
    torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-4)


class OneLinearLayer(nn.Module):
    """Attention and nothing else, so that logits are a sum over heads."""

    def __init__(self, heads=4, dim=8):
        super().__init__()
        width = heads * dim
        self.embed, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY, bias=False)
        self.attend = Attend(heads, width)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.head(x + self.attend(x))


class Attend(nn.Module):
    def __init__(self, heads, width):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).flatten(2))


def test_effects_of_one_linear_layer_sum_to_one():
    torch.manual_seed(0)
    model = OneLinearLayer()
    effects, _ = measured(model, answered_pairs(model, 4))
    torch.testing.assert_close(effects.sum((1, 2)), torch.ones(4), atol=1e-4, rtol=0)
    assert effects.std() > 0.01


@pytest.mark.parametrize("planted", [(0, 1), (2, 3)])
def test_a_planted_head_carries_everything(planted):
    model = tiny_model()
    for layer, block in enumerate(model.model.layers):
        weight = block.self_attn.o_proj.weight.data.unflatten(1, (4, 8))
        for head in set(range(4)) - {planted[1] if layer == planted[0] else -1}:
            weight[:, head] = 0
    scores = score_heads(model, pairs=answered_pairs(model, 4), progress=False)
    assert scores.ranking[0] == planted
    for layer, head in scores.ranking:
        expected = 1.0 if (layer, head) == planted else 0.0
        assert scores.layers[layer].importance[head] == pytest.approx(expected, abs=1e-4)
    plan = plan_heads(scores, ratio="11:1", strategy="global")
    assert plan.layers[planted[0]].full_heads == (planted[1],)


def test_readout_is_a_weighted_mean():
    pair = answered_pairs(tiny_model(), 1)[0]
    z = torch.zeros(2, VOCABULARY)
    z[torch.arange(2), pair.answer_ids] = 3.0
    z[torch.arange(2), pair.distractor_ids] = 1.0
    assert readout(z, pair) == pytest.approx(2.0)
    z[0] = 0
    assert readout(z, pair) == pytest.approx(2.0 * 0.9 / 1.9)


def test_pairs_that_the_model_does_not_answer_are_reported_and_dropped():
    model = tiny_model()
    good = answered_pairs(model, 2)
    first = good[0]
    bad = replace(first, answer_ids=first.distractor_ids, distractor_ids=first.answer_ids)
    same = replace(first, corrupt_ids=first.clean_ids)
    effects, meter = measured(model, [bad, *good, same])
    assert [text.split(":")[0] for text in meter.dropped.values()] == ["pair 0", "pair 3"]
    assert meter.used == [1, 2]
    torch.testing.assert_close(effects, measured(model, good)[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ProbeError, match="Qwen3ForCausalLM: none of 2 pairs"):
        measured(model, [bad, same])
    with pytest.raises(ProbeError, match="none of 0 pairs"):
        measured(model, [])


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    model.model.layers[0].eval()
    before = [(name, type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    score_heads(model, pairs=answered_pairs(model, 1), progress=False)
    with pytest.raises(ProbeError):
        measured(model, [])
    assert [(name, type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()] == before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def random_heads(seed=0, heads=4, shared=4, length=48):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, length, 8, generator=generator) for h in (heads, shared, shared))
    return q, k, v, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def test_a_head_that_is_linear_is_recovered():
    q, k, v, _ = random_heads()
    half_life, beta, gamma = torch.tensor([4.0, 16, 256, 64]), torch.tensor([0.1, 0.25, 0.25, 0.1]), torch.rand(4) + 1
    ones = torch.ones(2, 48, 4)
    tokens = [x.transpose(1, 2) for x in (l2_norm(q), l2_norm(k), v)]
    out, _ = torch.ops.hydra.linear_attention(*tokens, ones * -math.log(2) / half_life, ones * beta, None)
    o = gamma[:, None] * F.rms_norm(out, (8,), eps=1e-6)
    fit = fit_linear_heads(q, k, v, o)
    assert torch.equal(fit.half_life, half_life)
    torch.testing.assert_close(fit.beta, beta)
    torch.testing.assert_close(fit.gamma, gamma, atol=1e-4, rtol=1e-4)
    assert fit.error.max() < 1e-6


@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
def test_the_fit_is_the_best_of_its_grid_and_scales(rule):
    q, k, v, o = random_heads()
    fit = fit_linear_heads(q, k, v, o, rule=rule)
    assert ((fit.error >= 0) & (fit.error <= 1)).all()
    for half_life in HALF_LIVES:
        for beta in BETAS:
            one = fit_linear_heads(q, k, v, o, rule=rule, half_lives=[half_life], betas=[beta])
            assert (fit.error <= one.error + 1e-6).all()
    larger = fit_linear_heads(q, k, v, 7 * o, rule=rule)
    torch.testing.assert_close(larger.gamma, 7 * fit.gamma)
    torch.testing.assert_close(larger.error, fit.error)


def test_gamma_and_error_are_those_of_least_squares():
    q, k, v, o = random_heads()
    fit = fit_linear_heads(q, k, v, o, half_lives=[16], betas=[0.25])
    ones = torch.ones(2, 48, 4)
    tokens = [x.transpose(1, 2) for x in (l2_norm(q), l2_norm(k), v)]
    out, _ = torch.ops.hydra.linear_attention(*tokens, ones * -math.log(2) / 16, ones * 0.25, None)
    out = F.rms_norm(out, (8,), eps=1e-6)
    for head in range(4):
        x, y = out[:, :, head].reshape(-1, 1), o[:, :, head].reshape(-1, 1)
        gamma = torch.linalg.lstsq(x, y).solution
        torch.testing.assert_close(fit.gamma[head], gamma[0, 0])
        torch.testing.assert_close(fit.error[head], ((y - gamma * x).square().sum() / y.square().sum()))


def test_heads_are_fitted_alone_and_share_key_value_heads():
    q, k, v, o = random_heads(shared=2)
    fit = fit_linear_heads(q, k, v, o)
    for head in range(4):
        shared = slice(head // 2, head // 2 + 1)
        alone = fit_linear_heads(q[:, head : head + 1], k[:, shared], v[:, shared], o[:, :, head : head + 1])
        for name, value in vars(alone).items():
            torch.testing.assert_close(value[0], getattr(fit, name)[head])


def test_a_silent_head_converts_without_loss():
    q, k, v, o = random_heads()
    o[:, :, 1] = 0
    fit = fit_linear_heads(q, k, v, o)
    assert fit.error[1] == 0
    assert fit.gamma[1] == 0
    silent = fit_linear_heads(q, k, torch.zeros_like(v), o)
    assert torch.isfinite(silent.gamma).all()
    assert silent.error.tolist() == [1, 0, 1, 1]


def test_watched_heads_are_what_attention_got_and_gave():
    model = tiny_model()
    ids = torch.randint(VOCABULARY, (2, 9))
    seen = {}

    def visit(name: str, last: LastAttention, output: torch.Tensor) -> None:
        seen[name] = last.q, last.k, last.v, output

    with torch.no_grad(), head_taps(model) as taps, watch_taps(taps, visit):
        model(ids)
    with torch.no_grad(), Recorder(model) as outputs:
        model(ids)
    assert list(seen) == [f"model.layers.{i}.self_attn" for i in range(3)]
    for (q, k, v, o), expected in zip(seen.values(), outputs.values(), strict=True):
        torch.testing.assert_close(o, expected, atol=1e-5, rtol=1e-4)
        again = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(o, again.transpose(1, 2), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def scored():
    model = tiny_model()
    return score_heads(model, pairs=answered_pairs(model, 2), progress=False, seed=4)


def test_scores_say_where_they_come_from(scored, tmp_path):
    assert (scored.unit, scored.seed, scored.length, scored.pairs) == ("head", 4, (LENGTH,), 2)
    assert scored.model.architecture == "Qwen3ForCausalLM"
    assert {"torch", "transformers", "hydrasurgery"} <= scored.versions.keys()
    assert '"unit": "head"' in scored.to_json()
    assert HeadScores.load(scored.save(tmp_path / "scores.json")) == scored
    layer, head = scored.ranking[0]
    assert f"{layer:>5}  {head:>4}  {scored.layers[layer].importance[head]:>10.4f}" in str(scored)
    plan = plan_heads(scored, ratio="3:1")
    assert plan.num_full == 3
    assert plan.model.model_type == "qwen3"


def test_a_file_that_is_no_scores_names_the_file(scored, tmp_path):
    path = tmp_path / "broken.json"
    good = scored.to_json()
    for text in (
        "x",
        "{}",
        good.replace('"unit": "head"', '"unit": "kv"'),
        good.replace('"seed"', '"sead"'),
        good[:-20],
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=r"broken\.json"):
            HeadScores.load(path)
    with pytest.raises(DataError, match=r"none\.json"):
        HeadScores.load(tmp_path / "none.json")


def test_the_picture_is_a_png(scored, tmp_path):
    pytest.importorskip("matplotlib")
    path = scored.plot(tmp_path / "heads.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["heads.png"]


def test_a_missing_matplotlib_names_the_extra(scored, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hydrasurgery\[plot\]"):
        scored.plot(tmp_path / "heads.png")


def symbol_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", *KEY_TOKENS, *VALUE_TOKENS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


def test_probes_are_made_from_a_tokenizer():
    tokenizer = symbol_tokenizer()
    config = tiny_model().config
    config.vocab_size = len(tokenizer)
    model = Qwen3ForCausalLM(config).eval()
    scores = score_heads(model, tokenizer, method="reconstruction", length=(24, 40), count=5, progress=False)
    assert scores.length == (24, 40)
    assert scores.pairs == 5
    assert all(layer.importance == layer.error for layer in scores.layers)
    with pytest.raises(ProbeError, match="clean model answers"):
        score_heads(model, tokenizer, count=2, progress=False)
    with pytest.raises(SequenceLengthError, match="65 tokens.*limit is 64"):
        score_heads(model, tokenizer, length=65, progress=False)
    with pytest.raises(ProbeError, match="needs a tokenizer"):
        score_heads(model)
    with pytest.raises(ProbeError, match="is not one of"):
        score_heads(model, tokenizer, method="magic")
