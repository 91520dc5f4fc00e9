"""The text of a region reads back: the same graphs, notes and facts, for every family, and nothing else is read."""

from __future__ import annotations

import copy
import operator
import pickle
import re

import pytest
import torch
from torch import fx, nn

import hydrasurgery as hs
from hydrasurgery.errors import RegionTextError
from hydrasurgery.ir.reading import parse_region
from hydrasurgery.ir.region import Region
from hydrasurgery.ir.text import NOTES, format_graph, parse_graph
from tests.families import FAMILIES, tiny
from tests.storage.models import small
from tests.test_families import half_plan
from tests.text import PLAIN


def nodes(graph: fx.Graph | None) -> list[tuple[object, ...]]:
    """All that a graph is: its nodes with arguments, shapes and notes, references by name."""

    def plain(value: object) -> object:
        return fx.node.map_aggregate(value, lambda v: ("node", v.name) if isinstance(v, fx.Node) else v)

    found = graph.nodes if graph is not None else ()
    return [
        (
            n.name,
            n.op,
            n.target,
            plain(n.args),
            plain(n.kwargs),
            n.meta.get("shape"),
            [n.meta.get(key) for key in NOTES],
        )
        for n in found
    ]


def same(one: Region, other: Region) -> None:
    """Assert that two regions are equal in all but their modules."""
    assert nodes(one.graph) == nodes(other.graph)
    assert nodes(one.decode) == nodes(other.decode)
    mine, theirs = (
        {k: v for k, v in vars(r).items() if k not in ("module", "_graph", "_decode")} for r in (one, other)
    )
    assert mine == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_of_a_region_reads_back(family: str) -> None:
    model = tiny(family)
    if len(set(getattr(model.config, "layer_types", None) or ())) < 2:  # layers of one kind have one text
        model = small(family)
    ids = torch.arange(3, 15)[None]
    texts = list(hs.capture(model))
    for layer in ("default", "hydrahead,full_rope=true"):
        hybrid = hs.rewrite(model, half_plan(model), layer=layer)
        texts += hs.regions(hybrid)
    for region in texts:
        again = parse_region(str(region), region.module)
        same(again, region)
        assert str(again) == str(region)
    with torch.no_grad():
        expected = hybrid(ids, use_cache=False).logits
        for region in hs.regions(hybrid):
            region.adopt(parse_region(str(region), region.module))
        assert torch.equal(hybrid(ids, use_cache=False).logits, expected)


def test_copies_keep_all_that_passes_need() -> None:
    model = tiny("qwen3")
    hybrid = hs.rewrite(model, half_plan(model))
    for other in (copy.deepcopy(hybrid), pickle.loads(pickle.dumps(hybrid))):
        for one, two in zip(hs.regions(hybrid), hs.regions(other), strict=True):
            same(one, two)
            assert two.module is not one.module and two.module.region is two
            assert [n.meta["kind"] for n in two.graph.nodes if "kind" in n.meta] == ["full", "linear"]


def double(x: torch.Tensor) -> torch.Tensor:
    """A function that the text cannot know."""
    return x * 2


def test_functions_of_ones_own_are_given_by_name_and_pickled_by_reference() -> None:
    region = parse_region(PLAIN)
    node = region.find(torch.ops.hydra.attention.default)[0]
    with region.graph.inserting_after(node):
        louder = region.graph.call_function(double, (node,))
    node.replace_all_uses_with(louder, delete_user_cb=lambda user: user is not louder)
    region.recompile()
    name = f"{__name__}:double"
    assert f"= {name}(%attention)" in str(region)
    with pytest.raises(RegionTextError, match="no function is known as"):
        parse_region(str(region))
    same(parse_region(str(region), functions={name: double}), region)
    same(pickle.loads(pickle.dumps(region)), region)


def test_constants_of_every_kind_read_back() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    constants = (None, True, -3, 0.1, 1e-6, float("inf"), "it's %x", [1, (2,)], torch.float32, torch.channels_last)
    y = graph.call_function(torch.ops.aten.add.Tensor, (x, constants), {"where": torch.device("cuda:1"), "at": [x]})
    part = graph.call_function(operator.getitem, (y, slice(None, -1, 2)))
    graph.output((part, None))
    assert nodes(parse_graph(format_graph(graph))[0]) == nodes(graph)


@pytest.mark.parametrize(
    ("line", "instead", "reason"),
    [
        ("kinds FllF", "kinds FxxF", "kinds 'FxxF' are not letters"),
        ("%attention: [B, T, 4, 8] =", "%q: [B, T, 4, 8] =", "%q is defined twice"),
        ("hydra::attention(%q,", "hydra::attention(%w,", "%w is used before it is defined"),
        ("hydra::attention(", "hydra::attend(", "attend"),
        ("hydra::attention(", "eval(", "no function is known as 'eval'"),
        ("hydra::attention(", "os:system(", "no function is known as 'os:system'"),
        ("scale=0.5", "scale=open('x')", r"open\('x'\) is no argument"),
        ("scale=0.5", "scale=__import__('os').name", "is no argument"),
        ("input v", "self.v; import os", "is neither a call nor a path"),
        ("{role=hidden-states}", "{colour=red}", "no note is called 'colour'"),
        ("  return %flat\n", "", "no line `return"),
        ("region attn: 4", "region attn: four", "is not of the form"),
        ("region attn: 4", "region attn: 1000000000", "is not of the form"),
        ("region attn: 4", f"region attn: {'4' * 5000}", r"is not of the form"),
        ("scale=0.5", f"scale={'-' * 100_000}1", r"^.{,400}$"),
        ("scale=0.5", f"scale={'(' * 100_000}", r"^.{,400}$"),
        ("scale=0.5", f"scale={'[' * 2000 + ']' * 2000}", r"^.{,400}$"),
        ("scale=0.5", f"scale={'9' * 5000}", "cannot be read"),
        ("kinds FllF", f"kinds FllF\n  options a={'-' * 100_000}1", "options .* cannot be read"),
        ("kinds FllF", "kinds FllF\n  options a=-'b'", "options .* cannot be read"),
    ],
)
def test_what_is_no_region_is_refused_with_the_line(line: str, instead: str, reason: str) -> None:
    with pytest.raises(RegionTextError, match=reason):
        parse_region(PLAIN.replace(line, instead))


def test_a_text_without_a_module_runs() -> None:
    region = parse_region(PLAIN, nn.Module())
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    out = region.module(torch.randn(1, 6, 32), q=q, k=k, v=k)
    assert torch.equal(out, hs.ops.attention(q, k, k, scale=0.5).flatten(2))
    assert not re.search("hydra[.]", str(region))
