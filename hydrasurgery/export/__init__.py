"""Ways out of PyTorch's eager mode: ONNX with explicit states, `.pt2` programs, and a `torch.compile` backend."""

from hydrasurgery.export.onnx_file import OnnxExport, export_onnx
from hydrasurgery.export.runtime import OnnxDecoder

__all__ = ["OnnxDecoder", "OnnxExport", "export_onnx"]
