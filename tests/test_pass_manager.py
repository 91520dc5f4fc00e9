"""The manager keeps its word: all or nothing, blame by name, claims checked, options typed, one-token graphs kept true."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import hydrasurgery as hs
from hydrasurgery.dialect.names import ATTENTION, FUSION
from hydrasurgery.errors import CheckpointError, PassError, PipelineError
from hydrasurgery.ir.state import extend_kv
from hydrasurgery.layers import l2_norm, to_tokens
from hydrasurgery.passes import REGISTRY, Pass, PassResult, parse, register, run_pipeline
from hydrasurgery.passes.shapes import ShapeInference
from hydrasurgery.surgery import hybrid_pipeline
from tests.families import tiny
from tests.test_families import half_plan, stir
from tests.text import PLAIN, after, calls

IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture
def hybrid() -> nn.Module:
    model = tiny("qwen3")
    return stir(hs.rewrite(model, half_plan(model))).eval()


@torch.no_grad()
def full(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits


@torch.no_grad()
def cached(model: nn.Module) -> Tensor:
    cache = DynamicCache(config=model.config)
    return torch.cat([model(ids, past_key_values=cache, use_cache=True).logits for ids in IDS.split(1, dim=1)], 1)


@register
@dataclass(frozen=True)
class Soften(Pass):
    """Scales what full heads' softmax sees: a change that the one-token graph must share."""

    name: ClassVar[str] = "soften"
    exact: ClassVar[bool] = False
    scale: float = 0.1

    def run(self, region: hs.Region) -> PassResult:
        for node in region.find(ATTENTION):
            node.update_kwarg("scale", self.scale)
        return PassResult(region, True)


@pytest.fixture(autouse=True, scope="module")
def _forget_soften() -> Any:
    yield
    REGISTRY.pop("soften", None)


def test_a_pass_over_a_hybrid_changes_its_one_token_graph_too(hybrid: nn.Module) -> None:
    before = full(hybrid)
    run_pipeline(hs.regions(hybrid), "soften")
    assert (full(hybrid) - before).abs().max() > 1e-4
    assert all(region.decode is not None for region in hs.regions(hybrid))
    assert torch.allclose(cached(hybrid), full(hybrid), atol=1e-5)


def test_a_pass_placed_after_fuse_decode_changes_both_graphs() -> None:
    model = tiny("qwen3")
    steps = "canonicalize-attention,split-heads,linearize-heads,fuse-heads,thread-state,fuse-decode,soften"
    hybrid = stir(hs.rewrite(model, half_plan(model), pipeline=steps)).eval()
    assert all(region.decode is not None for region in hs.regions(hybrid))
    assert torch.allclose(cached(hybrid), full(hybrid), atol=1e-5)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_passes_run_on_a_copied_hybrid_as_on_a_fresh_one(hybrid: nn.Module, make: Any) -> None:
    other = make(hybrid)
    for model in (hybrid, other):
        run_pipeline(hs.regions(model), "soften,select-kernels")
    assert list(map(str, hs.regions(other))) == list(map(str, hs.regions(hybrid)))
    assert torch.equal(full(other), full(hybrid))
    assert torch.equal(cached(other), cached(hybrid))


def test_passes_run_on_a_loaded_hybrid_as_on_a_fresh_one(hybrid: nn.Module, tmp_path: Any) -> None:
    hybrid.save_pretrained(tmp_path)
    other = type(hybrid).from_pretrained(tmp_path).eval()
    for model in (hybrid, other):
        run_pipeline(hs.regions(model), "soften")
    assert torch.equal(full(other), full(hybrid))


def test_assigning_a_graph_drops_the_one_made_of_the_old(hybrid: nn.Module) -> None:
    region = hs.regions(hybrid)[0]
    changed = copy.deepcopy(region.graph)
    changed.find_nodes(op="call_function", target=ATTENTION)[0].update_kwarg("scale", 0.1)
    region.graph = changed
    assert region.decode is None
    assert torch.allclose(cached(hybrid), full(hybrid), atol=1e-5)


