"""hydrasurgery: turn a pretrained decoder into a long-context hybrid of softmax and linear attention heads."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from hydrasurgery.late import when_imported

if TYPE_CHECKING:
    from hydrasurgery import ops as ops
    from hydrasurgery.choose import plan_heads as plan_heads
    from hydrasurgery.conversion import restore as restore
    from hydrasurgery.conversion import rewrite as rewrite
    from hydrasurgery.costs import forecast as forecast
    from hydrasurgery.export import OnnxDecoder as OnnxDecoder
    from hydrasurgery.export import export_onnx as export_onnx
    from hydrasurgery.export import export_pt2 as export_pt2
    from hydrasurgery.ir.capture import capture as capture
    from hydrasurgery.ir.reading import parse_region as parse_region
    from hydrasurgery.ir.region import Region as Region
    from hydrasurgery.ir.stitch import region_modules as region_modules
    from hydrasurgery.ir.stitch import regions as regions
    from hydrasurgery.ir.taps import head_taps as head_taps
    from hydrasurgery.options import LayerOptions as LayerOptions
    from hydrasurgery.passes import run_pipeline as run_pipeline
    from hydrasurgery.plan import Plan as Plan
    from hydrasurgery.selection import HeadScores as HeadScores
    from hydrasurgery.selection import score_heads as score_heads
    from hydrasurgery.transfer import calibrate as calibrate
    from hydrasurgery.transfer import distill as distill

__version__ = "0.1.0"

# Where each public name is, loaded when it is first used.
PLACES = {
    "HeadScores": "selection",
    "LayerOptions": "options",
    "OnnxDecoder": "export",
    "Plan": "plan",
    "Region": "ir.region",
    "calibrate": "transfer",
    "capture": "ir.capture",
    "distill": "transfer",
    "export_onnx": "export",
    "export_pt2": "export",
    "forecast": "costs",
    "head_taps": "ir.taps",
    "parse_region": "ir.reading",
    "plan_heads": "choose",
    "region_modules": "ir.stitch",
    "regions": "ir.stitch",
    "restore": "conversion",
    "rewrite": "conversion",
    "run_pipeline": "passes",
    "score_heads": "selection",
}
__all__ = [*PLACES, "ops"]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        if importlib.util.find_spec(f"hydrasurgery.{name}") is None:
            raise AttributeError(f"module 'hydrasurgery' has no attribute {name!r}")
        return importlib.import_module(f"hydrasurgery.{name}")
    value = globals()[name] = getattr(importlib.import_module(f"hydrasurgery.{PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _read_hybrids() -> None:
    """Make transformers read the config.json of saved hybrids, and with it load them."""
    importlib.import_module("hydrasurgery.stored").register_form()


def _join_models() -> None:
    """Make transformers know `attn_implementation="hydra"`, and load hybrids that an earlier version saved."""
    importlib.import_module("hydrasurgery.ir.interface").register_interface()
    importlib.import_module("hydrasurgery.earlier")


when_imported("transformers.models.auto.configuration_auto", _read_hybrids)
when_imported("transformers.modeling_utils", _join_models)
