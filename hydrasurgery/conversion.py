"""Conversion: a decoder into a hybrid by a plan, and a hybrid back into the decoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hydrasurgery.errors import PlanError, UnsupportedModelError
from hydrasurgery.ir.stitch import region_modules, replace_module
from hydrasurgery.norms import unfuse_norms
from hydrasurgery.options import LayerOptions
from hydrasurgery.plan import Plan
from hydrasurgery.pretrained import mark, unmark
from hydrasurgery.sharing import share_copy
from hydrasurgery.surgery import apply_plan, hybrid_pipeline


def rewrite(
    model: nn.Module,
    plan: Plan,
    *,
    layer: LayerOptions | str | None = None,
    pipeline: str | None = None,
    example_inputs: Any = None,
    dump: str | Path | None = None,
) -> nn.Module:
    """Turn the heads that `plan` calls linear into linear attention; returns a hybrid, and leaves `model` as it is.

    The hybrid is a new tree of modules with tensors of its own: nothing that is done to one model reaches the other. On the
    CPU they use the model's memory until one of the two models is written to, on CUDA they are copied at once
    (`hydrasurgery.sharing.share_copy` has the particulars).

    Args:
        model: a Hugging Face decoder, or an nn.Module that calls `F.scaled_dot_product_attention`; all heads full.
        plan: which head becomes what.
        layer: how a layer is built, instead of what the plan says: `hydrasurgery.LayerOptions`, or text such as "hydrahead" (the
            paper's layer) or "untie=true,conv=none". With `untie`, projections are pruned to the heads that read them where they
            can be; the pruned ones are new parameters, no longer the teacher's.
        pipeline: other passes than those of `layer`, as a string.
        example_inputs: see `hydrasurgery.capture`.
        dump: a folder for the text of every region around every pass.

    Returns:
        The hybrid, in the model's mode (train or eval).

    Raises:
        UnsupportedModelError, PlanError, PassError: naming the module.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> teacher, tokenizer = load_teacher()
        >>> hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, ratio="7:1", strategy="random"))
        >>> prompt = tokenizer("The for statement", return_tensors="pt")
        >>> hybrid.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] - prompt["input_ids"].shape[1]
        4
    """
    if layer is not None and pipeline is not None:
        raise PlanError("layer and pipeline both say how a layer is built; leave one of them out.")
    if layer is not None:
        plan = replace(plan, layer=LayerOptions.of(layer))
    hybrid = share_copy(model)
    steps = pipeline or hybrid_pipeline(plan.layer)
    apply_plan(hybrid, plan, steps, example_inputs, dump)
    mark(hybrid, plan, steps)
    hybrid.train(model.training)
    return hybrid


def restore(model: nn.Module) -> nn.Module:
    """Put the original attention modules back, in place; returns `model`.

    Args:
        model: a hybrid that `rewrite` gave in this process.

    Raises:
        UnsupportedModelError: for a copy or a loaded checkpoint, which hold no originals.

    Example:
        >>> import hydrasurgery as hs
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> teacher, _ = load_teacher()
        >>> hybrid = hs.rewrite(teacher, hs.plan_heads(teacher, strategy="all-linear"))
        >>> type(hs.restore(hybrid).model.layers[0].self_attn).__name__
        'Qwen3Attention'
    """
    modules = region_modules(model)
    for name, module in modules.items():
        if module.original is None:
            raise UnsupportedModelError(
                f"{name} holds no original (a copy or a loaded checkpoint); load the teacher instead"
            )
    for name, module in modules.items():
        assert module.original is not None
        replace_module(model, name, module.original)
    unfuse_norms(model)
    unmark(model)
    return model