@pytest.mark.parametrize(("broken", "stage"), [*zip(range(7), ["requires", "run", "ensures"] * 3, strict=False)])
def test_an_interrupted_pipeline_leaves_the_hybrid_as_it_was(
    hybrid: nn.Module, monkeypatch: pytest.MonkeyPatch, broken: int, stage: str
) -> None:
    """The passes of every later layer too are stopped: the first layer's drafts were done by then."""
    names = (
        "soften",
        "canonicalize-attention",
        "canonicalize-rotary",
        "prune-projections",
        "untie-projections",
    )
    pipeline = [*parse(",".join((*names, "select-kernels", "fuse-decode")))]
    region = hs.regions(hybrid)[0]
    before = full(hybrid), cached(hybrid), {k: v.clone() for k, v in hybrid.state_dict().items()}, str(region)
    cls, original = type(pipeline[broken]), getattr(type(pipeline[broken]), stage)

    def fail(self: Pass, region: hs.Region) -> Any:
        result = original(self, region)
        if region.name.startswith("model.layers.1."):
            raise KeyError("stopped")
        return result

    monkeypatch.setattr(cls, stage, fail)
    with pytest.raises(PassError, match=rf"^{pipeline[broken].name}: model\.layers\.1\.self_attn: KeyError: 'stopped'"):
        run_pipeline(hs.regions(hybrid), pipeline)
    assert hs.regions(hybrid)[0] is region
    for model in (hybrid, copy.deepcopy(hybrid), pickle.loads(pickle.dumps(hybrid))):
        assert torch.equal(full(model), before[0])
        assert torch.equal(cached(model), before[1])
        assert model.state_dict().keys() == before[2].keys()
        assert all(torch.equal(value, before[2][key]) for key, value in model.state_dict().items())
        assert str(hs.regions(model)[0]) == before[3]


STEPS = [step.name for step in parse(hybrid_pipeline("hydrahead"))]


@pytest.mark.parametrize("name", STEPS)
def test_an_interrupted_rewrite_leaves_the_teacher_as_it_was(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = tiny("qwen3")
    before = full(model), {key: value.clone() for key, value in model.state_dict().items()}, list(model.named_modules())
    run = REGISTRY[name].run

    def fail(self: Pass, region: hs.Region) -> PassResult:
        run(self, region)
        raise KeyError("stopped")

    monkeypatch.setattr(REGISTRY[name], "run", fail)
    with pytest.raises(PassError, match=rf"^{name}: model\.layers\.0\.self_attn: KeyError: 'stopped'"):
        hs.rewrite(model, half_plan(model), layer="hydrahead")
    assert torch.equal(full(model), before[0])
    assert all(torch.equal(value, before[1][key]) for key, value in model.state_dict().items())
    assert list(model.named_modules()) == before[2]


def test_a_pass_that_fails_in_the_middle_of_its_work_leaves_nothing() -> None:
    model = tiny("qwen3")
    plan = half_plan(model)
    regions = hs.capture(model)
    for region, layer in zip(regions, plan.layers, strict=True):
        region.kinds = layer.kinds
    texts = list(map(str, regions))
    with pytest.raises(PassError, match=r"^fuse-heads: model\.layers\.0\.self_attn: run split-heads"):
        run_pipeline(regions, "canonicalize-attention,fuse-heads")
    with pytest.raises(PassError, match="^thread-state: "):
        run_pipeline(regions, "canonicalize-attention,split-heads,linearize-heads,thread-state,thread-state")
    assert list(map(str, regions)) == texts
    assert not list(regions[0].module.hydra.children())


@dataclass(frozen=True)
class Hostile(Pass):
    """A pass that breaks one rule."""

    name: ClassVar[str] = "hostile"
    rule: Literal["lies", "writes", "unties", "reshapes", "loses", "strays", "outputs", "fixes", "halves", "kinds"] = (
        "lies"
    )

    def run(self, region: hs.Region) -> PassResult:
        module, graph = region.module, region.graph
        node = graph.find_nodes(op="output")[0]
        o_proj, _ = node.args[0]
        if self.rule == "writes":
            with torch.no_grad():
                module.q_proj.weight.mul_(2)
        if self.rule == "unties":
            module.k_proj.weight = nn.Parameter(module.k_proj.weight.detach() * 2)
        if self.rule == "reshapes":
            norm = module._modules["q_norm"] = copy.copy(module.q_norm)
            norm._parameters = {"weight": nn.Parameter(norm.weight.detach()[None])}
        if self.rule == "loses":
            del module._modules["q_norm"]
            graph.find_nodes(op="call_module", target="q_norm")[0].target = "k_norm"
        if self.rule == "strays":
            module._parameters["extra"] = nn.Parameter(torch.ones(1))
        if self.rule == "kinds":
            region.kinds = region.kinds[:-1]
        if self.rule in ("lies", "outputs", "fixes", "halves"):
            with graph.inserting_before(node):
                function, args = {
                    "lies": (torch.ops.aten.neg.default, (o_proj,)),
                    "outputs": (torch.ops.aten.unsqueeze.default, (o_proj, 0)),
                    "fixes": (torch.ops.aten.view.default, (o_proj, [2, 12, 64])),
                    "halves": (torch.ops.aten.to.dtype, (o_proj, torch.float16)),
                }[self.rule]
                new = graph.call_function(function, args)
            node.args = ((new, None),)
        return PassResult(region, self.rule != "lies")


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("lies", "says that it changed nothing, and it changed the region"),
        ("writes", r"q_proj\.weight was written in place"),
        ("unties", r"parameters were one and are no longer: k_proj\.weight, v_proj\.weight"),
        ("reshapes", r"q_norm\.weight had shape \[16\] and has \[1, 16\]"),
        ("loses", r"parameters vanished: q_norm\.weight"),
        ("strays", "new parameters outside hydra: extra"),
        ("outputs", r"output 0 was .*\['B', 'T', 64\].* and is .*\[1, 'B', 'T', 64\]"),
        ("fixes", "is invalid for input of size"),
        ("halves", r"output 0 was torch\.float32 .* and is torch\.float16"),
        ("kinds", r"do not name one kind for each of 4 heads"),
    ],
)
def test_each_invariant_is_held_against_a_pass_that_breaks_it(rule: Any, reason: str) -> None:
    model = tiny("qwen3")
    if rule == "unties":
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight = layer.self_attn.k_proj.weight
    hybrid = hs.rewrite(model, half_plan(model))
    expected, held = full(hybrid), list(hybrid.named_parameters(remove_duplicate=False))
    with pytest.raises(PassError, match=rf"^hostile: model\.layers\.0\.self_attn: .*({reason})"):
        run_pipeline(hs.regions(hybrid), [Hostile(rule)])
    assert [(name, id(p)) for name, p in hybrid.named_parameters(remove_duplicate=False)] == [
        (n, id(p)) for n, p in held
    ]
    if rule != "writes":  # which is found out, and cannot be undone
        assert torch.equal(full(hybrid), expected)


