"""Saving and loading hybrids with plain `save_pretrained` and `AutoModelForCausalLM.from_pretrained`.

The plan and the pipeline lie in `config.json` under `quantization_config` with the method "hydrasurgery": the one place
where transformers lets a library change a model's modules before its weights are read. Loading runs the same passes on
the empty model, then reads safetensors; nothing in a checkpoint is executed.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hydrasurgery.errors import CheckpointError, HydraError, PipelineError, UnsupportedModelError
from hydrasurgery.inference.limits import free_generation, limit_generation
from hydrasurgery.ir.stitch import region_modules, regions
from hydrasurgery.passes import parse
from hydrasurgery.plan import Plan
from hydrasurgery.surgery import apply_plan

METHOD = "hydrasurgery"


@register_quantization_config(METHOD)
class HydraConfig(QuantizationConfigMixin):
    """The surgery that a checkpoint needs: its plan (as JSON data) and its pipeline (as a string)."""

    def __init__(self, plan: dict[str, Any], pipeline: str, **kwargs: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.plan = plan
        self.pipeline = pipeline


@register_quantizer(METHOD)
class HydraSurgeon(HfQuantizer):
    """Runs the checkpoint's pipeline on the empty model before its weights are loaded."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config: Any = self.quantization_config
        try:
            plan = Plan.from_json(json.dumps(config.plan))
            apply_plan(model, plan, config.pipeline)
        except HydraError as error:
            raise CheckpointError(
                f"{type(model).__name__}: the checkpoint's surgery does not fit it: {error}"
            ) from error
        limit_generation(model)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        name = type(model).__name__
        for region, module in region_modules(model).items():
            added = {f"{region}.hydra.{key}": value for key, value in module.hydra.named_parameters()}
            away = [key for key, value in added.items() if value.is_meta]
            if away:
                raise UnsupportedModelError(
                    f"{name}: {away[0]} is offloaded, and a region's graph reads it in place; load the hybrid on one device"
                )
            # transformers marks what it has read from the files; the rest it would leave as it is in memory.
            missing = [key for key, value in added.items() if not getattr(value, "_is_hf_initialized", False)]
            if missing:
                raise CheckpointError(
                    f"{name}: the checkpoint lacks {missing[0]} (or holds it in another shape); save the hybrid again with "
                    "save_pretrained"
                )
        model.is_quantized = False  # type: ignore[assignment]  # it trains and changes dtype like any model
        return model

    def get_state_dict_and_metadata(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Called before anything is saved: passes that ran since the rewrite become part of the checkpoint's pipeline."""
        config: Any = model.config
        record_passes(model, config.quantization_config)
        return super().get_state_dict_and_metadata(model, *args, **kwargs)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate` with a static cache compiles the decode step, as it does the teacher's."""
        return True


def record_passes(model: nn.Module, surgery: Any) -> None:
    """Add the passes that ran over a hybrid's regions since the rewrite to the pipeline of its config.

    Raises:
        CheckpointError: they did not run over all regions, or loading would not know one of them.
    """
    found = regions(model)
    later = {region.later: region.name for region in found}
    if not any(later):
        return
    if len(later) > 1:
        raise CheckpointError(
            f"{', '.join(later.values())}: passes ran over some regions only ({'; '.join(map(','.join, later))}), which a "
            "checkpoint cannot repeat; run them over hydrasurgery.regions(hybrid), or save with pickle"
        )
    (steps,) = later
    try:
        parse(",".join(steps))
    except PipelineError as error:
        raise CheckpointError(
            f"{type(model).__name__}: a pass that ran on it cannot be run at loading: {error}"
        ) from error
    surgery.pipeline = ",".join((surgery.pipeline, *steps))
    for region in found:
        region.later = ()


def mark(hybrid: Any, plan: Plan, pipeline: str) -> None:
    """Write the surgery into the hybrid's config, so that `save_pretrained` saves it."""
    surgery = HydraConfig(json.loads(plan.to_json()), pipeline)
    hybrid.config.quantization_config = surgery
    hybrid.hf_quantizer = HydraSurgeon(surgery, pre_quantized=True)
    limit_generation(hybrid)


def unmark(model: Any) -> None:
    """Take the surgery out of a config again."""
    config: Any = getattr(model, "config", None)
    if isinstance(getattr(config, "quantization_config", None), HydraConfig):
        del config.quantization_config
        model.hf_quantizer = None
        free_generation(model)
