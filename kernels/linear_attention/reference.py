"""Linear attention in plain PyTorch, in chunks: matrix products inside a chunk, one small recurrence from chunk to chunk.

One chunk of C tokens (64, or 32 for narrow heads) starts from the state S [K, V]. With G_i the log decay summed from the chunk's
first token to token i (a number a head, or one a key channel; 0 for the rules without decay), "*" elementwise and rows as tokens:

    A_ij = q_i . (k_j e^{G_i - G_j}) for j <= i          (`pair`; q holds the scale)
    P_ij = k_i . (k_j e^{G_i - G_j}) for j < i
    U    = v                                              linear, gated
    U    = (I + diag(beta) P)^-1 diag(beta) (v - (k e^G) S) = U0 - W S     delta, gated_delta
    o    = (q e^G) S + A U
    S'   = e^{G_C} * S + (k e^{G_C - G})^T U = M S + R

so that M and R of all chunks are found at once and only S' = M S + R is sequential. No exponent is ever positive: decay of
any strength, -inf included, gives zeros and not NaN.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

LONGEST_CHUNK = 64
SEGMENT = 2048  # Tokens worked on at once. States and products of more chunks than these never exist together.
# exp(-1e4) is 0 in every dtype; sums of a chunk of such decays are still exact to 1e-9 in fp64.
STRONGEST_DECAY = -1.0e4

Rule = Literal["linear", "gated", "delta", "gated_delta"]
RULES = get_args(Rule)
DECAY_RULES = ("gated", "gated_delta")
DELTA_RULES = ("delta", "gated_delta")


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    *,
    rule: str,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """(o [B, T, H, V], final state [B, H, K, V]); arguments and dtypes as in `hydrasurgery.ops.linear_attention`."""
    decay, beta = _used(rule, decay, beta)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.shape[1] == 1:
        return _step(q, k, v, decay, beta, state, scale)
    batch, length, heads, _ = q.shape
    current = _first_state(q, k, v, state)
    out = torch.empty(v.shape, dtype=output_dtype(rule, v), device=v.device)
    if not batch * length * heads:
        length = 0  # of no sequence or no head: nothing to walk through either
    for start in range(0, length, SEGMENT):
        span = slice(start, start + SEGMENT)
        part = _load(q, k, v, decay, beta, span, scale, current.dtype)
        solved = _solve(part)
        states = _scan(solved, current)
        updates = solved.local if solved.erase is None else solved.local - solved.erase @ states[:-1]
        o = (part.q * part.decay.rise) @ states[:-1] + part.decay.pair(part.q, part.k) @ updates
        out[:, span] = _unload(o, batch, out[:, span].shape[1])
        current = states[-1]
    return out, current.view(batch, heads, *current.shape[1:]).clone()  # a view would keep the states of every chunk


def backward(
    grad: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    *,
    rule: str,
    scale: float | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, decay, beta and state, each in its input's dtype (None for an absent one), from those of o and
    of the final state.

    Segments are walked backwards; each is computed again from its first state, which a forward walk has kept.
    """
    decay_used, beta_used = _used(rule, decay, beta)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, length, heads, _ = q.shape
    spans = [slice(start, start + SEGMENT) for start in range(0, length if batch * heads else 0, SEGMENT)]
    starts = [_first_state(q, k, v, state)]
    dtype = starts[0].dtype
    for span in spans[:-1]:
        solved = _solve(_load(q, k, v, decay_used, beta_used, span, scale, dtype))
        starts.append(_scan(solved, starts[-1])[-1].clone())  # A view would keep the states of every chunk.
    inputs = (q, k, v, decay, beta)
    grads = [None if x is None else torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    dstate = torch.zeros_like(starts[0]) if grad_state is None else grad_state.to(dtype).reshape(starts[0].shape)
    for span, start in zip(reversed(spans), reversed(starts[: len(spans)]), strict=True):
        part = _load(q, k, v, decay_used, beta_used, span, scale, dtype)
        do = _chunked(grad[:, span], part.q.shape[2], dtype)
        *parts, dstate = _segment_backward(part, do, start, dstate)
        for whole, found in zip(grads, parts, strict=True):
            if whole is not None and found is not None:
                whole[:, span] = _unload(found, batch, whole[:, span].shape[1]).reshape(whole[:, span].shape)
    dfirst = None if state is None else dstate.view(state.shape).to(state.dtype, copy=not spans)
    return *grads, dfirst


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    *,
    rule: str = "gated_delta",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, a token at a time: slow, differentiable, the yardstick of every other kernel of this op."""
    decay, beta = _used(rule, decay, beta)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, _, heads, channels = q.shape
    state = _first_state(q, k, v, state).view(batch, heads, channels, -1)
    outputs = []
    for t in range(q.shape[1]):
        now = slice(t, t + 1)
        gate, write = (None if x is None else x[:, now] for x in (decay, beta))
        o, state = _step(q[:, now], k[:, now], v[:, now], gate, write, state, scale)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


def _step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One token: decay the state, add what the token writes, read."""
    dtype = _wide(q, k, v)
    query, key, write = (x[:, 0].to(dtype) for x in (q, k, v))
    state = query.new_zeros(*key.shape, v.shape[-1]) if state is None else state.to(dtype)
    if decay is not None:
        gate = decay[:, 0].to(dtype).exp()
        state = state * (gate[..., None, None] if gate.dim() == 2 else gate[..., None])
    if beta is not None:
        held = (key[..., None, :] @ state)[..., 0, :]
        write = beta[:, 0, :, None].to(dtype) * (write - held)
    state = state + key[..., None] * write[..., None, :]
    o = (query[..., None, :] * scale) @ state
    return o.transpose(1, 2).to(output_dtype("linear" if beta is None else "delta", v)), state


class _HeadDecay:
    """e^{G_i - G_j} and its kin for a decay that is one number a head and token; `total` [N, BH, C, 1] is G."""

    def __init__(self, total: Tensor, dtype: torch.dtype) -> None:
        self.rise = total.exp().to(dtype)
        self.rest = (total[:, :, -1:] - total).exp_().to(dtype)
        self.whole = self.rise[:, :, -1, :, None]
        # The upper triangle would be exp of a positive number: it is cut to 0 first and dropped after.
        self.between = (total - total.mT).to(dtype).clamp_(max=0).exp_().tril_()

    def pair(self, left: Tensor, right: Tensor) -> Tensor:
        """[.., C, C]: sum over channels of left_i right_j e^{G_i - G_j}, 0 above the diagonal."""
        return (left @ right.mT).mul_(self.between)

    def pair_backward(self, grad: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of left and right; that of G is left * d left - right * d right."""
        grad = grad * self.between
        return grad @ right, grad.mT @ left


class _ChannelDecay:
    """The same for a decay a key channel: `total` is [N, BH, C, K].

    e^{G_i - G_j} is no longer one factor a pair. A square of pairs, later tokens i against earlier ones j, splits at its corner m
    into e^{G_i - G_m} and e^{G_m - G_j}, both at most 1, and is a matrix product; halving the chunk again and again leaves only the
    diagonal, where the factor is 1.
    """

    def __init__(self, total: Tensor, dtype: torch.dtype) -> None:
        self.rise = total.exp().to(dtype)
        self.rest = (total[:, :, -1:] - total).exp_().to(dtype)
        self.whole = self.rise[:, :, -1, :, None]
        self.levels = []
        half = total.shape[2] // 2
        while half:
            early, late = self._halves(total, half)
            middle = early[..., -1:, :]
            self.levels.append((half, (middle - early).exp_().to(dtype), (late - middle).exp_().to(dtype)))
            half //= 2

    @staticmethod
    def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
        parts = x.unflatten(2, (-1, 2, half))
        return parts[:, :, :, 0], parts[:, :, :, 1]

    @staticmethod
    def _squares(x: Tensor, half: int) -> Tensor:
        """The [.., blocks, late, early] squares of [.., C, C] that one level covers, as a view."""
        blocks = x.unflatten(-1, (-1, 2, half)).unflatten(2, (-1, 2, half))
        return blocks[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4).movedim(-1, 2)

    def pair(self, left: Tensor, right: Tensor) -> Tensor:
        """As `_HeadDecay.pair`."""
        out = torch.diag_embed((left * right).sum(-1))
        for half, fall, rise in self.levels:
            early, late = self._halves(right, half)[0] * fall, self._halves(left, half)[1] * rise
            self._squares(out, half).copy_(late @ early.mT)
        return out

    def pair_backward(self, grad: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """As `_HeadDecay.pair_backward`."""
        diagonal = grad.diagonal(dim1=-2, dim2=-1)[..., None]
        dleft, dright = diagonal * right, diagonal * left
        for half, fall, rise in self.levels:
            square = self._squares(grad, half)
            early, late = self._halves(right, half)[0] * fall, self._halves(left, half)[1] * rise
            self._halves(dleft, half)[1].add_((square @ early).mul_(rise))
            self._halves(dright, half)[0].add_((square.mT @ late).mul_(fall))
        return dleft, dright


class _Part(NamedTuple):
    """A segment in chunks: [N chunks, B*H, C tokens, ...], padded with tokens that change nothing; q holds the scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    decay: _HeadDecay | _ChannelDecay
    scale: float


class _Solved(NamedTuple):
    """What a chunk does to its first state S: U = local - erase S, S' = move S + gain."""

    local: Tensor
    erase: Tensor | None
    move: Tensor
    gain: Tensor
    pairs: Tensor | None


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def output_dtype(rule: str, v: Tensor) -> torch.dtype:
    """v's, but fp32 for sums of fp16 values that no delta rule bounds: they grow with the length, beyond what fp16 can say."""
    return torch.float32 if v.dtype == torch.float16 and rule not in DELTA_RULES else v.dtype


def _used(rule: str, decay: Tensor | None, beta: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return decay if rule in DECAY_RULES else None, beta if rule in DELTA_RULES else None


def _first_state(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    batch, _, heads, channels = q.shape
    shape = (batch * heads, channels, v.shape[-1])
    dtype = _wide(q, k, v)
    return q.new_zeros(shape, dtype=dtype) if state is None else state.to(dtype).reshape(shape)


def _chunked(x: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, D] -> [N, B*H, chunk, D], padded with zeros."""
    batch, length, heads, dim = x.shape
    whole, rest = divmod(length, chunk)
    out = torch.empty(whole + (rest > 0), batch, heads, chunk, dim, dtype=dtype, device=x.device)
    if whole:
        out[:whole] = x[:, : whole * chunk].unflatten(1, (whole, chunk)).permute(1, 0, 3, 2, 4)
    if rest:
        out[whole, :, :, :rest] = x[:, whole * chunk :].transpose(1, 2)
        out[whole, :, :, rest:] = 0
    return out.flatten(1, 2)


def _unload(x: Tensor, batch: int, length: int) -> Tensor:
    """[N, B*H, C, D] -> [B, T, H, D]."""
    return x.unflatten(1, (batch, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]


def _load(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    span: slice,
    scale: float,
    dtype: torch.dtype,
) -> _Part:
    length = q[:, span].shape[1]
    chunk = min(_chunk_length(q.shape[-1]), 1 << (length - 1).bit_length())
    if decay is None:
        # One table of ones for all: the products broadcast.
        steps = q.new_zeros(1, 1, chunk, 1, dtype=torch.float64)
    else:
        steps = _chunked(_columns(decay[:, span]), chunk, torch.float64).clamp_(min=STRONGEST_DECAY)
    kind = _HeadDecay if decay is None or decay.dim() == 3 else _ChannelDecay
    # The sums are fp64: after one strong decay, differences of fp32 sums have lost the weak ones.
    table = kind(steps.cumsum(2), dtype)
    writes = None if beta is None else _chunked(_columns(beta[:, span]), chunk, dtype)
    queries = _chunked(q[:, span], chunk, dtype).mul_(scale)
    return _Part(queries, _chunked(k[:, span], chunk, dtype), _chunked(v[:, span], chunk, dtype), writes, table, scale)


def _chunk_length(channels: int) -> int:
    """A chunk's scores are C x C, its transition K x K: for narrow heads a shorter chunk is less work."""
    return LONGEST_CHUNK if channels > 32 else LONGEST_CHUNK // 2


def _columns(gate: Tensor) -> Tensor:
    return gate[..., None] if gate.dim() == 3 else gate


def _solve(part: _Part) -> _Solved:
    last = part.k * part.decay.rest
    if part.beta is None:
        return _Solved(part.v, None, part.decay.whole, last.mT @ part.v, None)
    pairs = part.decay.pair(part.k, part.k)
    wanted = torch.cat([part.v, part.k * part.decay.rise], dim=-1).mul_(part.beta)
    # Only what lies below the diagonal is read, the diagonal itself taken as 1.
    found = torch.linalg.solve_triangular(part.beta * pairs, wanted, upper=False, unitriangular=True)
    local, erase = found.split([part.v.shape[-1], part.k.shape[-1]], dim=-1)
    both = last.mT @ found
    gain, move = both.split([part.v.shape[-1], part.k.shape[-1]], dim=-1)
    move = torch.diag_embed(part.decay.whole[..., 0].expand(*part.k.shape[:2], part.k.shape[-1])) - move
    return _Solved(local, erase, move, gain, pairs)


def _scan(solved: _Solved, first: Tensor) -> Tensor:
    """The state before each chunk, and after the last: [N + 1, B*H, K, V]."""
    states = first.new_empty(solved.gain.shape[0] + 1, *first.shape)
    states[0] = first
    move = solved.move.expand(len(solved.gain), *[-1] * 3)
    for n, gain in enumerate(solved.gain):
        _advance(move[n], states[n], gain, states[n + 1])
    return states


def _advance(move: Tensor, state: Tensor, gain: Tensor, out: Tensor) -> None:
    """out = move state + gain; move is a matrix [.., K, K], or a column [.., K or 1, 1] of factors."""
    if move.shape[-1] > 1:
        torch.baddbmm(gain, move, state, out=out)
    else:
        torch.addcmul(gain, move, state, out=out)


def _segment_backward(
    part: _Part, do: Tensor, first: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """(dq, dk, dv, d decay, d beta, d first state) of a segment. The adjoint of S' = M S + R is dS = M^T dS' + B^T do.

    A factor e^{G_i} beside x_i gives x_i * dx_i to the gradient of G_i, a factor e^{-G_i} takes it away: so dG needs no products of
    its own, only the parts of dk kept apart (`dk_up` with e^{G_i}, `dk_down` with e^{-G_i}).
    """
    decay, solved = part.decay, _solve(part)
    states = _scan(solved, first)
    before, scores = states[:-1], decay.pair(part.q, part.k)
    updates, read = solved.local, part.q * decay.rise
    if solved.erase is not None:
        updates = updates - solved.erase @ before
        read = read - scores @ solved.erase
    after = _scan_back(solved.move, read.mT @ do, dfinal)
    dstate, after = after[0], after[1:]
    dq, dk_down = decay.pair_backward(do @ updates.mT, part.q, part.k)
    dq += (do @ before.mT).mul_(decay.rise)
    dcarried = (updates @ after.mT).mul_(decay.rest)
    dk_down += dcarried
    dv = scores.mT @ do + (part.k * decay.rest) @ after
    dk_up = dbeta = None
    if part.beta is not None and solved.pairs is not None:
        dv, dk_up, dk_pairs, dbeta = _delta_backward(part, part.beta, solved.pairs, updates, before, dv)
        dk_down += dk_pairs
    dtotal = part.q * dq - part.k * dk_down
    if dk_up is not None:
        dtotal += part.k * dk_up
    dwhole = (part.k * dcarried).sum(2, keepdim=True) + (decay.whole * (before * after).sum(-1, keepdim=True)).mT
    dk = dk_down if dk_up is None else dk_down + dk_up
    return dq.mul_(part.scale), dk, dv, _steps_backward(dtotal, dwhole, decay), dbeta, dstate


def _scan_back(move: Tensor, gain: Tensor, last: Tensor) -> Tensor:
    """The gradient of the state before each chunk, and of the last: [N + 1, B*H, K, V]."""
    grads = last.new_empty(gain.shape[0] + 1, *last.shape)
    grads[-1] = last
    move = (move.mT if move.shape[-1] > 1 else move).expand(gain.shape[0], *[-1] * 3)
    for n in reversed(range(gain.shape[0])):
        _advance(move[n], grads[n + 1], gain[n], grads[n])
    return grads


def _delta_backward(
    part: _Part, beta: Tensor, pairs: Tensor, updates: Tensor, before: Tensor, du: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Back through U = (I + L)^-1 diag(beta) E, L = diag(beta) P, E = v - (k e^G) S: (dv, dk_up, dk_down, d beta).

    With dZ = (I + L)^-T dU: dE = beta dZ and dL = -dZ U^T below the diagonal.
    """
    lower = beta * pairs
    dz = torch.linalg.solve_triangular(lower.mT, du, upper=True, unitriangular=True)
    error = part.v - (part.k * part.decay.rise) @ before
    dlower = (dz @ updates.mT).neg_().tril_(-1)
    dbeta = (dz * error).sum(-1, keepdim=True) + (dlower * pairs).sum(-1, keepdim=True)
    dv = dz.mul_(beta)
    dk_up, dk_down = part.decay.pair_backward(dlower.mul_(beta), part.k, part.k)
    dk_up -= (dv @ before.mT).mul_(part.decay.rise)
    return dv, dk_up, dk_down, dbeta


def _steps_backward(dtotal: Tensor, dwhole: Tensor, decay: _HeadDecay | _ChannelDecay) -> Tensor:
    """From the gradients of the sums G_i, and of G_C, to those of the steps g_t = G_t - G_{t-1}."""
    if isinstance(decay, _HeadDecay):
        dtotal, dwhole = dtotal.sum(-1, keepdim=True), dwhole.sum(-1, keepdim=True)
    dtotal[:, :, -1:] += dwhole
    return dtotal.flip(2).cumsum_(2).flip(2)
