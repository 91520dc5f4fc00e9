"""hydrasurgery: turn a pretrained decoder into a long-context hybrid of softmax and linear attention heads."""

from hydrasurgery import ops, pretrained
from hydrasurgery.export import OnnxDecoder, export_onnx, export_pt2
from hydrasurgery.forecast import forecast
from hydrasurgery.options import LayerOptions
from hydrasurgery.plan import Plan, plan_heads
from hydrasurgery.regions import Region, capture, head_taps, region_modules, regions, register_interface, restore
from hydrasurgery.rewrite import rewrite
from hydrasurgery.selection import HeadScores, score_heads
from hydrasurgery.transfer import distill
from hydrasurgery.transfer.start import calibrate

__version__ = "0.1.0"
register_interface()

__all__ = [
    "HeadScores",
    "LayerOptions",
    "OnnxDecoder",
    "Plan",
    "Region",
    "calibrate",
    "capture",
    "distill",
    "export_onnx",
    "export_pt2",
    "forecast",
    "head_taps",
    "ops",
    "plan_heads",
    "pretrained",
    "region_modules",
    "regions",
    "restore",
    "rewrite",
    "score_heads",
]
