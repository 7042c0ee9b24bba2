"""Rotary positions: pairs of a head's coordinates turned by position * frequency (Llama 2, section 2.2; Su 2021).

Queries and keys in one launch. A pair is (i, i + K/2) in the layout of Hugging Face folders and (2i, 2i + 1) in Meta's,
`interleaved`. Cosines and sines are a table of half a head's width, so that packed rows may restart their positions.
Inputs are read where they lie, views of one fused projection or attention's own layout; results are contiguous.
Arithmetic is in fp32 whatever the dtypes (in fp64 for fp64). The backward pass is the rotation back: the same kernel
with the sine negated, and nothing but table and positions is kept for it.

`rope_qkv` takes the fused projection whole and gives queries, keys and a copy of the values: the projection's memory is
then free, and the backward pass writes one gradient in the projection's layout, for the next matmul, where `rope` of
views leaves three to be joined.

Bytes for a token of n heads in and out, of K elements of e bytes: 2 e n K, each way; `rope` counts queries and keys
only. The table (8 bytes a pair and position) stays in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama2_kernels.registry import Case, jit, launch, on, op, record, tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


# --- launch constants ---------------------------------------------------------------------------------------------

TILE, WARPS = 2048, 4  # 16 elements a thread: two loads of 16 bytes in bf16, 8 coordinates and their partners
MOST_TOKENS, MOST_HEADS = 64, 8  # of a tile
MAX_ROWS = 65535  # of a grid's second axis


@dataclass(frozen=True)
class Settings:
    """The tile of a program: tokens x heads x 2 half coordinates, each a power of two."""

    tokens: int
    heads: int
    half: int
    warps: int


def settings_for(heads: int, kv_heads: int, width: int) -> Settings:
    """The launch constants of H query heads, G key heads and a head's width K: what production compiles too.

    More heads in a tile share what is read of the table; a tile that sticks out past the last head idles.
    """
    half = _power(width // 2)

    def cost(n: int) -> float:  # elements passed over, and half of the table's beside those of n heads
        return (-(-heads // n) + -(-kv_heads // n)) * n * (1 + 0.5 / n)

    sizes = [n for n in (8, 4, 2, 1) if n <= MOST_HEADS]
    best = min(sizes, key=cost)
    tokens = max(1, min(MOST_TOKENS, TILE // (2 * half * best)))
    return Settings(tokens, best, half, WARPS)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


# --- kernels ------------------------------------------------------------------------------------------------------


@jit
def _wide(x):
    """As the arithmetic is done: never in 16 bits, which is slow, inexact, and garbage in the interpreter."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@jit
