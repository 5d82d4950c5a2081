"""The selective scan of Mamba, without a compiled CUDA package.

For each channel e of each group k, with a state h of N numbers that starts at 0::

    t_l = softplus(dt_l + bias)
    h_l = exp(t_l a) h_{l-1} + t_l u_l b_l
    y_l = <h_l, c_l> + d u_l

Paper: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv 2312.00752.

Four formulations of the same function; "auto" chooses:

- ``blocked``: two passes over sqrt(L) blocks side by side, plain PyTorch with few and large operations. For
  ``torch.export`` and ``torch.jit.trace`` (the loop would make a graph with a node for every step), and for any device
  but the CPU.
- ``mamba_ssm``: that package's CUDA kernel, where it is installed; taken before ``blocked`` on CUDA.
- ``numba``: compiled on the CPU, forward and backward, float32. See `selective_scan_numba`.
- ``loop``: step by step in plain PyTorch: the reference, what float64 and a second derivative need, and the fallback on
  a CPU without numba.

All compute in float32 (float64 stays float64), whatever the inputs' type or autocast say.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

log = logging.getLogger(__name__)

Backend = Literal["auto", "numba", "loop", "blocked", "mamba_ssm"]
BACKENDS: tuple[Backend, ...] = ("auto", "numba", "loop", "blocked", "mamba_ssm")


def selective_scan(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    bias: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Scan sequences in the layout of the published code: K groups of E channels, time last.

    Args:
        u: input (B, K * E, L).
        dt: step sizes before bias and softplus (B, K * E, L).
        a: rates, negative (K * E, N).
        b: input weights (B, K, N, L).
        c: output weights (B, K, N, L).
        d: skip weights (K * E).
        bias: added to `dt` (K * E).
        backend: which formulation; see the module.

    Returns:
        y (B, K * E, L), float32, or float64 where `u` is.

    Raises:
        ValueError: shapes that do not belong together, or an unknown backend.
        ImportError: the backend was asked for by name and its package is missing.
    """
    if u.ndim != 3 or b.ndim != 4:
        raise ValueError(f"u must be (B, K * E, L) and b (B, K, N, L), got {tuple(u.shape)} and {tuple(b.shape)}")
    groups = b.shape[1]
    if groups < 1 or u.shape[1] % groups:
        raise ValueError(f"channels of u must be a multiple of the groups of b, got {u.shape[1]} and {groups}")
    y = scan_directions(
        rearrange(u, "b (k e) l -> b k l e", k=groups),
        rearrange(dt, "b (k e) l -> b k l e", k=groups),
        rearrange(a, "(k e) n -> k e n", k=groups),
        rearrange(b, "b k n l -> b k l n"),
        rearrange(c, "b k n l -> b k l n"),
        rearrange(d, "(k e) -> k e", k=groups),
        rearrange(bias, "(k e) -> k e", k=groups),
        backend=backend,
    )
    return rearrange(y, "b k l e -> b (k e) l")


