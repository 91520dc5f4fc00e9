"""How a call's tokens are cut into chunks and segments, and its tensors in the layout that the kernels read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hydrasurgery.kernels.cards import processors
from hydrasurgery.kernels.launching import cdiv

CHUNK = 64
SIZES = (64, 128, 256)  # heads of other sizes are filled up with zeros


class Cut(NamedTuple):
    """Into how many documents, chunks and segments a call's tokens are cut, and the tokens in a segment."""

    docs: int
    chunks: int
    segments: int
    size: int

    @classmethod
    def of(cls, q: Tensor, values: int, segment: int | None = None) -> Cut:
        """Of a batch in which every row is a document. Looks at q's shape, dtype and device only; `values`: as filled up."""
        batch, length = q.shape[:2]
        size = segment_tokens(q, values) if segment is None else segment
        return cls(batch, batch * cdiv(length, CHUNK), batch * cdiv(length, size), size)

    @classmethod
    def packed(cls, q: Tensor, values: int, docs: int, segment: int | None = None) -> Cut:
        """Of one row with `docs` documents: as many pieces as they can have at most."""
        length = q.shape[1]
        size = segment_tokens(q, values) if segment is None else segment
        return cls(docs, length // CHUNK + docs, length // size + docs, size)

    @property
    def split(self) -> bool:
        """May a document have several segments? (Known on the host; whether one has is known on the device.)"""
        return self.segments > self.docs


class Call(NamedTuple):
    """The inputs of a call, and how its tokens are cut; tables only for packed documents, else arithmetic finds the pieces."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor
    scale: float
    l2_norm: bool
    cut: Cut
    chunk_table: Tensor | None
    segment_table: Tensor | None
    first_segments: Tensor | None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        beta: Tensor,
        scale: float | None,
        cu_seqlens: Tensor | None,
        l2_norm: bool,
        segment: int | None,
    ) -> Call:
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        keys, values = filled_size(q), filled_size(v)
        q, k, v = rows(fill(q, keys)), rows(fill(k, keys)), rows(fill(v, values))
        if cu_seqlens is None:
            return cls(q, k, v, decay, beta, scale, l2_norm, Cut.of(q, values, segment), None, None, None)
        if q.shape[0] != 1:
            raise ValueError(f"cu_seqlens needs one packed sequence, B = 1; found B = {q.shape[0]}")
        _check_documents(cu_seqlens, q.shape[1])
        cut = Cut.packed(q, values, cu_seqlens.numel() - 1, segment)
        return cls(q, k, v, decay, beta, scale, l2_norm, cut, *_tables(cu_seqlens, cut))

    @property
    def length(self) -> int:
        return self.q.shape[1]

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        return self.q.shape[3]

    @property
    def values(self) -> int:
        return self.v.shape[3]

    @property
    def block(self) -> int:
        """Columns of S that a program holds. 64: S [128, 64] takes 64 of a thread's 255 registers, and two programs share a
        processor. fp32 products are three each and their tiles twice as large: half the columns."""
        return _value_block(self.values, self.q.dtype)

    def filled(self, state: Tensor | None) -> Tensor | None:
        if state is None:
            return None
        state = fill(state.float(), self.keys, self.values).contiguous()
        return state.clone() if state.data_ptr() % 16 else state

    def states(self, count: int) -> Tensor:
        return self.q.new_empty(count, self.heads, self.keys, self.values, dtype=torch.float32)


class Basis(NamedTuple):
    """What outputs and gradients both need. Of a chunk and head: T, the vectors G / ln 2, factors of rows of q and of k, and beta,
    and the log of |M|'s bound. Of a segment, where documents are split: the state after it, M, M^T for the way back, and whether
    M is anything but 0.

    All but T in fp32: loads of fewer than 4 bytes are not fetched ahead, and waiting for one costs as much as two products.
    """

    solve: Tensor
    vectors: Tensor
    reach: Tensor
    ends: Tensor | None = None
    move: Tensor | None = None
    turned: Tensor | None = None
    moves: Tensor | None = None

    @classmethod
    def empty(cls, like: Tensor, heads: int, keys: int, values: int, cut: Cut, *, turned: bool) -> Basis:
        """Unfilled, on like's device and T in like's dtype; `turned`: with M^T."""
        solve = like.new_empty(cut.chunks, heads, CHUNK, CHUNK)
        vectors = like.new_empty(4, cut.chunks, heads, CHUNK, dtype=torch.float32)
        reach = like.new_empty(cut.chunks, heads, dtype=torch.float32)
        if not cut.split:
            return cls(solve, vectors, reach)
        ends = like.new_empty(cut.segments, heads, keys, values, dtype=torch.float32)
        move = like.new_empty(cut.segments, heads, keys, keys, dtype=torch.float32)
        moves = like.new_empty(cut.segments, heads, dtype=torch.int32)
        return cls(solve, vectors, reach, ends, move, torch.empty_like(move) if turned else None, moves)

    @property
    def given(self) -> tuple[Tensor, ...]:
        return tuple(x for x in self if x is not None)

    @property
    def chunks(self) -> tuple:
        """As kernels take them."""
        return tiles(self.solve, CHUNK), *self.vectors.unbind(), self.reach


def filled_size(x: Tensor) -> int:
    """The size of heads to which x is filled up."""
    return next(size for size in SIZES if size >= x.shape[-1])


def fill(x: Tensor, *sizes: int) -> Tensor:
    """With zeros up to `sizes` in the last dimensions: channels that change nothing."""
    short = [size - have for size, have in zip(sizes, x.shape[-len(sizes) :], strict=True)]
    return torch.nn.functional.pad(x, [n for size in reversed(short) for n in (0, size)]) if any(short) else x


def cut_off(x: Tensor, *sizes: int) -> Tensor:
    """`fill` undone."""
    if x.shape[-len(sizes) :] == sizes:
        return x
    for dim, size in zip(range(-len(sizes), 0), sizes, strict=True):
        x = x.narrow(dim, 0, size)
    return x.contiguous()


def rows(x: Tensor) -> Tensor:
    """As bulk copies want it: rows of neighbours, everything at a multiple of 16 bytes."""
    places = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1]))
    fits = x.stride(-1) == 1 and all(x.stride()) and not any(place % 16 for place in places)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def tokens(x: Tensor, width: int) -> TensorDescriptor:
    """x [B, T, H, D], read in tiles of a head's [64, width]: one bulk copy each, which takes no registers."""
    x = x.transpose(1, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, CHUNK, width])


