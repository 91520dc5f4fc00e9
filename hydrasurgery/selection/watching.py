"""What attention got and gave while a model runs: hooks on the taps of its heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hydrasurgery.ir.taps import HeadTap

Taps = dict[str, HeadTap]  # by the layer's name


@contextmanager
def watch_taps(taps: Taps, visit: Callable[[str, LastAttention, Tensor], None]) -> Iterator[None]:
    """Inside the block every layer that runs calls visit(name, its attention, its heads' outputs [B, T, H, V]).

    Example: each layer's queries.
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> from hydrasurgery.ir.taps import head_taps
        >>> model, queries = load_teacher()[0], {}
        >>> with head_taps(model) as taps, watch_taps(taps, lambda name, last, output: queries.update({name: last.q})):
        ...     _ = model(torch.ones(1, 5, dtype=torch.long))
        >>> len(queries), queries["model.layers.0.self_attn"].shape
        (8, torch.Size([1, 16, 5, 16]))
    """
    with LastAttention(taps) as last, ExitStack() as stack:
        for name, tap in taps.items():
            hook = tap.register_forward_hook(lambda _tap, _args, out, name=name: visit(name, last, out))
            stack.callback(hook.remove)
        yield


class LastAttention:
    """Inside its block, what the attention that ran last was called with: for edits, which run after it.

    Attributes:
        q, k, v: [B, H, T, K], [B, Hk, S, K] and [B, Hk, S, V], rotated.
        mask: Broadcast to [B, H, T, S], bool (True: may look) or numbers to add; None without one.
        sinks: [H], or None.
        options: The other arguments of `hydra::attention`, by name.

    Example:
        >>> from hydrasurgery.demo.teacher import load_teacher
        >>> from hydrasurgery.ir.taps import head_taps
        >>> model = load_teacher()[0]
        >>> with head_taps(model) as taps, LastAttention(taps) as last:
        ...     _ = model(torch.ones(1, 5, dtype=torch.long))
        >>> last.weights(torch.tensor([3])).shape  # of the last layer, [B, H, 1, S]
        torch.Size([1, 16, 1, 5])
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    options: dict[str, Any]

    def __init__(self, taps: Taps) -> None:
        self._taps, self._hooks = taps, ExitStack()

    def __enter__(self) -> LastAttention:
        for tap in self._taps.values():
            self._hooks.callback(tap.register_forward_hook(self._note, with_kwargs=True, prepend=True).remove)
        return self

    def __exit__(self, *_error: object) -> None:
        self._hooks.close()

    def _note(self, _tap: nn.Module, args: tuple[Any, ...], options: dict[str, Any], _output: Tensor) -> None:
        self.q, self.k, self.v, self.mask, self.sinks = (*args, None, None)[:5]
        self.options = options

    def weights(self, positions: Tensor) -> Tensor:
        """Attention weights [B, H, P, S] in fp32 of the queries at `positions` [P]."""
        keys, groups = self.k.shape[2], self.q.shape[1] // self.k.shape[1]
        scale, softcap = self.options.get("scale") or self.q.shape[-1] ** -0.5, self.options.get("softcap")
        places = positions.to(self.q.device)
        k = self.k.repeat_interleave(groups, 1).float()
        logits = (self.q[:, :, places].float() @ k.mT) * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits + self._bias(places + keys - self.q.shape[2])
        if self.sinks is not None:
            sink = self.sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            return torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
        return logits.softmax(-1)

    def _bias(self, places: Tensor) -> Tensor:
        """0 where a query may look and -inf elsewhere, or the mask's own numbers: broadcast to [B, H, P, S]."""
        offset = self.k.shape[2] - self.q.shape[2]
        if self.mask is not None:
            rows = self.mask[:, :, places - offset]
            return rows.float() if rows.dtype != torch.bool else torch.where(rows, 0.0, -math.inf)
        key, window = torch.arange(self.k.shape[2], device=places.device), self.options.get("window")
        seen = (
            key <= places[:, None] if self.options.get("causal", True) else torch.ones_like(places[:, None] + key) > 0
        )
        seen = seen if window is None else seen & (key > places[:, None] - window)
        return torch.where(seen, 0.0, -math.inf)
