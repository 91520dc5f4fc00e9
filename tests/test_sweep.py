"""The list of models that convert: true for a few of each kind, and complete."""

from __future__ import annotations

import re

import pytest
import torch
import transformers

import hydrasurgery as hs
from hydrasurgery.errors import ExportError, UnsupportedModelError
from tests.families import PlainDecoder, stir
from tests.sweep import CONVERTS, PAGE, REFUSED, distance, examine, in_pieces, plan_of, run
from tests.zoo import TYPES, tiny_model

LISTED = PAGE.read_text(encoding="utf-8")
ROWS = dict(re.findall(rf"^\| ([\w-]+) \| \w+ \| ({CONVERTS}|{REFUSED}) \|", LISTED, re.M))
HALF = 8  # frequencies of a head


@pytest.fixture(autouse=True)
def same_version() -> None:
    if f"transformers {transformers.__version__}," not in LISTED:
        pytest.skip("docs/models.md was written with another transformers")


def test_the_page_lists_every_type_and_its_counts() -> None:
    assert sorted(ROWS) == sorted(TYPES)
    assert set(ROWS.values()) == {CONVERTS, REFUSED}
    for verdict in (CONVERTS, REFUSED):
        assert re.search(rf"\b{list(ROWS.values()).count(verdict)} (are )?{verdict[:-1]}", LISTED)


@pytest.mark.parametrize("model_type", ["bert", "ctrl", "recurrent_gemma", "jetmoe", "phimoe", "jamba"])
def test_what_is_listed_as_converting_does(model_type: str) -> None:
    row = examine(model_type)
    assert (row.verdict, ROWS[model_type]) == (CONVERTS, CONVERTS), row.reason


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("doge", r"model\.layers\.0\.self_attn computes its mask from the hidden states"),
        ("deepseek_v4", r"model\.layers\.0\.self_attn asks its cache for layers"),
        ("llama4_text", r"model\.layers\.\d\.self_attn asks its cache for get_seq_length"),
        ("falcon_h1", r"self_attn: the model keeps a LinearAttentionAndFullAttentionLayer there"),
        ("zamba2", r"shared_transformer\.self_attn appends to the cache's layers \[1\] and is layer -1"),
        ("dots3_note_text", "MLA, kv_lora_rank=8"),
        ("bart", r"encoder_attn is an attention module that makes no attention call"),
    ],
)
def test_what_is_listed_as_refused_is_refused_by_name(model_type: str, reason: str) -> None:
    assert ROWS[model_type] == REFUSED
    with pytest.raises(UnsupportedModelError, match=reason):
        hs.capture(tiny_model(model_type))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("model_type", "setting"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("llama", {"is_causal": False}),
        ("bert", {"is_decoder": False}),
        ("roberta", {"is_decoder": False}),
        ("electra", {"is_decoder": False}),
    ],
)
def test_encoders_are_refused_whatever_they_are_called(model_type: str, setting: dict, device: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"\.self(_attn)? attends in both directions"):
        hs.capture(tiny_model(model_type, **setting).to(device))


class PrefixAttention(torch.nn.Module):
    """Its first tokens see each other, by a mask of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(width, 3 * width)

    def mask(self, length: int, device: torch.device) -> torch.Tensor:
        prefix = torch.arange(length, device=device) < 6
        return torch.ones(length, length, dtype=torch.bool, device=device).tril() | prefix

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.mixed(x)).chunk(3, dim=-1))
        mask = self.mask(x.shape[1], x.device)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Causal(PrefixAttention):
    """A causal mask that it makes where its input is."""

    def mask(self, length: int, device: torch.device) -> torch.Tensor:
        return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class Peeking(Causal):
    """Its mask is causal, but it adds the next token before it attends."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.pad(x, (0, 0, 0, 1))[:, 1:]


@pytest.mark.parametrize("attention", [PrefixAttention, Peeking])
def test_a_later_token_that_matters_is_found_by_trying(attention: type[torch.nn.Module]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"attention\.0 attends in both directions"):
        hs.capture(PlainDecoder(attention))


