"""Each pass on a region written as text: what it makes of it, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from hydrasurgery.errors import PassError, PostconditionError, PreconditionError
from hydrasurgery.ir.reading import parse_region
from hydrasurgery.passes import PassResult, SplitHeads, run_pipeline
from tests.text import HALVES, PLAIN, ROTARY, after, calls, holds, projections

SDPA = PLAIN.replace(
    "%attention: [B, T, 4, 8] = hydra::attention(%q, %k, %v, scale=0.5)",
    "%sdpa: [B, 4, T, 8] = aten::scaled_dot_product_attention(%q, %k, %v, None, 0.0, True, scale=0.5, enable_gqa=True)\n"
    "  %attention: [B, T, 4, 8] = aten::transpose.int(%sdpa, 1, 2)",
)


def refused(text: str, pipeline: str, reason: str, kinds: str = "FllF") -> None:
    module = projections() if "self." in text else None
    with pytest.raises(PreconditionError, match=reason):
        after(text, pipeline, module, kinds)


def test_canonicalize_attention_raises_pytorchs_attention() -> None:
    region = after(SDPA, "canonicalize-attention")
    holds(region, "%attention_default: [B, T, 4, 8] = hydra::attention(%q, %k, %v, None, scale=0.5)")
    assert calls(region, "aten::scaled_dot_product_attention") == 0


def test_canonicalize_attention_drops_what_slices_the_mask() -> None:
    sliced = ROTARY.replace("%v, %mask,", "%v, %cut,").replace(
        "  %attention:", "  %cut: [B, 1, T, T] = aten::slice.Tensor(%mask, 3, 0, end)\n  %attention:"
    )
    region = after(sliced, "canonicalize-attention", projections())
    holds(region, "%attention: [B, T, 4, 8] = hydra::attention(%q_rotated, %k_rotated, %v, %mask, scale=0.5)")
    assert calls(region, "aten::slice.Tensor") == 4  # those of the rotary embedding


def test_canonicalize_attention_refuses_both_directions_and_no_attention() -> None:
    with pytest.raises(PassError, match=r"^canonicalize-attention: attn: .*attends in both directions"):
        after(SDPA.replace("0.0, True", "0.0, False"), "canonicalize-attention")
    none = PLAIN.replace("hydra::attention(%q, %k, %v, scale=0.5)", "aten::transpose.int(%q, 1, 2)")
    with pytest.raises(PostconditionError, match=r"^canonicalize-attention: attn: 0 attention nodes"):
        after(none, "canonicalize-attention")


def test_canonicalize_rotary_makes_one_node_of_each_embedding() -> None:
    region = after(ROTARY, "canonicalize-rotary", projections())
    holds(
        region,
        """
        options rotary=2
        %rotated: [B, 4, T, 8] = rotate(%q, %cos, %sin, 'half')
        %rotated_1: [B, 2, T, 8] = rotate(%k, %cos, %sin, 'half')
        %attention: [B, T, 4, 8] = hydra::attention(%rotated, %rotated_1, %v, %mask, scale=0.5)
        """,
    )
    assert calls(region, "aten::neg") == 0


def test_canonicalize_rotary_makes_one_node_of_halves_that_are_rotated_one_by_one() -> None:
    region = after(HALVES, "canonicalize-rotary", projections())
    holds(
        region,
        """
        options rotary=2
        %cat_default: [1, 1, T, 8] = aten::cat([%cos, %cos], -1)
        %cat_default_1: [1, 1, T, 8] = aten::cat([%sin, %sin], -1)
        %rotated: [B, 4, T, 8] = rotate(%q, %cat_default, %cat_default_1, 'half')
        %rotated_1: [B, 2, T, 8] = rotate(%k, %cat_default, %cat_default_1, 'half')
        """,
    )
    assert calls(region, "aten::cat") == 2
    back = HALVES.replace("sub.Tensor(%q_0, %q_1)", "add.Tensor(%q_0, %q_1)").replace(
        "add.Tensor(%q_2, %q_3)", "sub.Tensor(%q_2, %q_3)"
    )
    holds(
        after(back, "canonicalize-rotary", projections()),
        "%rotated: [B, 4, T, 8] = rotate(%q, %cat_default, %cat_default_1, 'half-back')",
    )


@torch.no_grad()
def test_halves_that_are_rotated_one_by_one_keep_their_bits() -> None:
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    for dtype in (torch.float32, torch.bfloat16):
        module = projections().to(dtype)
        x, cos, sin = (torch.randn(size, dtype=dtype) for size in ((2, 5, 32), (1, 1, 5, 4), (1, 1, 5, 4)))
        plain, made = parse_region(HALVES, module), after(HALVES, "canonicalize-rotary", module)
        first, second = (
            fx.Interpreter(region.module, graph=region.graph).run(x, cos, sin, mask, enable_io_processing=False)
            for region in (plain, made)
        )
        assert calls(made, "rotate") == 2
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sub.Tensor(%q_0, %q_1)", "add.Tensor(%q_0, %q_1)"),
        ("add.Tensor(%q_2, %q_3)", "sub.Tensor(%q_2, %q_3)"),
        ("mul.Tensor(%q_first, %cos)", "mul.Tensor(%q_second, %cos)"),
        ("mul.Tensor(%q_first, %sin)", "mul.Tensor(%q_first, %cos)"),
        ("cat([%q_left, %q_right], -1)", "cat([%q_right, %q_left], -1)"),
    ],
)
def test_canonicalize_rotary_leaves_halves_that_are_none(old: str, new: str) -> None:
    assert old in HALVES
    region = after(HALVES.replace(old, new), "canonicalize-rotary", projections())
    assert calls(region, "rotate") == region.options["rotary"] == 1


def test_canonicalize_rotary_leaves_what_is_none() -> None:
    region = after(ROTARY.replace("aten::neg(%q_second)", "aten::abs(%q_second)"), "canonicalize-rotary", projections())
    assert calls(region, "rotate") == region.options["rotary"] == 1
    refused(SDPA, "canonicalize-rotary", "run canonicalize-attention first")


def test_split_heads_gives_each_kind_its_heads() -> None:
    region = after(PLAIN, "split-heads")
    holds(
        region,
        """
        %k_full: [B, 2, T, 8] = select_heads(%k, (0, 1), 1) {role=kept-keys}
        %v_full: [B, 2, T, 8] = select_heads(%v, (0, 1), 1) {role=kept-values}
        %q_full: [B, 2, T, 8] = select_heads(%q, (0, 3), 1)
        %o_full: [B, T, 2, 8] = hydra::attention(%q_full, %k_full, %v_full, None, None, scale=0.5) {kind=full}
        %q_linear: [B, 2, T, 8] = select_heads(%q, (1, 2), 1) {branch=linear}
        %o_linear: [B, T, 2, 8] = hydra::attention(%q_linear, %k_linear, %v_linear, None, scale=0.5) {kind=linear}
        %heads: [B, T, 4, 8] = merge_heads(%o_full, %o_linear, (1, 2))
        """,
    )
    assert calls(after(PLAIN, "split-heads", kinds="FFFF"), "hydra::attention") == 1
    holds(
        after(PLAIN, "split-heads", kinds="lFll"), "%k_full: [B, 1, T, 8] = select_heads(%k, (0,), 1) {role=kept-keys}"
    )
    refused(SDPA, "split-heads", "run canonicalize-attention first")


def test_untie_projections_doubles_what_the_linear_heads_read() -> None:
    region = after(ROTARY, "split-heads,untie-projections", projections())
    holds(
        region,
        """
        %q_proj_linear: [B, T, 32] = self.hydra.q_proj(%x)
        %q_linear: [B, 2, T, 8] = select_heads(%q_rotated_linear, (1, 2), 1) {branch=linear}
        """,
    )
    assert torch.equal(region.module.hydra.q_proj.weight, region.module.q_proj.weight)
    assert region.module.hydra.q_proj.weight is not region.module.q_proj.weight
    assert calls(after(ROTARY, "split-heads,untie-projections", projections(), "llll"), "self.hydra.q_proj") == 0
    refused(ROTARY, "untie-projections", "run split-heads first")


def test_prune_projections_keeps_the_rows_that_are_read() -> None:
    module = projections()
    region = after(ROTARY, "split-heads,untie-projections,prune-projections", module)
    holds(
        region,
        """
        %q_proj: [B, T, 16] = self.q_proj(%x)
        %q_proj_linear: [B, T, 16] = self.hydra.q_proj(%x)
        """,
    )
    rows = module["q_proj"].weight.view(4, 8, 32)
    assert torch.equal(region.module.q_proj.weight.view(2, 8, 32), rows[[0, 3]])
    assert torch.equal(region.module.hydra.q_proj.weight.view(2, 8, 32), rows[[1, 2]])
    assert module["q_proj"].weight.shape == (32, 32)  # the teacher's stays whole


def test_prune_projections_leaves_what_both_branches_read() -> None:
    region = after(ROTARY, "split-heads,prune-projections", projections())
    assert region.module.q_proj.weight.shape == (32, 32)


def test_order_heads_deals_the_slots_anew() -> None:
    region = after(ROTARY, "order-heads,prune-projections,split-heads", projections(), "llFF")
    holds(region, "kinds FFll\nteacher_heads (2, 3, 0, 1)")
    holds(region, "%q_full: [B, 2, T, 8] = select_heads(%q_rotated, (0, 1), 1)")
    assert str(after(PLAIN, "order-heads", kinds="FFll")) == str(parse_region(PLAIN.replace("FllF", "FFll")))
    refused(PLAIN, "split-heads,order-heads", "one attention node is needed")
    refused(PLAIN, "split-heads,order-heads", "run it before split-heads", kinds="FFFF")


def test_place_heads_drops_rotary_embeddings_and_scales_by_length() -> None:
    region = after(
        ROTARY, "canonicalize-rotary,split-heads,place-heads{full_rope=false,log_length=true}", projections()
    )
    holds(
        region,
        """
        %counted = hydra::token_positions(%valid, %reset, None) {state=seen}
        %positions: [B, T] = getitem(%counted, 0)
        """,
    )
    assert calls(region, "rotate") == 2  # the linear heads'
    assert calls(region, "scale_by_length") == 1
    refused(ROTARY, "canonicalize-rotary,place-heads{linear_rope=false}", "run split-heads first")
    refused(ROTARY, "split-heads,place-heads{linear_rope=false}", "run canonicalize-rotary first")


def test_linearize_heads_makes_a_recurrence_of_the_linear_heads() -> None:
    region = after(PLAIN, "split-heads,linearize-heads")
    holds(
        region,
        """
        options rule='gated_delta', conv='residual'
        %q_conv = hydra::causal_conv(%to_tokens, %hydra_q_conv_weight, None, %reset, None) {state=q_conv}
        %decay: [B, T, 2] = self.hydra.decay(%x, %valid, %reset)
        %beta: [B, T, 2] = self.hydra.beta(%x, %valid)
        %o_recurrent: [B, T, 2, 8] = getitem(%linear_attention, 0) {kind=linear}
        """,
    )
    assert calls(region, "hydra::attention") == 1
    assert calls(after(PLAIN, "split-heads,linearize-heads{rule=linear,conv=0}"), "self.hydra.decay") == 0
    assert calls(after(PLAIN, "split-heads,linearize-heads", kinds="FFFF"), "hydra::linear_attention") == 0


def test_linearize_heads_refuses_what_it_cannot_read() -> None:
    refused(PLAIN, "linearize-heads", "run split-heads first")
    for kind in ("native", "residual-unrotated"):
        refused(PLAIN, f"split-heads,linearize-heads{{conv_kind={kind}}}", "run canonicalize-rotary first")


def test_fuse_heads_brings_the_kinds_together() -> None:
    region = after(PLAIN, "split-heads,linearize-heads,fuse-heads")
    holds(
        region,
        """
        %hydra_gamma: [2] = self.hydra.gamma
        %gate: [B, T, 2, 1] = self.hydra.output_gate(%x)
        %fused_heads: [B, T, 4, 8] = hydra::scale_norm_fusion(%o_full, %o_recurrent, %hydra_gamma, %gate, """
        """linear_heads=[1, 2], norm_full=False)
        %flat: [B, T, 32] = aten::flatten.using_ints(%fused_heads, 2)
        """,
    )
    paper = after(PLAIN, "split-heads,linearize-heads,fuse-heads{full_norm=paper,full_gate=true}")
    holds(paper, "%hydra_gamma: [4] = self.hydra.gamma\n%gated_heads: [B, T, 4, 8] = mul(%fused_heads, %gate)")
    assert calls(after(PLAIN, "split-heads,fuse-heads", kinds="FFFF"), "hydra::scale_norm_fusion") == 0


def test_fuse_heads_refuses_heads_that_are_not_there() -> None:
    refused(PLAIN, "fuse-heads", "run split-heads and linearize-heads first")
    refused(PLAIN, "split-heads,fuse-heads", "run split-heads and linearize-heads first")
    refused(PLAIN, "split-heads,linearize-heads,fuse-heads{gate=false,full_gate=true}", "one gate serves all heads")
    refused(PLAIN, "split-heads,linearize-heads,fuse-heads,fuse-heads", "fused already")


HYBRID = "split-heads,linearize-heads,fuse-heads,thread-state"


def test_thread_state_reads_and_writes_the_cache_layer() -> None:
    region = after(PLAIN, HYBRID)
    holds(
        region,
        """
        %state = input state
        %first_key = first_key(%state)
        %kv = extend_kv(%state, %k_full, %v_full, None)
        %k_all: [B, 2, T, 8] = getitem(%kv, 0)
        %read_state_3 = read_state(%state, 'recurrent')
        %write_state_3 = write_state(%state, 'recurrent', %getitem_6)
        """,
    )
    assert calls(region, "write_state") == 4
    assert calls(after(PLAIN, HYBRID, kinds="llll"), "count_tokens") == 1
    refused(PLAIN, "thread-state", "run split-heads first")
    refused(PLAIN, f"{HYBRID},thread-state", "threaded already")


def test_fuse_decode_makes_a_second_graph_of_one_step() -> None:
    region = after(PLAIN, f"{HYBRID},fuse-decode")
    assert region.decoded_by == "fuse-decode"
    first, second = str(region).split("\ndecode by fuse-decode\n")
    assert "step_linear" not in first
    assert "hydra::linear_attention" not in second
    assert "= step_linear(%state, %q_linear, %k_linear, %v_linear, " in second
    for options in ("linearize-heads{rule=delta},fuse-heads", "linearize-heads,fuse-heads{full_norm=paper}"):
        assert after(PLAIN, f"split-heads,{options},thread-state,fuse-decode").decode is None
    refused(PLAIN, "fuse-decode", "run thread-state first")


def test_select_kernels_notes_what_will_run() -> None:
    region = after(PLAIN, "split-heads,linearize-heads,fuse-heads,select-kernels")
    for target in ("hydra::attention", "hydra::linear_attention", "hydra::causal_conv", "hydra::scale_norm_fusion"):
        lines = [line for line in str(region).splitlines() if f"= {target}(" in line]
        assert lines and all("kernel=reference" in line for line in lines)
    refused(PLAIN, "select-kernels{dtype=float33}", "dtype is 'float33'")


def test_a_promise_that_is_broken_names_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SplitHeads, "ensures", lambda self, region: self.promise(region, False, "no"))
    with pytest.raises(PostconditionError, match="^split-heads: attn: no$"):
        run_pipeline([parse_region(PLAIN)], [SplitHeads()])
    assert PassResult._fields == ("region", "modified")
