"""The selective scan on the CPU: numba kernels, forward and backward, and the threads that run them.

Every inner loop runs over the channels of one state, which are contiguous in memory, so that the compiler turns it
into vector instructions, the exponential included. A loop touches about five arrays at most: with more, the compiler
would need more overlap checks than it accepts and would leave the loop scalar.

The kernels release the GIL, and each call does one block of channels of one batch element in one direction;
`_run_blocks` spreads the blocks over threads. numba's own threading layers are not used: the default one aborts the
process when two threads of a server enter it at once.

Compiling takes 1-2 s for the forward and 5-8 s for the backward kernel, at the first use of each; numba keeps the
result beside this file, or in the user's cache folder, and later processes load it in 0.2 s.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

Array = NDArray[np.float32]

CHUNK = 16  # steps whose states the backward kernel holds at once; the forward kernel keeps one state per chunk
BLOCK = 192  # most channels in a block: a block's state, gradient and rates stay in the nearer caches
_LANES = 16  # a block's width is a multiple of it where the channels allow, so that vectors are full
_SMALL = 200_000  # state updates below which waking a second thread costs more than it saves

# Sums may be reordered and multiply-adds fused; NaN and infinity keep their meaning.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}

_f = np.float32
_LOG2E = _f(1.4426950408889634)
_LN2 = _f(0.6931471805599453)
# Taylor coefficients ln(2)**n / n! of 2**f for f in [-0.5, 0.5]; what is left out is below 1e-7.
_P1, _P2, _P3 = _f(0.6931471805599453), _f(0.2402265069591007), _f(0.05550410866482158)
_P4, _P5, _P6 = _f(0.009618129107628477), _f(0.0013333558146428443), _f(0.00015403530393381608)


def scan_forward(
    u: Array,
    dt: Array,
    a: Array,
    b: Array,
    c: Array,
    d: Array,
    bias: Array,
    order: NDArray[np.int64],
    *,
    keep_states: bool,
    threads: int,
) -> tuple[Array, Array]:
    """Run the scan; all arrays C-contiguous.

    Args:
        u: input (B, K, L, E), or (B, 1, L, E) for all directions.
        dt: step sizes before bias and softplus (B, K, L, E).
        a: rates (K, N, E).
        b: input weights (B, K, L, N).
        c: output weights (B, K, L, N).
        d: skip weights (K, E).
        bias: added to `dt` (K, E).
        order: the positions in the order in which each direction visits them (K, L).
        keep_states: keep what `scan_backward` needs.
        threads: at most so many.

    Returns:
        The result (B, K, L, E), by position, and the states (B, K, ceil(L / CHUNK), N, E) at the start of each chunk of
        steps, or an empty array.
    """
    batch, directions, length, channels = dt.shape
    size = a.shape[1]
    y = np.empty_like(dt)
    kept = (batch, directions, -(-length // CHUNK), size, channels) if keep_states else (0, 0, 0, 0, 0)
    states = np.empty(kept, np.float32)
    arrays = (u, dt, a * _LOG2E, b, c, d, bias, order, y, states)
    blocks = _blocks(channels, batch * directions, threads)
    threads = threads if dt.size * size > _SMALL else 1
    _run_blocks(_kernel(_forward_block, _FORWARD), arrays, batch, directions, blocks, threads)
    return y, states


def scan_backward(
    u: Array,
    dt: Array,
    a: Array,
    b: Array,
    c: Array,
    d: Array,
    bias: Array,
    order: NDArray[np.int64],
    states: Array,
    gy: Array,
    *,
    threads: int,
) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """Gradients of `scan_forward`; all arrays C-contiguous.

    Args:
        u: as in `scan_forward`, and so are dt, a, b, c, d, bias and order.
        dt: likewise.
        a: likewise.
        b: likewise.
        c: likewise.
        d: likewise.
        bias: likewise.
        order: likewise.
        states: the second result of `scan_forward`.
        gy: gradient of the result (B, K, L, E), or (B, 1, L, E) for all directions.
        threads: at most so many.

    Returns:
        Gradients of u, by direction (B, K, L, E), and of dt, a, b, c, d, bias in their own shapes.
    """
    batch, directions, length, channels = dt.shape
    size = a.shape[1]
    blocks = _blocks(channels, batch * directions, threads)
    gu, gdt = np.empty_like(dt), np.empty_like(dt)
    ga = np.empty((batch, directions, size, channels), np.float32)
    gb = np.empty((len(blocks), batch, directions, length, size), np.float32)
    gc = np.empty_like(gb)
    gd = np.empty((batch, directions, channels), np.float32)
    gbias = np.empty_like(gd)
    arrays = (u, dt, a * _LOG2E, b, c, d, bias, order, states, gy, gu, gdt, ga, gb, gc, gd, gbias)
    threads = threads if dt.size * size > _SMALL else 1
    _run_blocks(_kernel(_backward_block, _BACKWARD), arrays, batch, directions, blocks, threads)
    return gu, gdt, ga.sum(0), gb.sum(0), gc.sum(0), gd.sum(0), gbias.sum(0)


def _blocks(channels: int, tasks: int, threads: int) -> list[tuple[int, int]]:
    """Ranges of channels: at most BLOCK wide, and enough of them that every thread has work."""
    count = max(-(-channels // BLOCK), min(-(-threads // tasks), -(-channels // _LANES)))
    width = -(-channels // count)
    width = -(-width // _LANES) * _LANES
    return [(start, min(start + width, channels)) for start in range(0, channels, width)]


def _run_blocks(
    kernel: Callable[..., None],
    arrays: tuple[NDArray[Any], ...],
    batch: int,
    directions: int,
    blocks: list[tuple[int, int]],
    threads: int,
) -> None:
    """Call the kernel for every batch element, direction and block, in this thread and `threads - 1` others."""
    tasks = deque(
        (element, direction, start, stop, number)
        for element in range(batch)
        for direction in range(directions)
        for number, (start, stop) in enumerate(blocks)
    )

    def work() -> None:
        while True:
            try:
                task = tasks.popleft()
            except IndexError:
                return
            kernel(*arrays, *task)

    helping = [_pool().submit(work) for _ in range(min(threads, len(tasks)) - 1)]
    work()
    for future in helping:
        # One that has not begun, because other scans keep the pool busy, has nothing left to do.
        if not future.cancel():
            future.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="selective-scan")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has the pool, but none of its threads


@functools.cache
def _kernel(function: Callable[..., None], signature: str) -> Callable[..., None]:
    """Compile a kernel, or load it from numba's cache; where no cache folder is usable, go without."""
    options: dict[str, Any] = {"nogil": True, "fastmath": _FASTMATH, "error_model": "numpy"}
    began = time.perf_counter()
    kernel: Callable[..., None]
    try:
        kernel = numba.njit(signature, cache=True, **options)(function)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as err:
        # RuntimeError: neither the package's folder nor the user's cache folder is writable.
        log.info("selective scan: compiled code is not kept (%s)", err)
        kernel = numba.njit(signature, **options)(function)
    log.debug("selective scan: %s ready after %.1f s", function.__name__, time.perf_counter() - began)
    return kernel