class Forking(Causal):
    """Goes another way for short inputs."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[1] > 8 else x


def test_code_that_goes_another_way_is_found_by_trying() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"attention\.0 (was captured as something else|cannot be exported)"
    ):
        hs.capture(PlainDecoder(Forking))


def test_attention_that_mixes_tokens_outside_of_it_is_refused_where_there_is_a_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    owner = type(model.model.layers[0].self_attn)
    plain = owner.forward

    def counting(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        places = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None, :, None]
        shifted = hidden_states * (1 + 0.1 * places)
        return plain(self, shifted, position_embeddings, attention_mask, past_key_values, **kwargs)

    monkeypatch.setattr(owner, "forward", counting)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.self_attn mixes tokens, or counts them"):
        hs.capture(model)


def test_new_tensors_follow_the_hybrid_to_another_device() -> None:
    plain = PlainDecoder(Causal)
    ids = torch.ones(1, 5, dtype=torch.long)
    assert hs.rewrite(plain, plan_of(plain)("full", "linear")).to("meta")(ids.to("meta")).is_meta
    model = tiny_model("recurrent_gemma")
    hybrid = hs.rewrite(model, plan_of(model)("full", "linear"))
    assert not any("device(type=" in str(region) for region in hs.regions(hybrid))
    assert ", 'device')" in str(hs.regions(hybrid)[0])


@pytest.fixture(scope="module", params=["phi3", "phimoe", "llama"])
def long_rope(request: pytest.FixtureRequest) -> torch.nn.Module:
    """Rotary embeddings that have other factors from 17 tokens on."""
    scales = {"short_mscale": 1.2, "long_mscale": 1.5} if request.param == "phimoe" else {}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1 + 0.1 * i for i in range(HALF)],
        "long_factor": [3 + 0.5 * i for i in range(HALF)],
        "original_max_position_embeddings": 16,
        "factor": 4.0,
        "partial_rotary_factor": 1.0,
        **scales,
    }
    own = {"original_max_position_embeddings": 16} if request.param == "phi3" else {}
    return tiny_model(request.param, rope_parameters=rope, max_position_embeddings=64, **own)


def tokens(length: int) -> torch.Tensor:
    return (torch.arange(2 * length).view(2, length) * 7) % 80 + 3


@torch.no_grad()
def test_long_rope_changes_its_factors_in_a_hybrid_as_in_its_teacher(long_rope: torch.nn.Module) -> None:
    hybrid = hs.rewrite(long_rope, plan_of(long_rope)("full"))
    for length in (8, 24, 8, 40):  # short, long, and back
        assert torch.equal(run(hybrid, tokens(length)), run(long_rope, tokens(length)))
    sizes = (12, *[1] * 12)  # over the limit while decoding
    assert torch.equal(in_pieces(hybrid, sizes, tokens(24)), in_pieces(long_rope, sizes, tokens(24)))
    short = run(long_rope, tokens(16)), run(long_rope, tokens(17))[:, :16]
    assert distance(*short) > 1e-4, "the factors are all the same"


def test_an_exported_program_changes_factors_too(long_rope: torch.nn.Module, tmp_path) -> None:
    if long_rope.config.model_type == "phimoe":
        pytest.skip("its code asks for the length in Python, which torch.export refuses")
    hybrid = stir(hs.rewrite(long_rope, plan_of(long_rope)("full", "linear")))
    made = hs.export_pt2(hybrid, tmp_path / "m.pt2", verbose=False)
    program = torch.export.load(tmp_path / "m.pt2").module()
    for length in (8, 24, 8):
        past = tuple(state.empty(2) for state in made.states)
        ids = tokens(length)
        got = program(ids, torch.ones_like(ids), torch.arange(length).expand(2, -1), past)[0]
        assert distance(got, run(hybrid, ids)) < 1e-5


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "qwen2"])
def test_frequencies_that_are_made_anew_cannot_be_exported(model_type: str, tmp_path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = tiny_model(model_type, rope_parameters=rope, max_position_embeddings=16)
    hybrid = hs.rewrite(model, plan_of(model)("full"))
    for length in (8, 24, 8):
        assert torch.equal(run(hybrid, tokens(length)), run(model, tokens(length)))
    with pytest.raises(ExportError, match=r"rotary_emb of \w+ computes its rotary frequencies anew"):
        hs.export_pt2(hybrid, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
