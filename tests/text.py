"""Regions for tests, written as text, and what their text must hold."""

from __future__ import annotations

from torch import nn

from hydrasurgery.ir.reading import parse_region
from hydrasurgery.ir.region import Region
from hydrasurgery.passes import run_pipeline

# Four query heads of 8 over two KV heads, straight from the call's inputs: no module is needed.
PLAIN = """
region attn: 4 heads (2 linear), 2 KV heads of 8
  kinds FllF
  call x, q, k, v
  %x: [B, T, 32] = input x {role=hidden-states}
  %q: [B, 4, T, 8] = input q
  %k: [B, 2, T, 8] = input k
  %v: [B, 2, T, 8] = input v
  %attention: [B, T, 4, 8] = hydra::attention(%q, %k, %v, scale=0.5)
  %flat: [B, T, 32] = aten::flatten.using_ints(%attention, 2)
  return %flat
"""
# The same heads after projections, with a rotary embedding of halves on q and k.
ROTARY = """
region attn: 4 heads (2 linear), 2 KV heads of 8
  kinds FllF
  call x, cos, sin, mask, cache=past_key_values
  %x: [B, T, 32] = input x {role=hidden-states}
  %cos: [1, 1, T, 8] = input cos
  %sin: [1, 1, T, 8] = input sin
  %mask: [B, 1, T, T] = input mask {dtype=bool}
  %q_proj: [B, T, 32] = self.q_proj(%x)
  %q_heads: [B, T, 4, 8] = aten::unflatten.int(%q_proj, 2, [4, 8])
  %q: [B, 4, T, 8] = aten::transpose.int(%q_heads, 1, 2)
  %k_proj: [B, T, 16] = self.k_proj(%x)
  %k_heads: [B, T, 2, 8] = aten::unflatten.int(%k_proj, 2, [2, 8])
  %k: [B, 2, T, 8] = aten::transpose.int(%k_heads, 1, 2)
  %v_proj: [B, T, 16] = self.v_proj(%x)
  %v_heads: [B, T, 2, 8] = aten::unflatten.int(%v_proj, 2, [2, 8])
  %v: [B, 2, T, 8] = aten::transpose.int(%v_heads, 1, 2)
  %q_cos: [B, 4, T, 8] = aten::mul.Tensor(%q, %cos)
  %q_first: [B, 4, T, 4] = aten::slice.Tensor(%q, 3, 0, 4)
  %q_second: [B, 4, T, 4] = aten::slice.Tensor(%q, 3, 4, end)
  %q_minus: [B, 4, T, 4] = aten::neg(%q_second)
  %q_turned: [B, 4, T, 8] = aten::cat([%q_minus, %q_first], -1)
  %q_sin: [B, 4, T, 8] = aten::mul.Tensor(%q_turned, %sin)
  %q_rotated: [B, 4, T, 8] = aten::add.Tensor(%q_cos, %q_sin)
  %k_cos: [B, 2, T, 8] = aten::mul.Tensor(%k, %cos)
  %k_first: [B, 2, T, 4] = aten::slice.Tensor(%k, 3, 0, 4)
  %k_second: [B, 2, T, 4] = aten::slice.Tensor(%k, 3, 4, end)
  %k_minus: [B, 2, T, 4] = aten::neg(%k_second)
  %k_turned: [B, 2, T, 8] = aten::cat([%k_minus, %k_first], -1)
  %k_sin: [B, 2, T, 8] = aten::mul.Tensor(%k_turned, %sin)
  %k_rotated: [B, 2, T, 8] = aten::add.Tensor(%k_cos, %k_sin)
  %attention: [B, T, 4, 8] = hydra::attention(%q_rotated, %k_rotated, %v, %mask, scale=0.5)
  %flat: [B, T, 32] = aten::flatten.using_ints(%attention, 2)
  %o_proj: [B, T, 32] = self.o_proj(%flat)
  return %o_proj
"""
# The same with each half rotated by itself.
HALVES = ROTARY.replace("[1, 1, T, 8] = input", "[1, 1, T, 4] = input")
for _name, _heads in (("q", 4), ("k", 2)):
    _begin, _end = (HALVES.index(f"  %{_name}_{step}: ") for step in ("cos", "rotated"))
    _lines = f"""
  %{_name}_first: [B, {_heads}, T, 4] = aten::slice.Tensor(%{_name}, 3, 0, 4)
  %{_name}_second: [B, {_heads}, T, 4] = aten::slice.Tensor(%{_name}, 3, 4, end)
  %{_name}_0: [B, {_heads}, T, 4] = aten::mul.Tensor(%{_name}_first, %cos)
  %{_name}_1: [B, {_heads}, T, 4] = aten::mul.Tensor(%{_name}_second, %sin)
  %{_name}_left: [B, {_heads}, T, 4] = aten::sub.Tensor(%{_name}_0, %{_name}_1)
  %{_name}_2: [B, {_heads}, T, 4] = aten::mul.Tensor(%{_name}_second, %cos)
  %{_name}_3: [B, {_heads}, T, 4] = aten::mul.Tensor(%{_name}_first, %sin)
  %{_name}_right: [B, {_heads}, T, 4] = aten::add.Tensor(%{_name}_2, %{_name}_3)
"""[1:]
    HALVES = HALVES[:_begin] + _lines + HALVES[_end:]
    _sum = f"aten::add.Tensor(%{_name}_cos, %{_name}_sin)"
    HALVES = HALVES.replace(_sum, f"aten::cat([%{_name}_left, %{_name}_right], -1)")


def projections() -> nn.Module:
    """The children that ROTARY and HALVES call."""
    return nn.ModuleDict(
        {
            "q_proj": nn.Linear(32, 32),
            "k_proj": nn.Linear(32, 16),
            "v_proj": nn.Linear(32, 16),
            "o_proj": nn.Linear(32, 32),
        }
    )


def after(text: str, pipeline: str, module: nn.Module | None = None, kinds: str = "FllF") -> Region:
    """The region of a text after a pipeline."""
    region = parse_region(text.replace("kinds FllF", f"kinds {kinds}"), module)
    return run_pipeline([region], pipeline)[0]


def holds(region: Region, expected: str) -> None:
    """Assert that the region's text has these lines, in this order, whatever stands between them."""
    have = [line.strip() for line in str(region).splitlines()]
    at = 0
    for line in filter(None, map(str.strip, expected.splitlines())):
        assert line in have[at:], f"{line!r} is not where it was expected in\n{region}"
        at = have.index(line, at) + 1


def calls(region: Region, target: str) -> int:
    """How often the region's own graph calls what its text writes as `target`."""
    return sum(f"= {target}(" in line for line in str(region).split("\ndecode by")[0].splitlines())
