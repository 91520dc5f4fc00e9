"""hydrasurgery: turn a pretrained decoder into a long-context hybrid of softmax and linear attention heads."""

from hydrasurgery import ops, pretrained
from hydrasurgery.plan import Plan, plan_heads
from hydrasurgery.regions import Region, capture, head_taps, region_modules, register_interface, restore
from hydrasurgery.rewrite import rewrite

__version__ = "0.1.0"
register_interface()

__all__ = [
    "Plan",
    "Region",
    "capture",
    "head_taps",
    "ops",
    "plan_heads",
    "pretrained",
    "region_modules",
    "restore",
    "rewrite",
]
