"""The hybrid layer's options: what full and linear heads do besides attending, chosen once for all layers of a plan."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from hydrasurgery.dialect.names import Rule
from hydrasurgery.errors import PlanError
from hydrasurgery.json_files import shown
from hydrasurgery.records import check_record

TAPS = 4  # of the short convolution


@dataclass(frozen=True)
class LayerOptions:
    """How a hybrid layer is built. The defaults start a hybrid as near to its teacher as it gets.

    Full head h, over its own q, k, v:       o_h = softmax(c q k^T) v;        linear head: o_h = the recurrence of `rule`.
    Heads in their slots (paper eq. 13-14):  O_h = gate_h * gamma_h * RMSNorm(o_h).

    Attributes:
        rule: the recurrence: linear, gated, delta or gated_delta (`hydrasurgery.ops.linear_attention`).
        full_norm: full heads pass the fusion unchanged, O_h = gate_h * o_h ("exact"), or as above ("paper").
        full_rope: full heads rotate q and k as the teacher's do; without, they attend by content only (NoPE).
        log_length: full heads scale q by c = log(p + a) / log(a), a = 500, p tokens after its document's first; else c = 1.
        gate: linear heads have an output gate, 2 sigmoid(W_g x) a head, W_g = 0 at the start: 1.
        full_gate: full heads have that gate too.
        conv: the short convolution of linear q, k and v: "residual-unrotated", x + conv(x) before the rotary embedding, the
            identity at the start; "native", as in Gated DeltaNet, SiLU(conv(x)) before it, SiLU(x) at the start; "none"; or
            "residual", x + conv(x) after it, as in earlier versions: once trained, such a head sees places and not only distances.
        linear_rope: linear heads rotate q and k as the teacher's do.
        untie: linear heads have q, k and v projections of their own (query decomposition), at the start the teacher's.

    Raises:
        PlanError: a value that is none of the above, or a gate of full heads only.

    Example:
        >>> LayerOptions(conv="none", untie=True) == LayerOptions.of("conv=none,untie=true")
        True
        >>> str(LayerOptions.of("hydrahead,conv=residual"))
        'hydrahead,conv=residual'
    """

    rule: Rule = "gated_delta"
    full_norm: Literal["exact", "paper"] = "exact"
    full_rope: bool = True
    log_length: bool = False
    gate: bool = True
    full_gate: bool = False
    conv: Literal["residual-unrotated", "residual", "native", "none"] = "residual-unrotated"
    linear_rope: bool = True
    untie: bool = False

    def __post_init__(self) -> None:
        check_record(self, PlanError, "layer options")
        if self.full_gate and not self.gate:
            raise PlanError("layer option full_gate=true needs gate=true: one gate projection serves all heads.")

    @property
    def moves_rotary(self) -> bool:
        """Whether some head's q and k are needed before the rotary embedding."""
        return not (self.full_rope and self.linear_rope) or self.conv in ("residual-unrotated", "native")

    @classmethod
    def of(cls, value: LayerOptions | str) -> LayerOptions:
        """The options that `value` is, or says: a preset's name and/or `option=value` entries, as in `hydrahead,conv=none`."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise PlanError(f"layer={shown(value)} is neither LayerOptions nor text such as 'hydrahead,conv=residual'.")
        name, known = "default", {field.name for field in dataclasses.fields(cls)}
        changes: dict[str, Any] = {}
        for entry in filter(None, (part.strip() for part in value.split(","))):
            key, given, text = (part.strip() for part in entry.partition("="))
            if given and key not in known:
                raise PlanError(
                    f"layer={shown(value)}: no option is called {shown(key)}; there are {', '.join(sorted(known))}."
                )
            if key in changes:
                raise PlanError(f"layer={shown(value)}: {key} is given twice.")
            if given:
                changes[key] = {"true": True, "false": False}.get(text.lower(), text)
            elif key in PRESETS and not changes:
                name = key
            else:
                raise PlanError(
                    f"layer={shown(value)}: {shown(key)} is neither option=value nor a preset ({', '.join(PRESETS)}) "
                    "at the beginning."
                )
        return dataclasses.replace(PRESETS[name], **changes)

    def __str__(self) -> str:
        """The shortest text that `of` reads back."""
        return min((self._relative_to(name) for name in PRESETS), key=lambda text: text.count(","))

    def _relative_to(self, name: str) -> str:
        own, base = dataclasses.asdict(self), dataclasses.asdict(PRESETS[name])
        changed = [f"{key}={str(value).lower()}" for key, value in own.items() if value != base[key]]
        return ",".join([name, *changed])


PRESETS = {
    "default": LayerOptions(),
    # HydraHead's layer (arXiv 2606.20097, section 3), the coefficient and its a from HALO.
    "hydrahead": LayerOptions(
        full_norm="paper", full_rope=False, log_length=True, full_gate=True, conv="native", untie=True
    ),
}