def scan_directions(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    bias: Tensor,
    order: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Scan K directions over the same positions, channels last.

    A direction visits the positions in its own order; inputs and result stay where they are, so that nothing has to be
    transposed, flipped or copied for it.

    Args:
        u: input (B, K, L, E), or (B, 1, L, E) where all directions read the same.
        dt: step sizes before bias and softplus (B, K, L, E).
        a: rates, negative (K, E, N).
        b: input weights (B, K, L, N).
        c: output weights (B, K, L, N).
        d: skip weights (K, E).
        bias: added to `dt` (K, E).
        order: for each direction, the positions 0..L-1 in the order of the visit (K, L), integers; None for 0..L-1.
        backend: which formulation; see the module.

    Returns:
        y (B, K, L, E) by position, float32, or float64 where `u` is.

    Raises:
        ValueError: shapes that do not belong together, or an unknown backend.
        ImportError: the backend was asked for by name and its package is missing.
    """
    _check_shapes(u, dt, a, b, c, d, bias, order)
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    inputs = tuple(x.to(dtype) for x in (u, dt, a, b, c, d, bias))
    chosen = _choose(backend, inputs[0])
    with _no_autocast(u.device.type):
        y: Tensor
        if chosen == "numba":
            y = _numba(*inputs, order)
            return y
        if order is not None:
            inputs = _in_order(inputs, order)
        if chosen == "mamba_ssm":
            y = _mamba_ssm(*inputs)
        elif chosen == "loop":
            y = _loop(*inputs)
        elif torch.is_grad_enabled() and not _is_traced():
            # The graph of the blocks would hold several arrays of B K L E N numbers for every layer of a network.
            y = checkpoint(_blocked, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            y = _blocked(*inputs)
        return y if order is None else torch.take_along_dim(y, order.argsort(1)[None, :, :, None], 2)


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device_type):  # the meta device, on which shapes are worked out
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _check_shapes(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor, order: Tensor | None
) -> None:
    if dt.ndim != 4 or a.ndim != 3:
        raise ValueError(f"dt must have four axes (B, K, L, E) and a three, got {tuple(dt.shape)} and {tuple(a.shape)}")
    batch, groups, length, channels = dt.shape
    size = a.shape[2]
    if 0 in dt.shape or size == 0:
        raise ValueError(f"batch, groups, length, channels and state must not be empty, got {(*dt.shape, size)}")
    expected = {
        "a": (a, (groups, channels, size)),
        "b": (b, (batch, groups, length, size)),
        "c": (c, (batch, groups, length, size)),
        "d": (d, (groups, channels)),
        "bias": (bias, (groups, channels)),
    }
    if u.ndim == 4 and u.shape[1] == 1:
        expected["u"] = (u, (batch, 1, length, channels))
    else:
        expected["u"] = (u, (batch, groups, length, channels))
    if order is not None:
        expected["order"] = (order, (groups, length))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} for dt {tuple(dt.shape)}, got {tuple(tensor.shape)}")


def _choose(backend: Backend, u: Tensor) -> Backend:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend != "auto":
        return backend
    if _is_traced():
        return "blocked"
    if u.device.type == "cpu":
        return "numba" if u.dtype == torch.float32 and _has_numba() else "loop"
    if u.device.type == "cuda" and u.dtype == torch.float32 and _has_mamba_ssm():
        return "mamba_ssm"
    return "blocked"


def _is_traced() -> bool:
    """Whether operations are being recorded for another runtime, which knows none of the compiled kernels."""
    exporting = getattr(torch.compiler, "is_exporting", None)  # torch >= 2.7
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or (exporting() if exporting else torch.compiler.is_compiling())


@functools.cache
def _has_numba() -> bool:
    try:
        import medseg.networks.layers.selective_scan_numba  # noqa: F401
    except ImportError as err:
        log.warning("selective scan: numba cannot be used (%s); the plain PyTorch loop is 10-20 times slower", err)
        return False
    return True


@functools.cache
def _has_mamba_ssm() -> bool:
    if importlib.util.find_spec("mamba_ssm") is None:
        return False
    try:
        import mamba_ssm.ops.selective_scan_interface  # noqa: F401
    except (ImportError, OSError) as err:  # built for another torch or CUDA
        log.warning("selective scan: mamba_ssm is installed but cannot be imported (%s)", err)
        return False
    return True


def _in_order(inputs: tuple[Tensor, ...], order: Tensor) -> tuple[Tensor, ...]:
    """Copies of u, dt, b and c whose positions stand in the order of the visit."""
    u, dt, a, b, c, d, bias = inputs
    index = order[None, :, :, None]
    u, dt, b, c = (torch.take_along_dim(x.expand(-1, order.shape[0], -1, -1), index, 2) for x in (u, dt, b, c))
    return u, dt, a, b, c, d, bias


def _loop(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor) -> Tensor:
    """The recurrence as it stands; shapes as in `scan_directions`."""
    t = F.softplus(dt + bias[:, None])
    steps = (x.movedim(2, 0).contiguous() for x in (t, t * u, b, c))
    h = t.new_zeros(*dt.shape[:2], dt.shape[3], a.shape[2])
    ys = []
    for t_l, tu_l, b_l, c_l in zip(*steps, strict=True):
        h = torch.exp(t_l[..., None] * a) * h + tu_l[..., None] * b_l[..., None, :]
        ys.append(torch.matmul(h, c_l[..., None]).squeeze(-1))
    return torch.stack(ys, 2) + d[:, None] * u


def _blocked(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor) -> Tensor:
    """The recurrence over blocks side by side; shapes as in `scan_directions`.

    A first pass takes every block from state 0 to its end; with the decay over each whole block that gives the state in
    which each block really starts; a second pass runs from there. For blocks of T steps that are 2 T + L / T operations
    in sequence, fewest for T = sqrt(L / 2). There is no division by a decay, which may be 0 in float32.
    """
    length = u.shape[2]
    steps = max(1, math.isqrt(length // 2))
    blocks = -(-length // steps)
    padding = blocks * steps - length

    def split(x: Tensor) -> tuple[Tensor, ...]:
        """(B, K, L, *) to `steps` tensors (B, K, blocks, *); the padding has t = 0, which changes no state."""
        parts: tuple[Tensor, ...] = rearrange(F.pad(x, (0, 0, 0, padding)), "b k (c s) x -> b k c s x", s=steps).unbind(
            3
        )
        return parts

    t = F.softplus(dt + bias[:, None])
    t_steps, tu_steps, b_steps, c_steps = split(t), split(t * u), split(b), split(c)
    a = a[:, None]

    def advance(h: Tensor, i: int) -> Tensor:
        return torch.exp(t_steps[i][..., None] * a) * h + tu_steps[i][..., None] * b_steps[i][..., None, :]

    h = t.new_zeros(*t.shape[:2], blocks, t.shape[3], a.shape[3])
    for i in range(steps):
        h = advance(h, i)
    decay = torch.exp(torch.stack(t_steps, -1).sum(-1)[..., None] * a)
    carried = torch.zeros_like(h[:, :, 0])
    starts = []
    for block in range(blocks):
        starts.append(carried)
        carried = decay[:, :, block] * carried + h[:, :, block]
    h = torch.stack(starts, 2)
    ys = []
    for i in range(steps):
        h = advance(h, i)
        ys.append(torch.matmul(h, c_steps[i][..., None]).squeeze(-1))
    return torch.stack(ys, 3).flatten(2, 3)[:, :, :length] + d[:, None] * u


def _mamba_ssm(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor) -> Tensor:
    """mamba-ssm's CUDA kernel; shapes as in `scan_directions`."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    groups = dt.shape[1]
    rows = (x.expand_as(dt).transpose(2, 3).flatten(1, 2).contiguous() for x in (u, dt))
    weights = (x.transpose(2, 3).contiguous() for x in (b, c))
    y = selective_scan_fn(*rows, a.flatten(0, 1), *weights, d.flatten(), delta_bias=bias.flatten(), delta_softplus=True)
    out: Tensor = rearrange(y, "b (k e) l -> b k l e", k=groups)
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _numba(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor, order: Tensor | None
) -> Tensor:
    """The compiled CPU kernels; shapes as in `scan_directions`."""
    if u.device.type != "cpu" or u.dtype != torch.float32:
        raise ValueError(f"backend 'numba' is for float32 on the CPU, got {u.dtype} on {u.device}")
    groups, length = dt.shape[1:3]
    if order is None:
        order = torch.arange(length).expand(groups, length)
    inputs = (u, dt, a, b, c, d, bias)
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y: Tensor = _NumbaScan.apply(*inputs, order, differentiated)  # type: ignore[no-untyped-call]
    return y


class _NumbaScan(torch.autograd.Function):
    """`scan_forward` and `scan_backward` of `selective_scan_numba` as one differentiable function."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor,
        bias: Tensor,
        order: Tensor,
        differentiated: bool,  # noqa: FBT001 - autograd functions take positional arguments only
    ) -> Tensor:
        from medseg.networks.layers import selective_scan_numba as kernels

        inputs = [x.contiguous() for x in (u, dt, a.transpose(1, 2), b, c, d, bias, order.to(torch.int64))]
        y, states = kernels.scan_forward(
            *(x.numpy() for x in inputs), keep_states=differentiated, threads=torch.get_num_threads()
        )
        if differentiated:
            ctx.save_for_backward(*inputs, torch.from_numpy(states))
        return torch.from_numpy(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        from medseg.networks.layers import selective_scan_numba as kernels

        if torch.is_grad_enabled():
            raise RuntimeError(
                "selective_scan: the compiled scan has no second derivative; use backend='loop' with create_graph=True"
            )
        (gy,) = grads
        if gy.stride(1) == 0:  # the directions were summed, and share one gradient
            gy = gy[:, :1]
        *inputs, states = ctx.saved_tensors
        found = kernels.scan_backward(
            *(x.numpy() for x in (*inputs, states, gy.contiguous())), threads=torch.get_num_threads()
        )
        gu, gdt, ga, gb, gc, gd, gbias = (torch.from_numpy(x) for x in found)
        if inputs[0].shape[1] == 1:
            gu = gu.sum(1, keepdim=True)
        return gu, gdt, ga.transpose(1, 2), gb, gc, gd, gbias, None, None