def test_a_recurrent_state_in_half_precision_is_refused() -> None:
    @dataclass(frozen=True)
    class Halve(Pass):
        name: ClassVar[str] = "halve"

        def run(self, region: hs.Region) -> PassResult:
            write = next(n for n in region.graph.nodes if "recurrent" in n.args and len(n.args) == 3)
            with region.graph.inserting_before(write):
                half = region.graph.call_function(torch.ops.aten.to.dtype, (write.args[2], torch.bfloat16))
            write.update_arg(2, half)
            return PassResult(region, True)

    region = after(PLAIN, "split-heads,linearize-heads,fuse-heads,thread-state")
    with pytest.raises(PassError, match=r"^halve: attn: %\w+ is a recurrent state of torch\.bfloat16, not of float32"):
        run_pipeline([region], [Halve()])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("place-heads{full_rope=no}", r"full_rope is 'no'; give true or false"),
        ("linearize-heads{conv=abc}", r"conv is 'abc'; give a whole number from 0 to 256"),
        ("linearize-heads{conv=4.0}", r"conv is 4\.0; give a whole number"),
        ("place-heads{a=big}", r"a is 'big'; give a number from above 1"),
        ("linearize-heads{rule=rnn}", r"rule is 'rnn'; give one of linear, gated, delta, gated_delta"),
        ("fuse-heads{full_norm=}", r"full_norm is ''; give one of exact, paper"),
        ("fuse-heads{gates=true}", r"has no option 'gates'; it has: full_gate, full_norm, gate"),
        ("split-heads,melt-heads", r"no pass is called 'melt-heads'"),
        ("split-heads{", r"is not of the form"),
        ("split-heads,,fuse-heads", r"is not of the form .*: ',fuse-heads'"),
        ("linearize-heads{conv=-1}", r"conv is -1; give a whole number from 0"),
        ("linearize-heads{conv=999999999999999999999}", r"conv is 999999999999999999999; give"),
        ("linearize-heads{conv=" + "9" * 5000 + "}", r"conv is '9+'\.\.\.; give"),
        ("linearize-heads{conv=" + "[" * 5000 + "}", r"conv is '\[+'\.\.\.; give"),
        ("linearize-heads{conv=" + "-" * 5000 + "}", r"conv is '-+'\.\.\.; give"),
        ("linearize-heads{conv=true}", r"conv is true; give"),
        ("linearize-heads{conv=1_0}", r"conv is '1_0'; give"),
        ("linearize-heads{conv=2,conv=4}", r"linearize-heads: option conv is given twice"),
        ("place-heads{a=nan}", r"a is 'nan'; give a number"),
        ("place-heads{a=1e999}", r"a is '1e999'; give a number"),
        ("place-heads{a=1}", r"a is 1; give a number from above 1"),
        ("-" * 9000, r"no pass is called '-+'\.\.\.; known"),
        ("-" * 100_000, r"at most 10000 characters"),
        ("split-heads," * 1000, r"at most 10000 characters"),
        (None, r"not null"),
    ],
)
def test_options_of_a_pipeline_are_typed(text: str, reason: str) -> None:
    with pytest.raises(PipelineError, match=reason):
        parse(text)


