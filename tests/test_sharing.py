"""A hybrid and its teacher: one memory until one of them is written to, and nothing done to one ever reaches the other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import hydrasurgery as hs
from hydrasurgery.sharing import same_bits, same_memory, share_copy, share_parameters, unchanged_names
from hydrasurgery.transfer import Recipe, Stage, distill
from tests.families import PLAIN, PlainDecoder, tiny

IDS = torch.arange(3, 35).view(2, 16)


def pair(tied: bool = False, **layer: Any) -> tuple[Any, Any]:
    teacher = tiny("qwen3", tie_word_embeddings=tied)
    options = hs.LayerOptions(**layer) if layer else None
    return teacher, hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="random"), layer=options)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def shared(one: nn.Module, other: nn.Module) -> set[str]:
    theirs = dict((*other.named_parameters(), *other.named_buffers()))
    return {
        name
        for name, value in (*one.named_parameters(), *one.named_buffers())
        if name in theirs and same_memory(value, theirs[name])
    }


def step(model: Any, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any) -> None:
    model.train()
    stepper = optimizer(model.parameters(), lr=0.1, **options)
    for _ in range(2):
        stepper.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        stepper.step()


def train(model: Any) -> None:
    folder = Path(__file__).parent / "never"  # nothing is saved
    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model=model, args=TrainingArguments(str(folder), **options), train_dataset=rows).train()


def lora(model: Any) -> None:
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], r=4, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    adapted.merge_and_unload()


def edit(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data += 1.0
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.fill_(2.0)


def stir(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight)


def load(model: Any) -> None:
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})


def by_numpy(model: Any) -> None:
    for parameter in model.parameters():
        parameter.detach().numpy()[...] = 3.0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "double": lambda model: model.to(torch.float64),
    "meta": lambda model: model.to("meta"),
    "sgd": step,
    "adamw": lambda model: step(model, torch.optim.AdamW),
    "momentum, fused off": lambda model: step(model, momentum=0.9, foreach=False),
    "adamw, fused": lambda model: step(model, torch.optim.AdamW, fused=True),
    "adagrad, foreach": lambda model: step(model, torch.optim.Adagrad, foreach=True),
    "trainer": train,
    "lora": lora,
    "longer vocabulary": lambda model: model.resize_token_embeddings(128),
    "shorter vocabulary": lambda model: model.resize_token_embeddings(64),
    "edits": edit,
    "numpy": by_numpy,
    "tie_weights": lambda model: (setattr(model.config, "tie_word_embeddings", True), model.tie_weights(), edit(model)),
    "freeze": lambda model: model.requires_grad_(False),
    "apply": lambda model: model.apply(stir),
    "load_state_dict": load,
    "share_memory": lambda model: (model.share_memory(), edit(model)),
    "resized storages": lambda model: [p.untyped_storage().resize_(0) for p in model.parameters()],
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_one_model_leaves_the_other_as_it_was(change: str, tied: bool) -> None:
    for index in (0, 1):  # of the teacher, then of the hybrid
        models = pair(tied)
        other = models[1 - index]
        before, expected, flags = tensors(other), logits(other), [p.requires_grad for p in other.parameters()]
        CHANGES[change](models[index])
        after = tensors(other)
        assert before.keys() == after.keys()
        assert all(same_bits(before[name], after[name]) for name in before)
        assert torch.equal(logits(other), expected)
        assert [p.requires_grad for p in other.parameters()] == flags


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layer", [{}, {"untie": True}])
def test_a_rewrite_copies_no_weight_and_shares_no_object(layer: dict[str, Any], tied: bool) -> None:
    teacher, hybrid = pair(tied, **layer)
    names = shared(hybrid, teacher)
    alone = {n for n, _ in (*hybrid.named_parameters(), *hybrid.named_buffers())} - names
    pruned = {n for n in alone if ".hydra." not in n}
    assert all(".self_attn." in name for name in pruned) if layer else not pruned
    assert {name for name, _ in teacher.named_buffers()} <= names
    ours, theirs = ({id(t) for t in (*m.parameters(), *m.buffers())} for m in (hybrid, teacher))
    assert not ours & theirs
    assert (hybrid.lm_head.weight is hybrid.model.embed_tokens.weight) == tied
    logits(hybrid)
    hybrid(input_ids=IDS, labels=IDS).loss.backward()  # reads and gradients copy nothing
    hs.regions(hybrid)
    assert shared(hybrid, teacher) == names
    assert all(p.grad is None for p in teacher.parameters())


def test_align_copies_nothing_and_a_checkpoint_leaves_the_memory_shared(tmp_path: Path) -> None:
    teacher, hybrid = pair()
    names = shared(hybrid, teacher)
    stage = Stage("align", batch_size=2, length=16, steps=4, lr=1e-2, lr_end=1e-2, warmup=0)
    recipe = Recipe("test", (stage,), checkpoint_every=2)
    distill(hybrid, teacher, torch.arange(3, 90).repeat(4), recipe=recipe, out=tmp_path, progress=False)
    assert shared(hybrid, teacher) == names >= set(dict(teacher.named_parameters()))
    teacher, again = pair()
    distill(again, teacher, torch.arange(3, 90).repeat(4), recipe=recipe, out=tmp_path, progress=False)
    assert shared(again, teacher) == names
    assert all(same_bits(one, other) for one, other in zip(hybrid.parameters(), again.parameters(), strict=True))


def test_only_what_is_written_to_moves() -> None:
    teacher, hybrid = pair()
    names = shared(hybrid, teacher)
    with torch.no_grad():
        hybrid.model.norm.weight.add_(1.0)
        teacher.model.layers[1].mlp.up_proj.weight.mul_(2.0)
    moved = {"model.norm.weight", "model.layers.1.mlp.up_proj.weight"}
    assert shared(hybrid, teacher) == names - moved
    assert names & unchanged_names(hybrid, teacher) == {n for n, _ in teacher.named_parameters()} - moved


def test_a_second_hybrid_of_one_teacher_is_alone_too() -> None:
    teacher, first = pair()
    second = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="random"))
    expected = logits(teacher), logits(second)
    step(first)
    assert torch.equal(logits(teacher), expected[0])
    assert torch.equal(logits(second), expected[1])
    step(teacher)
    assert torch.equal(logits(second), expected[1])


@pytest.mark.parametrize("layer", [{}, {"untie": True}])
@pytest.mark.parametrize("change", [None, "bfloat16", "double"])
def test_restore_gives_a_working_teacher(layer: dict[str, Any], change: str | None) -> None:
    teacher, hybrid = pair(**layer)
    if change:
        CHANGES[change](hybrid)
        CHANGES[change](teacher)
    restored = hs.restore(hybrid)
    assert torch.equal(logits(restored), logits(teacher))
    expected = logits(teacher)
    step(restored)
    assert torch.equal(logits(teacher), expected)


def test_a_restored_hybrid_keeps_what_it_has_learnt() -> None:
    teacher, hybrid = pair()
    step(hybrid)
    learnt = hybrid.model.layers[0].self_attn.q_proj.weight.clone()
    assert torch.equal(hs.restore(hybrid).model.layers[0].self_attn.q_proj.weight, learnt)


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_decoders_are_copied_lazily_too(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    teacher = PlainDecoder(kind)
    hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="random"))
    assert shared(hybrid, teacher) >= set(dict((*teacher.named_parameters(), *teacher.named_buffers())))
    before = tensors(teacher)
    hybrid(IDS).sum().backward()
    torch.optim.SGD(hybrid.parameters(), lr=1.0).step()
    assert all(same_bits(value, before[name]) for name, value in tensors(teacher).items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_no_optimizer_reaches_the_teacher_on_cuda(optimizer: Any, options: dict[str, Any]) -> None:
    teacher, _ = pair()
    teacher.cuda()
    hybrid: Any = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="random"))
    before = tensors(teacher)
    stepper = optimizer(hybrid.parameters(), lr=0.1, **options)
    hybrid(input_ids=IDS.cuda(), labels=IDS.cuda()).loss.backward()
    stepper.step()
    assert all(same_bits(value, before[name]) for name, value in tensors(teacher).items())


class Odd(nn.Module):
    """Tensors of every kind that a model may hold."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(4, 6)
        self.alias, self.turned = nn.Parameter(base[:2]), nn.Parameter(base.t(), requires_grad=False)
        self.alias.note = "kept"  # type: ignore[attr-defined]
        self.array = nn.Parameter(torch.from_numpy(np.ones(3, np.float32)))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("scalar", torch.tensor(2.0))
        self.register_buffer("shared", torch.ones(3).share_memory_())
        self.register_buffer("sparse", torch.eye(3).to_sparse())