def _angles(TABLE, position, head, row_stride, S, D: tl.constexpr, HALF: tl.constexpr):
    """Rows of a table, [tokens, heads, HALF]; NaN for a position outside of it, whose memory is not read.

    Every head of a tile reads them: the cache answers, and no thread waits for another as it would for a shared copy.
    """
    half = tl.arange(0, HALF)[None, None, :]
    mask = (position >= 0) & (position < S) & (head >= 0)
    if HALF * 2 != D:
        mask = mask & (half < D // 2)
    at = position * row_stride + half + tl.zeros_like(head)
    return _wide(tl.load(TABLE + at, mask=mask, other=float("nan"), eviction_policy="evict_last"))


@jit
def _rope(
    Q, K, V, OQ, OK, OV, COS, SIN, POS,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, cos_row, sin_row, p_row, p_token, S, T,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """BT tokens of a row x BH heads. V given: its G heads are copied. OK, OV None: all go into OQ, heads in order.

    POS None: positions are those in the row. What is turned is asked for before its positions, and these before the
    table that they lead to: most is on the way before anything is waited for.
    """
    QS: tl.constexpr = (H + BH - 1) // BH
    KS: tl.constexpr = (G + BH - 1) // BH
    GROUPS: tl.constexpr = QS + KS if V is None else QS + 2 * KS
    WIDTH: tl.constexpr = (H + G) * D if V is None else (H + 2 * G) * D
    Q_WIDTH: tl.constexpr = WIDTH if OK is None else H * D
    K_WIDTH: tl.constexpr = WIDTH if OK is None else G * D
    pid = tl.program_id(0)
    group = pid % GROUPS
    row = tl.cast(tl.program_id(1), tl.int64)
    t = tl.cast(pid // GROUPS, tl.int64) * BT + tl.arange(0, BT)[:, None, None]
    out = row * T + t
    head = group * BH + tl.arange(0, BH)[None, :, None]
    if group < QS:
        x = Q + row * q_row + t * q_token + tl.cast(head, tl.int64) * q_head
        y = OQ + out * Q_WIDTH + head * D
        there = (t < T) & (head < H)
    elif group < QS + KS or V is None:
        head -= QS * BH
        x = K + row * k_row + t * k_token + tl.cast(head, tl.int64) * k_head
        y = (OQ + H * D if OK is None else OK) + out * K_WIDTH + head * D
        there = (t < T) & (head < G)
    else:
        head -= (QS + KS) * BH
        x = V + row * v_row + t * v_token + tl.cast(head, tl.int64) * v_head
        y = (OQ + (H + G) * D if OV is None else OV) + out * K_WIDTH + head * D
        there = (t < T) & (head < G)

    whole = tl.arange(0, 2 * HALF)[None, None, :]
    half = tl.arange(0, HALF)[None, None, :]
    whole_mask = there
    half_mask = there
    if 2 * HALF != D:
        whole_mask = whole_mask & (whole < D)
        half_mask = half_mask & (half < D // 2)
    if INTERLEAVED:
        v = tl.load(x + whole, mask=whole_mask, other=0.0, eviction_policy="evict_first")
        a, b = tl.split(tl.reshape(v, (BT, BH, HALF, 2)))
    else:
        a = tl.load(x + half, mask=half_mask, other=0.0, eviction_policy="evict_first")
        b = tl.load(x + D // 2 + half, mask=half_mask, other=0.0, eviction_policy="evict_first")
    if POS is None:
        position = t
    else:
        position = tl.load(POS + row * p_row + t * p_token, mask=t < T, other=0, eviction_policy="evict_last")
        position = position.to(tl.int64)
    cos = _angles(COS, position, head, cos_row, S, D, HALF)
    sin = _angles(SIN, position, head, sin_row, S, D, HALF)
    if BACK:
        sin = -sin
    c = (_wide(a) * cos - _wide(b) * sin).to(OQ.dtype.element_ty)
    d = (_wide(b) * cos + _wide(a) * sin).to(OQ.dtype.element_ty)
    if V is not None:
        c = tl.where(group < QS + KS, c, a)
        d = tl.where(group < QS + KS, d, b)
    if INTERLEAVED:
        tl.store(y + whole, tl.reshape(tl.join(c, d), (BT, BH, 2 * HALF)), mask=whole_mask)
    else:
        tl.store(y + half, c, mask=half_mask)
        tl.store(y + D // 2 + half, d, mask=half_mask)


# --- operators ----------------------------------------------------------------------------------------------------


def _neighbours(x: Tensor) -> Tensor:
    """x with its last axis in memory without gaps: itself, or a copy."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _launch(
    heads: list[Tensor],
    outs: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    back: bool,
) -> None:
    """heads: queries [B, T, H, K], keys and perhaps values [B, T, G, K]; outs: one for each, or one for all."""
    B, T = heads[0].shape[:2]  # these may be symbolic, heads and their width are constants of the kernel
    H, G, K = int(heads[0].shape[2]), int(heads[1].shape[2]), int(heads[0].shape[3])
    if B == 0 or T == 0 or K == 0 or H + G == 0:
        return
    parts = [_neighbours(x) for x in heads]
    if B > MAX_ROWS:  # many short rows: as one long row
        if positions is None:
            positions = torch.arange(T, device=cos.device).repeat(B)
        positions, parts = positions.reshape(1, B * T), [x.reshape(1, B * T, x.shape[2], K) for x in parts]
        B, T = 1, B * T
    cos, sin = _neighbours(cos), _neighbours(sin)
    s = settings_for(H, G, K)
    groups = _ceil(H, s.heads) + _ceil(G, s.heads) * (len(parts) - 1)
    three = [*parts, None] if len(parts) == 2 else parts
    strides = [n for x in three for n in ((0, 0, 0) if x is None else x.stride()[:3])]
    with on(heads[0]):
        launch(_rope)[(_ceil(T, s.tokens) * groups, B)](
            *three, *outs, *[None] * (3 - len(outs)), cos, sin, positions,
            *strides, cos.stride(0), sin.stride(0), *((0, 0) if positions is None else positions.stride()),
            cos.shape[0], T,
            H=H, G=G, D=K, HALF=s.half, BT=s.tokens, BH=s.heads, INTERLEAVED=interleaved, BACK=back,
            num_warps=s.warps,
        )  # fmt: skip


def _ceil(n: int, step: int) -> int:
    return (n + step - 1) // step


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, back: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@op("rope", _fake)
def rope_forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, back: bool
) -> tuple[Tensor, Tensor]:
    """q and k turned, or turned back."""
    out = _like(q), _like(k)
    if q.dtype == k.dtype:
        _launch([q, k], list(out), cos, sin, positions, interleaved, back)
    else:  # a program chooses between two tensors: they have one type
        _launch([q, q[:, :, :0]], [out[0]], cos, sin, positions, interleaved, back)
        _launch([k, k[:, :, :0]], [out[1]], cos, sin, positions, interleaved, back)
    return out


def _fake_split(
    qkv: Tensor, kv_heads: int, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, back: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, heads, K = qkv.shape
    q, k, v = (qkv.new_empty((B, T, n, K)) for n in (heads - 2 * kv_heads, kv_heads, kv_heads))
    return q, k, v


@op("rope_split", _fake_split)
def rope_split(
    qkv: Tensor, kv_heads: int, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, back: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T, H, K] and k [B, T, G, K] turned (or turned back) and v copied, of qkv [B, T, H + 2G, K]."""
    heads = [qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads]
    q, k, v = (torch.empty((*qkv.shape[:2], n, qkv.shape[3]), dtype=qkv.dtype, device=qkv.device) for n in heads)
    _launch(list(qkv.split(heads, dim=2)), [q, k, v], cos, sin, positions, interleaved, back)
    return q, k, v


def _fake_join(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, back: bool
) -> Tensor:
    B, T, H, K = q.shape
    return q.new_empty((B, T, H + 2 * k.shape[2], K))


@op("rope_join", _fake_join)
def rope_join(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, back: bool
) -> Tensor:
    """q and k turned (or turned back) and v side by side: [B, T, H + 2G, K]. The reverse of `rope_split`."""
    B, T, H, K = q.shape
    qkv = torch.empty((B, T, H + 2 * k.shape[2], K), dtype=q.dtype, device=q.device)
    _launch([q, k, v], [qkv], cos, sin, positions, interleaved, back)
    return qkv


# Each backward pass is an operator that has one itself: derivatives of any order.


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *_, cos, sin, positions, ctx.interleaved, ctx.back = inputs
    ctx.kv_heads = inputs[1] if isinstance(inputs[1], int) else inputs[1].shape[2]
    ctx.save_for_backward(cos, sin, positions)


def _turned(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *rope_forward(dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.back), None, None, None, None, None


def _joined(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    d = rope_join(dq, dk, dv, *ctx.saved_tensors, ctx.interleaved, not ctx.back)
    return d, None, None, None, None, None, None


def _apart(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = rope_split(d, ctx.kv_heads, *ctx.saved_tensors, ctx.interleaved, not ctx.back)
    return dq, dk, dv, None, None, None, None, None


rope_forward.register_autograd(_turned, setup_context=_keep)
rope_split.register_autograd(_joined, setup_context=_keep)
rope_join.register_autograd(_apart, setup_context=_keep)


# --- functions ----------------------------------------------------------------------------------------------------


def _check(parts: dict[str, Tensor], cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    first = next(iter(parts.values()))
    for name, x in (*parts.items(), ("cos", cos), ("sin", sin)):
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} is {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device}, {next(iter(parts))} on {first.device}")
    for x in parts.values():
        if x.dim() != 4 or x.shape[:2] != first.shape[:2] or x.shape[3] != first.shape[3] or x.shape[3] % 2:
            shapes = ", ".join(f"{n} {tuple(p.shape)}" for n, p in parts.items())
            raise ValueError(f"expected [rows, positions, heads, an even width], got {shapes}")
    T, K = first.shape[1], first.shape[3]
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape[1] != K // 2 or table.shape[0] != cos.shape[0]:
            raise ValueError(f"expected {name} [positions, {K // 2}], got {tuple(table.shape)}")
        if table.requires_grad:
            raise ValueError(f"{name} wants a gradient: there is none for the table")
    if positions is None:
        if cos.shape[0] < T:
            raise ValueError(f"{T} positions, the table ends at {cos.shape[0]}")
    elif positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"positions are {positions.dtype}, expected torch.int64 or torch.int32")
    elif positions.shape != first.shape[:2]:
        raise ValueError(f"expected positions {tuple(first.shape[:2])}, got {tuple(positions.shape)}")
    elif positions.device != first.device:
        raise ValueError(f"positions are on {positions.device}, {next(iter(parts))} on {first.device}")


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, K] and k [B, T, G, K] turned by their positions, in fp32; the results have q's and k's dtypes.

    cos, sin [S, K/2] of every position below S; positions [B, T], by default 0..T-1 in each row. A position outside the
    table gives NaN. interleaved: a pair is (2i, 2i + 1) instead of (i, i + K/2). In bf16 a result lies within 0.52
    units of the last place of the exact value, where the two products do not cancel to below 2^-10 of the largest
    element. Any strides are read in place as long as a head's coordinates are neighbours, else copied. Differentiable
    in q and k to any order. Raises ValueError for shapes that do not fit and for tables that want a gradient, and
    TypeError for dtypes.
    """
    _check({"q": q, "k": k}, cos, sin, positions)
    return rope_forward(q, k, cos, sin, positions, interleaved, False)


def rope_qkv(
    qkv: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope` of a fused projection qkv [B, T, H + 2G, K], queries, then keys, then values, G = kv_heads.

    Gives queries and keys turned and a copy of the values: nothing keeps the projection's memory, and its gradient is
    one contiguous tensor, written once. Otherwise as `rope`.
    """
    _check({"qkv": qkv}, cos, sin, positions)
    if not 0 < 2 * kv_heads < qkv.shape[2]:
        raise ValueError(f"{qkv.shape[2]} heads are not queries and twice {kv_heads} heads of keys and values")
    return rope_split(qkv, kv_heads, cos, sin, positions, interleaved, False)


def reference_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """What `rope` computes, in torch's own operators."""
    if positions is None:
        cos, sin = cos[None, : q.shape[1], None], sin[None, : q.shape[1], None]
    else:
        cos, sin = cos[positions][:, :, None], sin[positions][:, :, None]

    def turn(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
        pair = a * cos - b * sin, b * cos + a * sin
        out = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
        return out.to(x.dtype)

    return turn(q), turn(k)


def reference_rope_qkv(
    qkv: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `rope_qkv` computes, in torch's own operators."""
    q, k, v = qkv.split([qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
    return *reference_rope(q, k, cos, sin, positions, interleaved), v


# --- static report ------------------------------------------------------------------------------------------------

MODELS = {"7b": (32, 32, 128), "13b": (40, 40, 128), "70b": (64, 8, 128)}


def static_cases(tokens: int = 8192) -> list[Case]:
    """One call of each operator at each model's heads, in bf16, rows of 4,096 packed tokens."""
    cases = []
    T = min(tokens, 4096)
    for model, (H, G, K) in MODELS.items():
        qkv = torch.empty(tokens // T, T, H + 2 * G, K, dtype=torch.bfloat16, device="meta")
        q, k, v = qkv.split([H, G, G], dim=2)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device="meta") for x in (q, k, v))
        cos = sin = torch.empty(4096, K // 2, dtype=torch.float32, device="meta")
        positions = torch.empty(qkv.shape[:2], dtype=torch.int64, device="meta")
        table = (cos, sin, positions)
        for layout in (False, True):
            name = ", interleaved" if layout else ""
            for title, made, heads in (
                ("rope forward", record(rope_forward, q, k, *table, layout, False), H + G),
                ("rope backward", record(rope_forward, dq, dk, *table, layout, True), H + G),
                ("rope_qkv forward", record(rope_split, qkv, G, *table, layout, False), H + 2 * G),
                ("rope_qkv backward", record(rope_join, dq, dk, dv, *table, layout, True), H + 2 * G),
            ):
                moved = 4 * heads * K + 8  # the position, too
                cases.append(Case(title + name, model, made, tokens, moved, 4 * heads * K, elements=heads * K))
    return cases
