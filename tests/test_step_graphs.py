"""Decoding by CUDA graphs: `generate` as it is called says what eager steps say."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import TextStreamer

import hydrasurgery as hs
from tests.families import stir, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def hybrid():
    teacher = tiny("qwen3", num_hidden_layers=3)
    made = stir(hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="fixed")))
    return made.eval().to("cuda", torch.bfloat16)


def prompt(length: int = 20, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (rows, length), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return ids, mask


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": False, "num_return_sequences": 1, "repetition_penalty": 1.3},
        {"do_sample": False, "output_logits": True, "return_dict_in_generate": True},
        {"do_sample": False, "output_hidden_states": True, "return_dict_in_generate": True},
    ],
    ids=str,
)
def test_it_says_what_eager_steps_say(hybrid, options, padded):
    ids, mask = prompt()
    call = {"max_new_tokens": 24, **({"attention_mask": mask} if padded else {}), **options}
    found = []
    for eager in ({}, {"cache_implementation": "static", "disable_compile": True}):
        torch.manual_seed(1)
        found.append(hybrid.generate(ids, **call, **eager))
    if not isinstance(found[0], torch.Tensor):
        for one, other in zip(*(getattr(f, "logits", None) or () for f in found), strict=True):
            assert torch.equal(one, other)
        found = [f.sequences for f in found]
    assert torch.equal(*found)


def test_steps_are_replayed(hybrid, monkeypatch):
    replayed = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replayed.append(1) or replay(graph))
    hybrid.generate(prompt()[0], max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert len(replayed) == 8  # the first token is the prompt's, the second step is run as it is


def test_long_prompts_go_in_pieces(hybrid, monkeypatch):
    from hydrasurgery.inference import graphs

    ids, mask = prompt(200)
    whole = hybrid.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    monkeypatch.setattr(graphs, "CHUNK", 64)
    assert torch.equal(hybrid.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), whole)


def test_streamers_are_told(hybrid, capsys):
    class Letters:
        def decode(self, ids, **_):
            return "".join(chr(97 + int(i) % 26) for i in ids)

    ids, _ = prompt(rows=1)
    found = hybrid.generate(ids, max_new_tokens=6, do_sample=False, streamer=TextStreamer(Letters()))
    assert Letters().decode(found[0]) in capsys.readouterr().out.replace("\n", "")


def test_windows_and_autocast_are_decoded_without_and_say_so(hybrid):
    from hydrasurgery.inference import graphs

    graphs._said.clear()
    teacher = tiny("mistral")
    sliding = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="fixed")).eval().to("cuda")
    with pytest.warns(RuntimeWarning, match="without CUDA graphs: layers with a sliding window"):
        sliding.generate(prompt()[0], max_new_tokens=4, do_sample=False)
    with pytest.warns(RuntimeWarning, match="autocast is on"), torch.autocast("cuda", torch.bfloat16):
        hybrid.generate(prompt()[0], max_new_tokens=4, do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        hybrid.generate(prompt()[0], max_new_tokens=4, do_sample=False)


def test_a_cache_of_the_users_own_is_used(hybrid):
    from transformers import DynamicCache

    ids, _ = prompt()
    cache = DynamicCache(config=hybrid.config)
    found = hybrid.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert cache.get_seq_length() == found.shape[1] - 1


def test_hooks_are_run_at_every_step(hybrid):
    from hydrasurgery.inference import graphs

    graphs._said.clear()
    seen = []
    handle = hybrid.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    try:
        with pytest.warns(RuntimeWarning, match="without CUDA graphs: the model has forward hooks"):
            hybrid.generate(prompt()[0], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    finally:
        handle.remove()
    assert len(seen) == 6
