"""What is known of a decoder: its modes come back, it stands still, it is asked for few logits, its limits are read."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hydrasurgery.decoders import (
    check_length,
    evaluating,
    logits_at,
    position_limit,
    run_model,
    standing_still,
    text_config,
    vocabulary_size,
)
from hydrasurgery.errors import SequenceLengthError
from tests.families import tiny


class Plain(nn.Module):
    """No config, another name for the tokens, and logits as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)


def test_modules_that_are_shared_come_back_to_their_own_modes() -> None:
    shared = nn.Dropout().eval()
    one, other = nn.Sequential(shared, nn.Dropout(), shared), nn.Sequential(nn.Dropout(), shared)
    with contextlib.suppress(KeyError), evaluating(one, other):
        assert not any(module.training for model in (one, other) for module in model.modules())
        raise KeyError
    assert not shared.training
    assert all(module.training for model in (one, other) for module in model.modules() if module is not shared)


def test_a_module_that_stood_still_moves_again() -> None:
    inner, x = nn.Linear(2, 2), torch.zeros(1, 2)
    own = nn.Linear(2, 2)
    own.forward = lambda given: given + 1  # type: ignore[method-assign]
    seen = []
    inner.register_forward_hook(lambda _module, _args, out: seen.append(out))
    with contextlib.suppress(KeyError), standing_still(inner, own, inner, output="still"):
        assert (inner(x), own(x, anything=1)) == ("still", "still")
        raise KeyError
    assert seen == ["still"]
    assert "forward" not in vars(inner)
    assert torch.equal(own(x), x + 1)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@torch.no_grad()
def test_logits_at_positions_are_those_of_the_whole_sequence(family: str) -> None:
    model, ids, positions = tiny(family).eval(), torch.randint(40, (2, 7)), torch.tensor([1, 6])
    assert run_model(model, ids).past_key_values is None
    torch.testing.assert_close(logits_at(model, ids, positions), model(ids).logits[:, positions])
    later = torch.arange(3, 10).expand(2, -1)
    wanted = model(ids, position_ids=later).logits[:, positions]
    torch.testing.assert_close(logits_at(model, ids, positions, position_ids=later), wanted)


def test_a_plain_module_is_asked_for_what_it_has() -> None:
    model, ids = Plain(), torch.tensor([[1, 2, 3]])
    assert torch.equal(logits_at(model, ids, torch.tensor([2]), position_ids=ids), model(ids)[:, 2:])
    assert (text_config(model), position_limit(model), vocabulary_size(model)) == (None, None, None)
    check_length([model], 10**9)


def test_limits_are_those_of_the_text() -> None:
    model, plain = tiny("qwen3"), Plain()
    assert position_limit(model) == model.config.max_position_embeddings
    assert vocabulary_size(model) == model.config.vocab_size
    text = SimpleNamespace(max_position_embeddings=8, vocab_size=9)
    plain.config = SimpleNamespace(get_text_config=lambda: text, max_position_embeddings=99)  # type: ignore[assignment]
    assert (position_limit(plain), vocabulary_size(plain)) == (8, 9)
    check_length([model, plain], 8)
    with pytest.raises(SequenceLengthError, match=r"Plain.*9 tokens.*limit is 8"):
        check_length([model, plain], 9)
    text.max_position_embeddings = -1  # how some configs say that there is none
    assert position_limit(plain) is None
