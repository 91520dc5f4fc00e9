"""What kernels ask of a card."""

from __future__ import annotations

import torch


def processors(device: torch.device) -> int:
    """How many programs run at once at least; 1 of what is no card."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