def tiles(x: Tensor, width: int) -> TensorDescriptor:
    """x [chunks, heads, rows, D], read in tiles of [rows, width] at ((chunk heads + head) rows, column)."""
    rows, channels = x.shape[-2:]
    return TensorDescriptor(x, [x.numel() // channels, channels], [channels, 1], [rows, width])


def _check_documents(cu_seqlens: Tensor, length: int) -> None:
    """Numbers are looked at where that is no wait: on a card wrong ones are not specified."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 or int64 of shape [documents + 1], found {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device.type == "cpu":
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
            raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, found {ends}")


def segment_tokens(q: Tensor, values: int) -> int:
    """The tokens in a segment, from q's shape, dtype and device."""
    batch, length, heads = q.shape[:3]
    programs = heads * (values // _value_block(values, q.dtype))
    return _segment_tokens(length, batch, programs, processors(q.device))


def _segment_tokens(length: int, batch: int, programs: int, processors: int) -> int:
    """As many segments as give each processor a program, none shorter than four chunks; or two, which wait for each other in
    part, where no segment is shorter than ten."""
    chunks, places = cdiv(length, CHUNK), processors // (programs * batch)
    pieces = max(1, min(places, chunks // 4), min(2 * processors // (programs * batch), chunks // 10))
    return CHUNK * cdiv(chunks, pieces)


def _value_block(values: int, dtype: torch.dtype) -> int:
    return min(values, 32 if dtype == torch.float32 else 64)


def _tables(cu_seqlens: Tensor, pieces: Cut) -> tuple[Tensor, Tensor, Tensor]:
    """The pieces of packed documents, made on the device: rows (document, start, stop, first chunk, is first, is last) for chunks
    and segments, unused rows with document -1; and each document's first segment."""
    starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    lengths = stops - starts
    chunk_ends = ((lengths + CHUNK - 1) // CHUNK).cumsum(0)
    segment_ends = ((lengths + pieces.size - 1) // pieces.size).clamp(min=1).cumsum(0)
    chunk_firsts = torch.nn.functional.pad(chunk_ends, (1, 0))
    segment_firsts = torch.nn.functional.pad(segment_ends, (1, 0))

    def cut(ends: Tensor, firsts: Tensor, count: int, length: int) -> Tensor:
        index = torch.arange(count, device=ends.device)
        doc = torch.searchsorted(ends, index, right=True)
        used = doc < len(ends)
        doc = doc.clamp(max=len(ends) - 1)
        offset = (index - firsts[doc]) * length
        start = starts[doc] + offset
        stop = torch.minimum(start + length, stops[doc])
        columns = (
            torch.where(used, doc, -1),
            start,
            stop,
            chunk_firsts[doc] + offset // CHUNK,
            index == firsts[doc],
            index + 1 == ends[doc],
        )
        return torch.stack([x.int() for x in columns], dim=1)

    return (
        cut(chunk_ends, chunk_firsts, pieces.chunks, CHUNK),
        cut(segment_ends, segment_firsts, pieces.segments, pieces.size),
        segment_firsts.int(),
    )