def test_aliases_flags_and_memory_that_is_not_torchs() -> None:
    model = Odd()
    clone = share_copy(model)
    before = {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert shared(clone, model) >= {"alias", "turned", "scalar"}
    assert clone.turned.stride() == model.turned.stride()
    assert [p.requires_grad for p in clone.parameters()] == [p.requires_grad for p in model.parameters()]
    assert clone.alias.note == "kept"
    with torch.no_grad():
        clone.alias.zero_()
        assert not clone.turned[:, :2].any()  # they alias each other, as in the model
        for value in (clone.array, clone.scalar, clone.shared):
            value.add_(1.0)
        clone.sparse.mul_(3.0)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(value.to_dense(), before[name].to_dense()), name


def test_weights_that_are_mapped_from_a_file_are_copied(tmp_path: Path) -> None:
    tiny("qwen3").save_pretrained(tmp_path)
    teacher = type(tiny("qwen3")).from_pretrained(tmp_path).eval()
    hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="1:1", strategy="random"))
    before, expected = tensors(teacher), logits(teacher)
    assert unchanged_names(hybrid, teacher) == set(before) - {n for n, _ in teacher.named_buffers()}
    step(hybrid)
    assert all(same_bits(value, before[name]) for name, value in tensors(teacher).items())
    assert torch.equal(logits(teacher), expected)


def test_a_loaded_hybrid_shares_what_it_has_unchanged(tmp_path: Path) -> None:
    teacher, hybrid = pair(tied=True)
    with torch.no_grad():
        hybrid.model.norm.weight[0] += 1.0
    hybrid.save_pretrained(tmp_path)
    loaded = copy.deepcopy(type(hybrid).from_pretrained(tmp_path))
    before = tensors(loaded)
    names = share_parameters(loaded, teacher)
    assert names == {n for n, _ in teacher.named_parameters(remove_duplicate=False)} - {"model.norm.weight"}
    assert shared(loaded, teacher) & set(dict(loaded.named_parameters())) == names - {"lm_head.weight"}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(same_bits(value, before[name]) for name, value in tensors(loaded).items())
    expected = logits(teacher)
    step(loaded)
    assert torch.equal(logits(teacher), expected)


def test_bits_are_compared_and_not_numbers() -> None:
    zero, nan = torch.zeros(3), torch.full((3,), torch.nan)
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.double())
    assert not same_bits(zero, torch.zeros(3, 1))