def test_false_is_false() -> None:
    for text in ("false", "False"):
        assert parse(f"place-heads{{full_rope={text}}}")[0] == parse("place-heads{full_rope=false}")[0]
        assert parse(f"place-heads{{full_rope={text}}}")[0].full_rope is False  # type: ignore[attr-defined]
    with pytest.raises(PipelineError, match="linearize-heads: conv is 'abc'; give a whole number"):
        REGISTRY["linearize-heads"](conv="abc")  # type: ignore[call-arg]
    with pytest.raises(PipelineError, match="place-heads: full_rope is 'false'; give true or false"):
        REGISTRY["place-heads"](full_rope="false")  # type: ignore[call-arg]


def test_the_text_of_a_pipeline_reads_back() -> None:
    for text in (
        "canonicalize-rotary,split-heads,place-heads{full_rope=false,log_length=true,a=300.0}",
        "linearize-heads{rule=delta,conv=0},fuse-heads{full_norm=paper,gate=false},thread-state,fuse-decode",
    ):
        assert ",".join(map(str, parse(text))) == text


def test_what_was_inferred_is_forgotten_but_for_shapes() -> None:
    region = after(PLAIN, "split-heads")
    assert calls(region, "hydra::attention") == 2
    assert not any("val" in node.meta for node in region.graph.nodes)


@pytest.fixture
def inferring(monkeypatch: pytest.MonkeyPatch) -> list[ShapeInference]:
    """Which inference was asked, call by call; none is shared before the test."""
    asked: list[ShapeInference] = []
    infer = ShapeInference.infer

    def note(self: ShapeInference, region: hs.Region) -> None:
        asked.append(self)
        infer(self, region)

    monkeypatch.setattr(ShapeInference, "_shared", {})
    monkeypatch.setattr(ShapeInference, "infer", note)
    return asked


def halves() -> nn.Module:
    """A tiny hybrid, rewritten from a teacher of its own."""
    model = tiny("qwen3")
    return hs.rewrite(model, half_plan(model))


def test_what_one_rewrite_has_inferred_serves_the_next(inferring: list[ShapeInference]) -> None:
    halves()
    shared = inferring[0]
    known = len(shared._known), len(shared._keys)
    assert min(known) > 0
    halves()
    assert all(asked is shared for asked in inferring)
    assert (len(shared._known), len(shared._keys)) == known
    region = hs.capture(tiny("qwen3").bfloat16())[0]  # which is new to it
    shared.infer(region)
    assert len(shared._known) > known[0]
    assert {node.meta["val"].dtype for node in region.find(ATTENTION)} == {torch.bfloat16}


def test_inference_that_failed_serves_nothing_more(inferring: list[ShapeInference]) -> None:
    hybrid = halves()
    shared = ShapeInference.shared()
    assert shared is inferring[0]
    with pytest.raises(PassError, match="shape '\\[2, 12, 64\\]' is invalid"):
        run_pipeline(hs.regions(hybrid), [Hostile("fixes")])
    assert inferring[-1] is shared
    assert ShapeInference.shared() is not shared
    inferring.clear()
    halves()
    assert inferring
    assert shared not in inferring


def test_inference_that_knows_too_much_begins_anew(
    inferring: list[ShapeInference], monkeypatch: pytest.MonkeyPatch
) -> None:
    halves()
    shared = ShapeInference.shared()
    monkeypatch.setattr(ShapeInference, "_LARGE", len(shared._known))
    assert ShapeInference.shared() is shared
    monkeypatch.setattr(ShapeInference, "_LARGE", len(shared._known) - 1)
    assert ShapeInference.shared() is not shared


