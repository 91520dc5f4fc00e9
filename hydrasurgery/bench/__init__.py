"""How fast the kernels are on this machine, against their peers in one process and against the machine's own floor."""

from hydrasurgery.bench.cases import SUITES, Layer, Suite
from hydrasurgery.bench.run import bench

__all__ = ["SUITES", "Layer", "Suite", "bench"]
