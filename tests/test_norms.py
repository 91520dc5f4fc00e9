"""Norms of hybrids: one launch on a GPU, and nothing else than the model's own elsewhere."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import hydrasurgery as hs
from hydrasurgery.norms import FusedRMSNorm, fuse_norms, fused, unfuse_norms
from tests.families import tiny


@pytest.fixture(scope="module")
def teacher():
    return tiny("qwen3")


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == "Qwen3RMSNorm"]


def made(teacher: nn.Module, strategy: str = "all-linear") -> nn.Module:
    return hs.rewrite(teacher, hs.plan_heads(teacher, strategy=strategy))


def test_a_hybrid_has_them_and_its_teacher_does_not(teacher):
    hybrid = made(teacher)
    ours, theirs = norms_of(hybrid), norms_of(teacher)
    assert (
        len(ours) == len(theirs) == 4 * teacher.config.num_hidden_layers + 1
    )  # of q, k, and twice a layer; the last one
    assert all(isinstance(m, FusedRMSNorm) and isinstance(m, type(theirs[0])) for m in ours)
    assert not any(isinstance(m, FusedRMSNorm) for m in theirs)
    assert not any(isinstance(m, FusedRMSNorm) for m in hs.restore(hybrid).modules())


def test_a_model_whose_heads_are_all_full_is_left_as_it_is(teacher):
    plan = hs.plan_heads(teacher, strategy="all-linear")
    layers = tuple(replace(layer, kinds=("full",) * len(layer.kinds)) for layer in plan.layers)
    plan = replace(plan, layers=layers)
    assert not any(isinstance(m, FusedRMSNorm) for m in hs.rewrite(teacher, plan).modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_have_them_too(teacher, copied):
    hybrid = made(teacher).eval()
    again = copied(hybrid)
    assert all(isinstance(m, FusedRMSNorm) for m in norms_of(again)) and len(norms_of(again)) == len(norms_of(hybrid))
    ids = torch.arange(3, 9)[None]
    assert torch.equal(again(ids).logits, hybrid(ids).logits)


def test_saved_and_loaded_ones_too(teacher, tmp_path):
    from transformers import AutoModelForCausalLM

    hybrid = made(teacher)
    hybrid.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(isinstance(m, FusedRMSNorm) for m in norms_of(again)) and len(norms_of(again)) == len(norms_of(hybrid))
    assert again.state_dict().keys() == hybrid.state_dict().keys()


@pytest.mark.parametrize("w", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_computes_what_is_written(x, w):
    norm = norms_of(tiny("qwen3"))[0].to(w)
    nn.init.normal_(norm.weight)
    torch.manual_seed(0)
    given = (1e-3 * torch.randn(5, norm.weight.numel())).to(x).requires_grad_()  # where eps matters
    wanted, found = norm(given), fused(given, norm.weight, norm.variance_epsilon)
    assert found.dtype == wanted.dtype
    close = {"rtol": 1e-5, "atol": 1e-6} if x == w == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    assert torch.allclose(found.float(), wanted.float(), **close)
    grads = [torch.autograd.grad(y.float().square().sum(), (given, norm.weight)) for y in (found, wanted)]
    for one, other in zip(*grads, strict=True):
        assert one.dtype == other.dtype and torch.allclose(
            one.float(), other.float(), rtol=5e-2, atol=0.05 * other.abs().max()
        )


def test_cpus_and_wide_numbers_run_the_models_own_code(teacher):
    norm, plain = norms_of(made(teacher))[0], norms_of(teacher)[0]
    x = torch.randn(3, norm.weight.numel())
    assert torch.equal(norm(x), plain(x)) and torch.equal(norm(x.double()), plain(x.double()))


def test_gpus_run_the_kernel(teacher, monkeypatch):
    """On tensors that say that they are on a GPU."""
    called = []
    monkeypatch.setattr("hydrasurgery.norms.fused", lambda x, weight, eps: called.append(eps) or x)
    norm = copy.deepcopy(norms_of(made(teacher))[0])
    there = {"device": "cuda", "dtype": torch.bfloat16}
    with FakeTensorMode():
        norm.weight = nn.Parameter(torch.empty(len(norm.weight), **there))
        norm(torch.empty(2, len(norm.weight), **there))
    assert called == [norm.variance_epsilon]


def test_norms_of_other_kinds_are_left_alone():
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, hidden_states):
            return (1 + self.weight) * hidden_states

    model = nn.Sequential(Norm(), nn.LayerNorm(4))
    fuse_norms(model)
    assert not any(isinstance(m, FusedRMSNorm) for m in model)


def test_hooks_and_names_stay(teacher):
    model = copy.deepcopy(teacher)
    norm, seen = norms_of(model)[0], []
    norm.register_forward_hook(lambda *_: seen.append(1))
    names = list(model.state_dict())
    fuse_norms(model)
    fuse_norms(model)
    assert isinstance(norm, FusedRMSNorm) and not isinstance(type(norm).base, FusedRMSNorm)
    norm(torch.ones(1, norm.weight.numel()))
    assert seen == [1] and list(model.state_dict()) == names
    unfuse_norms(model)
    assert type(norm).__name__ == "Qwen3RMSNorm" and not isinstance(norm, FusedRMSNorm)