def test_inference_is_of_the_defaults_and_modes_that_are_set() -> None:
    shared = ShapeInference.shared()
    before = torch.get_default_dtype()
    others = []
    try:
        torch.set_default_dtype(torch.float64)
        others.append(ShapeInference.shared())
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        others.append(ShapeInference.shared())
    with torch.inference_mode():
        others.append(ShapeInference.shared())
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            others.append(ShapeInference.shared())
            assert ShapeInference.shared() is others[-1]
    assert len({id(inference) for inference in (shared, *others)}) == 6
    assert ShapeInference.shared() is shared


def own(change: Callable[[hs.Region], Any], modified: bool = True) -> Pass:
    """A pass of one's own that makes a change."""

    @dataclass(frozen=True)
    class Own(Pass):
        name: ClassVar[str] = "own"
        exact: ClassVar[bool] = False

        def run(self, region: hs.Region) -> PassResult:
            change(region)
            return PassResult(region, modified)

    return Own()


def after_node(region: hs.Region, node: Any, function: Any, *args: Any) -> None:
    """Put `function(node, *args)` between a node and what reads it."""
    with region.graph.inserting_after(node):
        new = region.graph.call_function(function, (node, *args))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


LINEAR_BRANCH: dict[str, Callable[[hs.Region], None]] = {
    "q": lambda r: after_node(r, r.find(l2_norm)[0], torch.tanh),
    "output": lambda r: after_node(r, next(n for n in r.graph.nodes if n.name == "o_recurrent"), torch.tanh),
    "beta": lambda r: after_node(r, r.find("hydra.beta")[0], operator.mul, 0.5),
    "decay": lambda r: after_node(r, r.find("hydra.decay")[0], operator.mul, 0.5),
    "convolution": lambda r: after_node(r, r.find(operator.add)[0], torch.tanh),
    "tokens": lambda r: after_node(r, r.find(to_tokens)[0], torch.tanh),
    "eps": lambda r: r.find(FUSION)[0].update_kwarg("eps", 0.1),
}


@pytest.mark.parametrize("where", LINEAR_BRANCH)
def test_a_change_anywhere_in_the_linear_branch_holds_for_one_token_too(hybrid: nn.Module, where: str) -> None:
    before = full(hybrid)
    run_pipeline(hs.regions(hybrid), [own(LINEAR_BRANCH[where])])
    assert (full(hybrid) - before).abs().max() > 1e-5
    assert torch.allclose(cached(hybrid), full(hybrid), atol=1e-5)


def test_changes_inside_a_graph_drop_the_one_token_graph_when_recompiled(hybrid: nn.Module) -> None:
    region = hs.regions(hybrid)[0]
    region.recompile()
    assert region.decode is not None
    region.find(ATTENTION)[0].update_kwarg("scale", 0.01)
    region.recompile()
    assert region.decode is None
    assert torch.allclose(cached(hybrid), full(hybrid), atol=1e-5)
    run_pipeline([region], "select-kernels")
    assert region.decode is not None
    assert torch.allclose(cached(hybrid), full(hybrid), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["place-heads{log_length=true}", "split-heads", "linearize-heads", "fuse-heads", "thread-state"]
)
def test_passes_that_come_before_the_cache_refuse_a_region_that_has_one(hybrid: nn.Module, name: str) -> None:
    with pytest.raises(PassError, match=f"^{parse(name)[0].name}: "):
        run_pipeline(hs.regions(hybrid), name)
    assert torch.allclose(cached(hybrid), full(hybrid), atol=1e-5)


def test_a_cache_that_is_told_twice_is_refused(hybrid: nn.Module) -> None:
    def again(region: hs.Region) -> None:
        node = region.find(extend_kv)[0]
        with region.graph.inserting_after(node):
            region.graph.node_copy(node)

    with pytest.raises(PassError, match="^own: .*the cache is told 2 times"):
        run_pipeline(hs.regions(hybrid), [own(again)])


@pytest.mark.parametrize("kinds", [("linear",) * 4, ("full",) * 4])
def test_layers_of_one_kind_take_passes_too(kinds: tuple[str, ...]) -> None:
    model = tiny("qwen3")
    hybrid = stir(hs.rewrite(model, half_plan(model, kinds))).eval()
    before = full(hybrid)
    run_pipeline(hs.regions(hybrid), "canonicalize-attention,canonicalize-rotary,select-kernels,fuse-decode")
    assert torch.allclose(full(hybrid), before, atol=1e-6)
    assert torch.allclose(cached(hybrid), full(hybrid), atol=1e-5)