@numba.njit(forceinline=True, fastmath=_FASTMATH, error_model="numpy")
def _exp2(x):  # type: ignore[no-untyped-def]
    """2**x for float32 x in [-126, 127]; saturates outside, NaN stays NaN."""
    x = min(max(x, _f(-126.0)), _f(127.0))
    whole = np.floor(x + _f(0.5))
    f = x - whole
    p = ((((((_P6 * f + _P5) * f + _P4) * f + _P3) * f + _P2) * f + _P1) * f) + _f(1.0)
    exponent = (np.int32(whole) + np.int32(127)) << np.int32(23)
    return p * np.int32(exponent).view(np.float32)


@numba.njit(forceinline=True, fastmath=_FASTMATH, error_model="numpy")
def _softplus(x, w):  # type: ignore[no-untyped-def]
    """log(1 + e**x), given w = e**-|x|: log1p(w) = 2 atanh(w / (2 + w)), and eight terms do for an argument <= 1/3."""
    s = w / (_f(2.0) + w)
    q = s * s
    p = (((_f(2 / 15) * q + _f(2 / 13)) * q + _f(2 / 11)) * q + _f(2 / 9)) * q + _f(2 / 7)
    p = ((p * q + _f(2 / 5)) * q + _f(2 / 3)) * q + _f(2.0)
    return max(x, _f(0.0)) + s * p


