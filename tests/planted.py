"""A decoder whose weights are built so that two chosen heads retrieve and no other does: truth to measure scorers by.

Prompts are facts of a key and a value, in an order that depends on `carry`, then a token that asks for a key. In the first
layer one head looks at the previous token and carries its key (or value) to the fact's second token; a later head, or
two of one KV group, finds the asked key there by its random code, which takes a sharp softmax, and writes the value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hydrasurgery.evaluation.tasks import Pair

KEYS, VALUES, FACTS, CODE, WIDTH = 16, 8, 6, 6, 16  # WIDTH of a head
LENGTH = 2 * FACTS + 2  # a filler before, the question after
HEADS, SHARED, LAYERS = 4, 2, 3
SLOTS = {"place": LENGTH, "key": CODE, "ask": CODE, "value": VALUES, "held": VALUES, "out": VALUES}
START = {name: sum(list(SLOTS.values())[:i]) for i, name in enumerate(SLOTS)}
CHANNELS = sum(SLOTS.values())


class Planted(nn.Module):
    """`carrier` and `finders` are the planted (layer, head)s; every other head, and the MLPs, are small noise."""

    def __init__(self, seed: int, *, carry: str = "key", finders: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        draw = torch.Generator().manual_seed(seed)
        layer, head, first = (int(torch.randint(n, (1,), generator=draw)) for n in (LAYERS - 1, HEADS, HEADS))
        head -= head % 2 if finders == 2 else 0
        self.carrier, self.finders = (0, first), [(1 + layer, head + i) for i in range(finders)]
        self.codes = distinct_codes()
        table = torch.zeros(2 * KEYS + VALUES + 1, CHANNELS)  # keys, asked keys, values, filler
        table[:KEYS, slot("key")] = self.codes
        table[KEYS : 2 * KEYS, slot("ask")] = self.codes
        table[2 * KEYS : -1, slot("value")] = torch.eye(VALUES)
        self.embed = nn.Embedding.from_pretrained(table)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.unembed = nn.Linear(CHANNELS, len(table), bias=False)
        nn.init.zeros_(self.unembed.weight).data[2 * KEYS : -1, slot("out")] = torch.eye(VALUES)
        self._plant_carrier(carry)
        for at in self.finders:
            self._plant_finder(at, carry, 16.0 / finders)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids).clone()
        places = torch.arange(x.shape[1]) if position_ids is None else position_ids
        x[..., slot("place")] = torch.eye(LENGTH)[places]
        for layer in self.layers:
            x = layer(x)
        return self.unembed(x)

    def _plant_carrier(self, carry: str) -> None:
        q, k, v, o = self.layers[0].attend.of_head(self.carrier[1])
        for x in (q, k, v):
            x.zero_()
        before = torch.ones(LENGTH - 1).diag(1)  # column t is place t - 1, which place t asks for
        q[:LENGTH, slot("place")], k[:LENGTH, slot("place")] = 160.0 * before, torch.eye(LENGTH)
        v[: SLOTS[carry], slot(carry)] = torch.eye(SLOTS[carry])
        o.zero_()
        o[slot("held", SLOTS[carry]), : SLOTS[carry]] = torch.eye(SLOTS[carry])

    def _plant_finder(self, at: tuple[int, int], carry: str, gain: float) -> None:
        q, k, v, o = self.layers[at[0]].attend.of_head(at[1])
        for x in (q, k, v, o):
            x.zero_()
        where, what = (slot("held", CODE), slot("value")) if carry == "key" else (slot("key"), slot("held"))
        q[:CODE, slot("ask")], k[:CODE, where], v[:VALUES, what] = (
            240 * torch.eye(CODE),
            torch.eye(CODE),
            torch.eye(VALUES),
        )
        o[slot("out"), :VALUES] = gain * torch.eye(VALUES)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = Attend()
        self.up, self.down = nn.Linear(CHANNELS, 32), nn.Linear(32, CHANNELS)
        nn.init.normal_(self.down.weight, std=0.005)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.down(F.gelu(self.up(x)))


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(CHANNELS, HEADS * WIDTH, bias=False)
        self.k, self.v = (nn.Linear(CHANNELS, SHARED * WIDTH, bias=False) for _ in range(2))
        self.o = nn.Linear(HEADS * WIDTH, CHANNELS, bias=False)
        nn.init.normal_(self.o.weight, std=0.02)

    def of_head(self, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows of q, k and v, columns of o: views of the weights."""
        own, shared = (slice(i * WIDTH, (i + 1) * WIDTH) for i in (head, head * SHARED // HEADS))
        weights = [x.weight.data for x in (self.q, self.k, self.v, self.o)]
        return weights[0][own], weights[1][shared], weights[2][shared], weights[3][:, own]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


def distinct_codes() -> Tensor:
    """Unit vectors [KEYS, CODE], no two of which have a cosine above 0.75: a sharp softmax parts them, a sum does not."""
    codes = torch.zeros(0, CODE)
    while len(codes) < KEYS:
        one = F.normalize(torch.randn(1, CODE), dim=-1)
        codes = codes if (codes @ one.T > 0.75).any() else torch.cat([codes, one])
    return codes


def slot(name: str, width: int | None = None) -> slice:
    return slice(START[name], START[name] + (width or SLOTS[name]))


def planted_pairs(model: Planted, count: int = 6, *, carry: str = "key", seed: int = 0) -> list[Pair]:
    """Prompts with a value at random depth, the corrupt one with another value there."""
    draw = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        keys = torch.randperm(KEYS, generator=draw)[:FACTS]
        values = 2 * KEYS + torch.randint(VALUES, (FACTS,), generator=draw)
        asked, shift = (int(torch.randint(low, high, (1,), generator=draw)) for low, high in ((0, FACTS), (1, VALUES)))
        fact = [keys, values] if carry == "key" else [values, keys]
        filler = model.embed.num_embeddings - 1
        clean = torch.tensor([filler, *torch.stack(fact, 1).flatten().tolist(), KEYS + int(keys[asked])])
        place = torch.tensor([1 + 2 * asked + (carry == "key")])
        corrupt = clean.clone()
        corrupt[place] = 2 * KEYS + (clean[place] - 2 * KEYS + shift) % VALUES
        pairs.append(Pair(clean, corrupt, torch.tensor([LENGTH - 1]), clean[place], corrupt[place], place, "planted"))
    return pairs