def test_a_failed_pass_leaves_modules_and_hooks_alone(hybrid: nn.Module) -> None:
    def spoil(region: hs.Region) -> None:
        region.module.v_proj.weight = nn.Parameter(region.module.v_proj.weight.detach() * 2)
        region.module.hydra.decay.A_log = nn.Parameter(region.module.hydra.decay.A_log.detach() * 2)
        region.module.v_proj.register_forward_hook(lambda *_: None)
        region.module.register_forward_hook(lambda *_: None)
        del region.module.q_norm
        raise RuntimeError("no")

    before, held = full(hybrid), dict(hybrid.named_modules())
    with pytest.raises(PassError, match="^own: model.layers.0.self_attn: RuntimeError: no"):
        run_pipeline(hs.regions(hybrid), [own(spoil)])
    assert torch.equal(full(hybrid), before)
    assert dict(hybrid.named_modules()) == held
    assert not any(module._forward_hooks for module in held.values())


def test_a_pass_keeps_the_modules_that_it_does_not_change(hybrid: nn.Module) -> None:
    held, parameters = dict(hybrid.named_modules()), dict(hybrid.named_parameters())
    seen: list[Any] = []
    handle = hs.regions(hybrid)[0].module.register_forward_hook(lambda *_: seen.append(1))
    run_pipeline(hs.regions(hybrid), "soften,select-kernels")
    assert dict(hybrid.named_modules()) == held
    assert dict(hybrid.named_parameters()) == parameters
    full(hybrid)
    assert seen == [1]
    handle.remove()
    full(hybrid)
    assert seen == [1]


@pytest.mark.parametrize(
    "change",
    [
        lambda region: setattr(region, "window", 3),
        lambda region: region.module.register_buffer("hydra_like", torch.ones(1)),
        lambda region: region.options.update(rotary=9),
    ],
)
def test_every_change_has_to_be_said(hybrid: nn.Module, change: Callable[[hs.Region], Any]) -> None:
    with pytest.raises(PassError, match="^own: .*says that it changed nothing"):
        run_pipeline(hs.regions(hybrid), [own(change, modified=False)])


def test_additions_have_names_of_their_own(hybrid: nn.Module) -> None:
    with pytest.raises(PassError, match=r"^own: .*hydra\.decay is there already"):
        run_pipeline(hs.regions(hybrid), [own(lambda region: region.add("decay", nn.Linear(1, 1)))])


def test_passes_after_the_rewrite_are_saved_with_the_hybrid(hybrid: nn.Module, tmp_path: Any) -> None:
    run_pipeline(hs.regions(hybrid), "soften,select-kernels")
    assert hs.regions(hybrid)[0].later == ("soften",)
    for _ in range(2):
        hybrid.save_pretrained(tmp_path)
        loaded = type(hybrid).from_pretrained(tmp_path).eval()
        assert loaded.config.hydrasurgery["pipeline"].endswith("fuse-decode,soften")
        assert torch.equal(full(loaded), full(hybrid))
    for other in (loaded, copy.deepcopy(hybrid)):
        run_pipeline(hs.regions(other), "soften{scale=0.3}")
        other.save_pretrained(tmp_path / "again")
        assert torch.equal(full(type(hybrid).from_pretrained(tmp_path / "again").eval()), full(other))
    run_pipeline(hs.regions(hybrid)[:1], "soften{scale=0.2}")
    with pytest.raises(CheckpointError, match="passes ran over some regions only"):
        hybrid.save_pretrained(tmp_path)
    run_pipeline(hs.regions(hybrid)[1:], "soften{scale=0.2}")
    run_pipeline(hs.regions(hybrid), [own(lambda region: region.find(ATTENTION)[0].update_kwarg("scale", 0.3))])
    with pytest.raises(CheckpointError, match="cannot be run at loading: no pass is called 'own'"):
        hybrid.save_pretrained(tmp_path)


def test_options_that_text_cannot_give_are_refused() -> None:
    with pytest.raises(PipelineError, match=r"option window is a .*, which a pipeline string cannot give"):

        @register
        @dataclass(frozen=True)
        class Wide(Pass):
            name: ClassVar[str] = "wide"
            window: int | None = None

    assert "wide" not in REGISTRY
