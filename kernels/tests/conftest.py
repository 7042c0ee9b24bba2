"""Kernels run here on the CUDA device where there is one, else in Triton's interpreter on CPU tensors.

Triton decides when it is imported, and at each `@triton.jit`, whether a kernel is compiled or interpreted: the variable
is set here, before any test is collected, and holds for the process and what it starts. A test that needs the compiler
starts a process without it (see `compiler_env`).
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before kernels/tests could ask for its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"

if importlib.util.find_spec("llama2_kernels") is None:  # an older install: take the checkout's, children too
    FOLDER = str(Path(__file__).parents[1])
    sys.path.insert(0, FOLDER)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (FOLDER, os.environ.get("PYTHONPATH"))))

from llama2_kernels import registry

DEVICE = "cpu" if registry.INTERPRET else "cuda"
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without triton there is nothing to run but the imports."""
    if not registry.HAS_TRITON:
        for item in items:
            if "kernels" in item.path.parts and "without_triton" not in item.name:
                item.add_marker(pytest.mark.skip(reason="triton is not installed"))


# --- the interpreter's bf16 ---------------------------------------------------------------------------------------


def rounding(convert: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter's conversion of floats, with fp32 to bf16 rounded to nearest even as every GPU does it.

    Triton's own truncates (test_interpreter.py shows it) and is wrong about subnormals, both ways.
    """
    import numpy as np
    import triton.language as tl

    def converted(input: Any, input_dtype: Any, output_dtype: Any, mode: Any) -> Any:
        if input_dtype == tl.float32 and output_dtype == tl.bfloat16:
            values = torch.from_numpy(np.array(input, dtype=np.float32, order="C"))
            return values.bfloat16().view(torch.uint16).numpy()
        if input_dtype == tl.bfloat16 and output_dtype == tl.float32:
            return (np.asarray(input).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return convert(input, input_dtype, output_dtype, mode)

    converted.unpatched = convert  # type: ignore[attr-defined]
    return converted


def once(patch: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter's exchange of the language's functions, left out where they are exchanged already.

    It does so at every call of a function from a kernel, which takes four fifths of its time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    def exchanged(fn: Any) -> Any:
        languages = [x for x in (tl, tl.core) if any(x is value for value in fn.__globals__.values())]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return patch(fn)

    exchanged.unpatched = patch  # type: ignore[attr-defined]
    return exchanged


if registry.INTERPRET:
    from triton.runtime import interpreter

    if not hasattr(interpreter._convert_float, "unpatched"):
        interpreter._convert_float = rounding(interpreter._convert_float)
    if hasattr(interpreter, "_LangPatchScope") and not hasattr(interpreter._patch_lang, "unpatched"):
        interpreter._patch_lang = once(interpreter._patch_lang)


# --- fixtures -----------------------------------------------------------------------------------------------------


@pytest.fixture
def device() -> str:
    """Where tensors of these tests live."""
    return DEVICE


@pytest.fixture
def compiler_env() -> dict[str, str]:
    """The environment of a process in which triton compiles (ahead of time, too: that needs no device)."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every `torch.empty` holds poison (NaN, or the least integer) and lies between two fences of it.

    What a kernel leaves unwritten is then seen in the result, and what it writes outside its tensor when the test ends.
    Only for eager calls: a fake tensor has no fences.
    """
    empty, fence = torch.empty, 64
    made: list[tuple[torch.Tensor, int]] = []

    def fenced(*size: Any, dtype: Any = None, device: Any = None, **rest: Any) -> torch.Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        n = math.prod(shape)
        buffer = empty(n + 2 * fence, dtype=dtype, device=device, **rest)
        if str(buffer.device.type) == "meta":
            return empty(shape, dtype=dtype, device=device, **rest)
        buffer.fill_(poison(buffer.dtype))
        made.append((buffer, n))
        return buffer[fence : fence + n].view(shape)

    monkeypatch.setattr(torch, "empty", fenced)
    yield
    monkeypatch.undo()
    for buffer, n in made:
        ends = torch.cat((buffer[:fence], buffer[fence + n :]))
        whole = ends.isnan() if ends.is_floating_point() else ends == poison(ends.dtype)
        assert bool(whole.all()), f"written outside a tensor of {n} elements"


def poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return math.nan
    return True if dtype == torch.bool else torch.iinfo(dtype).min


@pytest.fixture
def ulps() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """The largest distance of a result from exact values, in units of the last place of the exact value's binade."""

    def distance(got: torch.Tensor, exact: torch.Tensor) -> float:
        info = torch.finfo(got.dtype)
        exact = exact.detach().double()
        magnitude = exact.abs().clamp(min=info.smallest_normal)
        unit = torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps
        return float(((got.detach().double() - exact).abs() / unit).max()) if got.numel() else 0.0

    return distance