_FORWARD = (
    "void(float32[:,:,:,::1], float32[:,:,:,::1], float32[:,:,::1], float32[:,:,:,::1], float32[:,:,:,::1],"
    " float32[:,::1], float32[:,::1], int64[:,::1], float32[:,:,:,::1], float32[:,:,:,:,::1],"
    " int64, int64, int64, int64, int64)"
)


def _forward_block(  # type: ignore[no-untyped-def]
    u, dt, a, b, c, d, bias, order, y, states, element, direction, start, stop, _number
):
    """`scan_forward` for the channels [start, stop) of one batch element in one direction; `a` is in base 2."""
    length, size, width = dt.shape[2], a.shape[1], stop - start
    source = direction % u.shape[1]
    rates = a[direction, :, start:stop].copy()
    skip = d[direction, start:stop].copy()
    shift = bias[direction, start:stop].copy()
    h = np.zeros((size, width), np.float32)
    t = np.empty(width, np.float32)
    tu = np.empty(width, np.float32)
    total = np.empty(width, np.float32)
    for step in range(length):
        if states.size and step % CHUNK == 0:
            states[element, direction, step // CHUNK, :, start:stop] = h
        position = order[direction, step]
        u_row = u[element, source, position, start:stop]
        dt_row = dt[element, direction, position, start:stop]
        y_row = y[element, direction, position, start:stop]
        for e in range(width):
            x = dt_row[e] + shift[e]
            t[e] = _softplus(x, _exp2(-abs(x) * _LOG2E))
        for e in range(width):
            tu[e] = t[e] * u_row[e]
            total[e] = skip[e] * u_row[e]
        for n in range(size):
            b_n = b[element, direction, position, n]
            c_n = c[element, direction, position, n]
            for e in range(width):
                after = _exp2(t[e] * rates[n, e]) * h[n, e] + tu[e] * b_n
                h[n, e] = after
                total[e] += after * c_n
        for e in range(width):
            y_row[e] = total[e]


_BACKWARD = (
    "void(float32[:,:,:,::1], float32[:,:,:,::1], float32[:,:,::1], float32[:,:,:,::1], float32[:,:,:,::1],"
    " float32[:,::1], float32[:,::1], int64[:,::1], float32[:,:,:,:,::1], float32[:,:,:,::1],"
    " float32[:,:,:,::1], float32[:,:,:,::1], float32[:,:,:,::1], float32[:,:,:,:,::1], float32[:,:,:,:,::1],"
    " float32[:,:,::1], float32[:,:,::1],"
    " int64, int64, int64, int64, int64)"
)


def _backward_block(  # type: ignore[no-untyped-def]
    u, dt, a, b, c, d, bias, order, states, gy, gu, gdt, ga, gb, gc, gd, gbias, element, direction, start, stop, number
):
    """`scan_backward` for the channels [start, stop) of one batch element in one direction.

    Chunk by chunk from the end: the states are computed again from the kept one, then the gradient g of the state runs
    backwards. With v = g + gy c, the gradient of the state after a step: gb += v t u, gc += gy h, and v exp(t A) is the
    g of the step before.
    """
    length, size, width = dt.shape[2], a.shape[1], stop - start
    source, source_gy = direction % u.shape[1], direction % gy.shape[1]
    rates = a[direction, :, start:stop].copy()
    skip = d[direction, start:stop].copy()
    shift = bias[direction, start:stop].copy()
    h = np.empty((CHUNK + 1, size, width), np.float32)  # h[i]: the state before step i of the chunk
    decay = np.empty((CHUNK, size, width), np.float32)  # exp(t A), then the gradient of t A
    t = np.empty((CHUNK, width), np.float32)
    tu = np.empty((CHUNK, width), np.float32)
    slope = np.empty((CHUNK, width), np.float32)  # derivative of the softplus
    g = np.zeros((size, width), np.float32)
    g_rates = np.zeros((size, width), np.float32)
    g_skip = np.zeros(width, np.float32)
    g_shift = np.zeros(width, np.float32)
    via_rate = np.empty(width, np.float32)  # sum over the states of the gradient of t A, times the rate
    via_input = np.empty(width, np.float32)  # sum over the states of v b
    for chunk in range((length - 1) // CHUNK, -1, -1):
        first = chunk * CHUNK
        count = min(CHUNK, length - first)
        h[0] = states[element, direction, chunk, :, start:stop]
        for i in range(count):
            position = order[direction, first + i]
            u_row = u[element, source, position, start:stop]
            dt_row = dt[element, direction, position, start:stop]
            gy_row = gy[element, source_gy, position, start:stop]
            t_row, tu_row, slope_row = t[i], tu[i], slope[i]
            for e in range(width):
                x = dt_row[e] + shift[e]
                w = _exp2(-abs(x) * _LOG2E)
                t_row[e] = _softplus(x, w)
                slope_row[e] = (_f(1.0) if x >= _f(0.0) else w) / (_f(1.0) + w)
            for e in range(width):
                tu_row[e] = t_row[e] * u_row[e]
            for n in range(size):
                b_n = b[element, direction, position, n]
                rate, before, after, fade = rates[n], h[i, n], h[i + 1, n], decay[i, n]
                for e in range(width):
                    fade[e] = _exp2(t_row[e] * rate[e])
                total = _f(0.0)
                for e in range(width):
                    state = fade[e] * before[e] + tu_row[e] * b_n
                    after[e] = state
                    total += gy_row[e] * state
                gc[number, element, direction, position, n] = total
        for i in range(count - 1, -1, -1):
            position = order[direction, first + i]
            u_row = u[element, source, position, start:stop]
            gy_row = gy[element, source_gy, position, start:stop]
            gu_row = gu[element, direction, position, start:stop]
            gdt_row = gdt[element, direction, position, start:stop]
            t_row, tu_row, slope_row = t[i], tu[i], slope[i]
            for e in range(width):
                via_rate[e] = _f(0.0)
                via_input[e] = _f(0.0)
            for n in range(size):
                b_n = b[element, direction, position, n]
                c_n = c[element, direction, position, n]
                rate, before, fade, g_n = rates[n], h[i, n], decay[i, n], g[n]
                total = _f(0.0)
                for e in range(width):
                    v = g_n[e] + gy_row[e] * c_n
                    via_input[e] += v * b_n
                    total += v * tu_row[e]
                    g_n[e] = v * fade[e]
                gb[number, element, direction, position, n] = total
                for e in range(width):
                    w = g_n[e] * before[e]
                    fade[e] = w
                    via_rate[e] += w * rate[e]
            for e in range(width):
                gu_row[e] = t_row[e] * via_input[e] + gy_row[e] * skip[e]
                g_skip[e] += gy_row[e] * u_row[e]
            for e in range(width):
                x = (via_rate[e] * _LN2 + u_row[e] * via_input[e]) * slope_row[e]
                gdt_row[e] = x
                g_shift[e] += x
        for n in range(size):
            g_rate = g_rates[n]
            for i in range(count):
                fade, t_row = decay[i, n], t[i]
                for e in range(width):
                    g_rate[e] += fade[e] * t_row[e]
    ga[element, direction, :, start:stop] = g_rates
    gd[element, direction, start:stop] = g_skip
    gbias[element, direction, start:stop] = g_shift
