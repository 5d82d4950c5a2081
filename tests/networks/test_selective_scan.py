"""The selective scan's formulations are one function, in both directions of the derivative."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from medseg.networks.layers import selective_scan as scans
from medseg.networks.layers.selective_scan import scan_directions, selective_scan

NAMES = ("y", "u", "dt", "a", "b", "c", "d", "bias")
FLOAT32_BACKENDS = ("numba", "blocked")


def draw_inputs(batch: int, groups: int, channels: int, state: int, length: int) -> list[Tensor]:
    """u, dt, a, b, c, d, bias of the sizes a trained network has, float32."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = groups * channels
    return [
        normal(batch, rows, length),
        normal(batch, rows, length),
        -torch.exp(torch.arange(1.0, state + 1).log() + 0.1 * normal(rows, state)),
        normal(batch, groups, state, length),
        normal(batch, groups, state, length),
        1 + 0.1 * normal(rows),
        -4 + 0.5 * normal(rows),
    ]


def run_with_gradients(inputs: list[Tensor], backend: scans.Backend) -> list[Tensor]:
    """The result and the gradients of all inputs for one fixed gradient of the result."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = selective_scan(*leaves, backend=backend)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(8)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights)]


def assert_close_to_float64(inputs: list[Tensor], backend: scans.Backend, limit: float) -> None:
    exact = run_with_gradients([x.double() for x in inputs], "loop")
    for name, got, want in zip(NAMES, run_with_gradients(inputs, backend), exact, strict=True):
        error, scale = float((got - want).abs().max()), float(want.abs().max())
        assert error <= limit * scale, f"{backend}, {name}: {error:.2g} of {scale:.2g}"


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
@pytest.mark.parametrize(
    ("batch", "groups", "channels", "state", "length"),
    [(1, 1, 1, 1, 1), (2, 3, 20, 5, 37), (1, 4, 208, 16, 16), (2, 1, 7, 3, 129)],
    ids=["one of everything", "odd sizes", "two blocks of channels, one chunk", "one step beyond a chunk"],
)
def test_each_formulation_and_its_gradients_agree_with_the_loop_in_float64(
    backend: scans.Backend, batch: int, groups: int, channels: int, state: int, length: int
) -> None:
    assert_close_to_float64(draw_inputs(batch, groups, channels, state, length), backend, limit=2e-6)


def test_the_compiled_gradients_hold_at_4096_steps() -> None:
    assert_close_to_float64(draw_inputs(1, 4, 16, 16, 4096), "numba", limit=5e-6)


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_decays_that_underflow_and_huge_steps_stay_finite_and_right(backend: scans.Backend) -> None:
    u, dt, a, b, c, d, bias = draw_inputs(1, 2, 16, 8, 50)
    dt = torch.where(torch.rand(dt.shape, generator=torch.Generator().manual_seed(3)) < 0.3, 60.0, dt)
    dt[:, :, ::7] = -90.0
    assert_close_to_float64([u, dt, 3 * a, b, c, d, bias], backend, limit=2e-6)


@pytest.mark.parametrize("backend", ["numba", "blocked", "loop"])
def test_a_nan_reaches_the_later_steps_of_its_own_channel_only(backend: scans.Backend) -> None:
    inputs = draw_inputs(1, 2, 20, 4, 40)
    inputs[0][0, 23, 11] = float("nan")
    y = selective_scan(*inputs, backend=backend)
    assert y[0, 23, 11:].isnan().all()
    y[0, 23, 11:] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("backend", ["numba", "blocked", "loop"])
def test_directions_visit_the_positions_in_their_own_order(backend: scans.Backend) -> None:
    """Against sequences that are really permuted, with inputs shared by the directions and nothing contiguous."""
    groups, channels, length = 3, 18, 35
    _, dt, a, b, c, d, bias = draw_inputs(2, groups, channels, 4, length)
    u = torch.randn(2, channels, length, generator=torch.Generator().manual_seed(1))
    order = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(k)) for k in range(groups)])

    def sequences(x: Tensor) -> Tensor:
        """(B, K, X, L) by position to the order of the visit."""
        return torch.stack([x[:, k][..., order[k]] for k in range(groups)], 1)

    leaves = [x.double().requires_grad_() for x in (u, dt, a, b, c, d, bias)]
    u64, dt64, a64, b64, c64, d64, bias64 = leaves
    visited = selective_scan(
        sequences(u64[:, None].expand(-1, groups, -1, -1)).flatten(1, 2),
        sequences(dt64.unflatten(1, (groups, -1))).flatten(1, 2),
        a64, sequences(b64), sequences(c64), d64, bias64, backend="loop",
    ).unflatten(1, (groups, -1))  # fmt: skip
    exact = torch.stack([visited[:, k][..., order[k].argsort()] for k in range(groups)], 1).sum(1)
    expected = [exact, *torch.autograd.grad(exact, leaves, torch.cos(exact.detach()))]

    found = [x.requires_grad_() for x in (u, dt, a, b, c, d, bias)]
    y = scan_directions(
        u.transpose(1, 2)[:, None],
        dt.unflatten(1, (groups, -1)).transpose(2, 3),
        a.unflatten(0, (groups, -1)),
        b.transpose(2, 3),
        c.transpose(2, 3),
        d.unflatten(0, (groups, -1)),
        bias.unflatten(0, (groups, -1)),
        order,
        backend=backend,
    )
    result = y.sum(1).transpose(1, 2)
    got = [result, *torch.autograd.grad(result, found, torch.cos(exact.detach()).float())]
    for name, x, want in zip(NAMES, got, [x.detach() for x in expected], strict=True):
        torch.testing.assert_close(x.detach().double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()), msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_under_autocast_too(dtype: torch.dtype) -> None:
    halves = [x.to(dtype) for x in draw_inputs(1, 2, 16, 4, 33)]
    expected = selective_scan(*(x.float() for x in halves), backend="loop")
    for backend in scans.BACKENDS[:4]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = selective_scan(*halves, backend=backend)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5, msg=backend)


def test_a_second_derivative_is_refused_and_the_loop_has_it() -> None:
    inputs = [x.double().requires_grad_() for x in draw_inputs(1, 1, 2, 2, 4)]
    assert torch.autograd.gradgradcheck(lambda *x: selective_scan(*x, backend="loop"), inputs)
    leaves = [x.detach().float().requires_grad_() for x in inputs]
    y = selective_scan(*leaves, backend="numba")
    with pytest.raises(RuntimeError, match=r"no second derivative; use backend='loop'"):
        torch.autograd.grad(y.sum(), leaves, create_graph=True)


def test_no_states_are_kept_where_no_gradient_is_wanted() -> None:
    inputs = [x.requires_grad_() for x in draw_inputs(1, 2, 16, 4, 33)]
    with torch.no_grad():
        assert selective_scan(*inputs, backend="numba").grad_fn is None
    kept = selective_scan(*inputs, backend="numba").grad_fn
    assert kept is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: (0, 6, 5), 1: (0, 6, 5), 3: (0, 2, 4, 5), 4: (0, 2, 4, 5)}, "must not be empty, got (0, 2, 5, 3, 4)"),
        ({3: (1, 4, 4, 5)}, "channels of u must be a multiple of the groups of b, got 6 and 4"),
        ({4: (1, 2, 4, 6)}, "c must be (1, 2, 5, 4) for dt (1, 2, 5, 3), got (1, 2, 6, 4)"),
        ({0: (1, 6, 4)}, "u must be (1, 2, 5, 3) for dt (1, 2, 5, 3), got (1, 2, 4, 3)"),
    ],
    ids=["empty batch", "groups", "length of c", "length of u"],
)
def test_shapes_that_do_not_belong_together_are_named(changes: dict[int, tuple[int, ...]], message: str) -> None:
    shapes = [(1, 6, 5), (1, 6, 5), (6, 4), (1, 2, 4, 5), (1, 2, 4, 5), (6,), (6,)]
    inputs = [torch.zeros(changes.get(i, shape)) for i, shape in enumerate(shapes)]
    with pytest.raises(ValueError, match=r".") as caught:
        selective_scan(*inputs)
    assert message in str(caught.value)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of auto, numba, .*, got 'cuda'"):
        selective_scan(*draw_inputs(1, 1, 2, 2, 3), backend="cuda")  # type: ignore[arg-type]


def test_scans_that_run_at_once_on_two_threads_each_do_not_disturb_each_other() -> None:
    inputs = draw_inputs(2, 4, 48, 8, 200)
    expected = run_with_gradients(inputs, "loop")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: run_with_gradients(inputs, "numba"), range(8)))
    finally:
        torch.set_num_threads(before)
    for result in results:
        for name, got, want in zip(NAMES, result, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()), msg=name)


def test_without_numba_the_loop_takes_over(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    inputs = draw_inputs(1, 2, 4, 3, 9)
    expected = selective_scan(*inputs, backend="loop")
    monkeypatch.setitem(sys.modules, "medseg.networks.layers.selective_scan_numba", None)
    scans._has_numba.cache_clear()
    try:
        assert torch.equal(selective_scan(*inputs), expected)
    finally:
        scans._has_numba.cache_clear()
    assert "numba cannot be used" in caplog.text


@pytest.mark.slow  # compiles
def test_the_kernels_compile_where_no_cache_folder_is_writable() -> None:
    code = (
        "import logging, torch; logging.basicConfig(level='INFO');"
        "from medseg.networks.layers.selective_scan import selective_scan as scan;"
        "x = torch.ones(1, 2, 5); w = torch.ones(1, 1, 3, 5); v = torch.ones(2);"
        "print(scan(x, x, -torch.ones(2, 3), w, w, v, v, backend='numba').sum())"
    )
    # The only place that numba may use is under a file, where no folder can be made, whoever runs the test.
    unusable = {"NUMBA_CACHE_LOCATOR_CLASSES": "UserWideCacheLocator", "XDG_CACHE_HOME": os.devnull}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **unusable}
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("tensor(")
    assert "compiled code is not kept" in run.stderr
