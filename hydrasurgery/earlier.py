"""Hybrids as earlier versions saved them, with the surgery in config.json's `quantization_config`: read, and made today's."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hydrasurgery.errors import CheckpointError, HydraError
from hydrasurgery.ir.stitch import region_modules
from hydrasurgery.placement import check_placed
from hydrasurgery.plan import Plan
from hydrasurgery.surgery import apply_plan

METHOD = "hydrasurgery"


@register_quantization_config(METHOD)
class EarlierSurgery(QuantizationConfigMixin):
    """The plan (as JSON data) and the pipeline (as a string) of an earlier checkpoint."""

    def __init__(self, plan: Any = None, pipeline: Any = None, **kwargs: Any) -> None:
        if not isinstance(plan, dict) or not isinstance(pipeline, str):
            raise CheckpointError("config.json: quantization_config of hydrasurgery lacks its plan or pipeline")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.plan = plan
        self.pipeline = pipeline


@register_quantizer(METHOD)
class EarlierReader(HfQuantizer):
    """Runs the surgery on the empty model before its weights are read, and leaves a hybrid as a rewrite makes it."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from hydrasurgery.pretrained import (
            mark,
        )  # which imports the module of transformers after whose import this one runs

        surgery: Any = self.quantization_config
        try:
            plan = Plan.from_dict(surgery.plan)
            apply_plan(model, plan, surgery.pipeline)
        except HydraError as error:
            raise CheckpointError(
                f"{type(model).__name__}: the checkpoint's surgery does not fit it: {error}"
            ) from error
        del model.config.quantization_config  # type: ignore[union-attr]
        mark(model, plan, surgery.pipeline)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, module in region_modules(model).items():
            # transformers marks what it has read from the files; the rest it would leave as it is in memory.
            for key, value in module.hydra.named_parameters():
                if not getattr(value, "_is_hf_initialized", False):
                    raise CheckpointError(
                        f"{type(model).__name__}: the checkpoint lacks {name}.hydra.{key} (or holds it in another shape); save "
                        "the hybrid again with save_pretrained"
                    )
            module._original = (None,)  # type: ignore[assignment]
        check_placed(model)
        self.remove_quantization_config(model)
        for part in model.modules():
            vars(getattr(part, "config", None) or part).pop("_is_quantized", None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
