"""Ways out of PyTorch's eager mode: ONNX with explicit states, `.pt2` programs, and a `torch.compile` backend."""

from hydrasurgery.export.onnx_file import OnnxExport, export_onnx
from hydrasurgery.export.pt2 import Pt2Export, export_pt2
from hydrasurgery.export.runtime import OnnxDecoder

__all__ = ["OnnxDecoder", "OnnxExport", "Pt2Export", "export_onnx", "export_pt2"]
