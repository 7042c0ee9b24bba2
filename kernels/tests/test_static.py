"""The machine code of the kernels at the shapes of the real models, for the A100 and the H200; no GPU is needed.

Compiled in processes of their own: this one may be the interpreter's. Fast: 7b on the A100; slow: all, against the
table of kernels/README.md too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llama2_kernels import registry, static

README = Path(__file__).parents[1] / "README.md"
pytestmark = pytest.mark.skipif(not registry.HAS_TRITON, reason="triton is not installed")

Rows = list[dict[str, Any]]
LEAST = {  # bytes of an element that no kernel can do without, in bf16 (logits in fp32)
    "rms_norm forward": 4,  # x in, y out
    "rms_norm backward": 6,  # x, dy in, dx out
    "add_rms_norm forward": 8,  # x, r in, h, y out
    "add_rms_norm backward": 8,  # h, dh, dy in, dx out
    "swiglu forward": 6,  # gate, up in, product out
    "swiglu backward": 10,  # gate, up, dy in, dgate, dup out
    "swiglu_pair forward": 6,
    "swiglu_pair backward": 10,
    "rope forward": 4,
    "rope backward": 4,
    "rope_qkv forward": 4,
    "rope_qkv backward": 4,
    "log-sum-exp": 4,  # logits in
    "gradient of logits": 6,  # logits in, their gradient out in bf16
}


def compiled(env: dict[str, str], *args: str) -> Rows:
    command = [sys.executable, "-m", "llama2_kernels.static", "--json", *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module", params=["7b on an A100", pytest.param("all", marks=pytest.mark.slow)])
def rows(request: pytest.FixtureRequest) -> Rows:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return compiled(env, *(("--arch", "80", "--model", "7b") if request.param != "all" else ()))


def first(rows: Rows) -> Rows:
    """Those of the kernels that move the bytes."""
    return [r for r in rows if "tokens" in r]


def told(row: dict[str, Any]) -> str:
    return f"{row['op']}, {row['model']}, sm_{row['arch']}"


def test_every_operator_is_there(rows: Rows) -> None:
    assert {r["op"].split(",")[0] for r in rows} == set(LEAST)


def test_no_spills_no_local_memory_no_fp64(rows: Rows) -> None:
    for r in rows:
        assert r["faults"] == [] and r["spills"] == r["stack"] == 0, told(r)


def test_what_is_launched_fits(rows: Rows) -> None:
    """By the limits of the A100 also where it is compiled for another."""
    for r in rows:
        assert r["shared"] <= 163 * 1024 and r["registers"] * 32 * r["warps"] <= 65536, told(r)
        assert r["programs_resident"] * (r["shared"] + 1024) <= 228 * 1024, told(r)


def test_accesses_are_wide(rows: Rows) -> None:
    """All of 16 bytes, but for a few numbers of a row."""
    for r in first(rows):
        loads, stores = r["loads"] | {f"{k} async": n for k, n in r["copies"].items()}, r["stores"]
        for access in (loads, stores):
            assert not {"16", "8"} & set(access), told(r)
        if r["op"].startswith("log-sum-exp"):  # it writes numbers of the row only
            assert set(loads) == {"128"}, told(r)
            continue
        assert stores["128"] >= 1 and (loads.get("128") or loads.get("128 async")), told(r)
        # A number of the whole row or program: positions, targets, what the forward pass kept of a row.
        assert sum(n for bits, n in loads.items() if not bits.startswith("128")) <= 4, told(r)


def test_the_norm_s_backward_loads_ahead(rows: Rows) -> None:
    """Copies to shared memory in the loop, and no other load beside them: rows are always under way."""
    for r in first(rows):
        if "norm backward" in r["op"]:
            assert r["in_loop"] and r["copies"]["128"] in (2, 3, 4, 6) and r["loads"] == {}, told(r)


def test_bytes_are_those_of_the_formula(rows: Rows) -> None:
    for r in first(rows):
        each = LEAST[r["op"].split(",")[0]]
        if r["op"] in ("rms_norm backward", "add_rms_norm backward"):  # a partial row in fp32, written and read again
            each += 8 * r["grid"][0] / r["tokens"]
        assert each <= r["bytes_per_element"] + 5e-4 and r["bytes_per_element"] < each * 1.001, told(r)
        assert r["memory_us"] >= r["least_bytes_per_token"] * r["tokens"] / 4.8e6 - 0.1


def test_bandwidth_is_the_limit(rows: Rows) -> None:
    """Neither the issue of instructions nor special functions need longer than the bytes."""
    for r in first(rows):
        for bound in ("issue_us", "special_us"):
            assert r[bound] is not None and r[bound] < r["memory_us"], told(r)


def test_enough_is_in_flight(rows: Rows) -> None:
    """More than the bandwidth times a latency of 700 ns: 13 KB on an A100, 25 KB on an H200; with room to spare."""
    for r in first(rows):
        assert r["kb_in_flight"] >= 1.5 * (13 if r["arch"] == 80 else 25), told(r)


# --- the committed table ------------------------------------------------------------------------------------------


def committed() -> list[dict[str, str]]:
    lines = [line for line in README.read_text().splitlines() if line.startswith("|")]
    start = next(i for i, line in enumerate(lines) if line.startswith("| operator | model | kernel |"))
    names = [cell.strip() for cell in lines[start].strip("|").split("|")]
    body = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[start + 2 :]]
    return [dict(zip(names, cells)) for cells in body if len(cells) == len(names)]


def test_nothing_is_worse_than_the_committed_table(rows: Rows) -> None:
    """Registers and programs a multiprocessor; another triton may allocate otherwise, and is compared with nothing."""
    version = re.search(r"triton (\d+\.\d+\.\d+)", README.read_text())
    import triton

    if version is None or triton.__version__ != version[1]:
        pytest.skip(f"the table was made with triton {version and version[1]}, here is {triton.__version__}")
    table = {(r["operator"], r["model"], r["kernel"]): r for r in committed()}
    for r in rows:
        row = table[(r["op"], r["model"], r["kernel"])]
        column = 0 if r["arch"] == 80 else -1
        assert r["registers"] <= int(row["registers"].split(" / ")[column]), told(r)
        assert r["programs_fit"] >= int(row["programs/SM"].split(" / ")[column].split()[-1]), told(r)
        assert int(row["warps"]) == r["warps"], told(r)


# --- the reader ---------------------------------------------------------------------------------------------------

LISTING = """
 Function k:
  REG:40 STACK:16 SHARED:0 LOCAL:0
        /*0010*/                   LDG.E.EL.128 R4, desc[UR4][R2.64] ;     /* 0x0 */
        /*0020*/                   DFMA R4, R2, R4, R6 ;                   /* 0x0 */
        /*0100*/              @!P0 LDGSTS.E.BYPASS.128 [R0], [R4.64] ;     /* 0x0 */
        /*0110*/                   LDG.E.U16 R4, [R4.64] ;                 /* 0x0 */
        /*0120*/                   MUFU.EX2 R4, R4 ;                       /* 0x0 */
        /*0130*/              @!P1 BRA 0x100 ;                             /* 0x0 */
        /*0140*/                   STL.64 [R1], R4 ;                       /* 0x0 */
        /*0150*/                   LDL.64 R4, [R1] ;                       /* 0x0 */
        /*0160*/                   STG.E.128 [R18.64], R4 ;                /* 0x0 */
        /*0170*/                   NOP ;                                   /* 0x0 */
        /*0180*/                   BRA 0x180;                              /* 0x0 */
"""


def test_a_listing_by_hand() -> None:
    code = static.read_code(LISTING, shared=4096)
    assert (code.registers, code.stack, code.spills, code.shared) == (40, 16, 16, 4096)
    assert code.all["total"] == 10 and code.all["fp64"] == code.all["special"] == 1
    assert code.hot is not None and code.hot["total"] == 4 and code.hot["copy.128"] == code.hot["load.16"] == 1
    assert code.all["load.kept.128"] == 1 and code.all["store.128"] == 1


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "programs", "by"),
    [
        (32, 8, 0, 8, "threads"),
        (33, 8, 0, 6, "registers"),  # 40 a thread are given: 1,280 a warp
        (64, 16, 0, 2, "registers"),
        (16, 1, 0, 32, "programs"),
        (32, 4, 40 << 10, 4, "shared memory"),  # 41 KB each of 164
        (32, 4, 164 << 10, 0, "shared memory"),
    ],
)
def test_programs_of_a_multiprocessor(registers: int, warps: int, shared: int, programs: int, by: str) -> None:
    code = static.read_code(f"REG:{registers} STACK:0", shared)
    assert static.fit(code, warps, static.MACHINES[80]) == (programs, by)


ODD = """
import torch
from llama2_kernels import registry, rms_norm, rope, static, swiglu

like = dict(dtype=torch.bfloat16, device="meta")
x = torch.empty(5, 1001, **like)
rstd = torch.empty(5, device="meta")
q = torch.empty(1, 5, 3, 6, **like)
table = torch.empty(5, 3, device="meta")
launches = [
    *registry.record(rms_norm.rms_norm_forward, x, x[0], 1e-5),
    *registry.record(rms_norm.rms_norm_backward, x, None, x, x[0], rstd, True),
    *registry.record(swiglu.swiglu_forward, torch.empty(5, 2002, **like)),
    *registry.record(swiglu.swiglu_backward, x, torch.empty(5, 2002, **like)),
    *registry.record(rope.rope_forward, q, q, table, table, None, False, False),
]
for launch in launches:
    for arch in static.MACHINES:
        code = static.compile_launch(launch, arch)
        assert code.spills == code.stack == code.all["fp64"] == 0, launch.kernel
print(len(launches))
"""


def test_odd_widths_compile(compiler_env: dict[str, str]) -> None:
    """Without the hint that rows begin at multiples of 16 bytes: narrower, but without spills."""
    done = subprocess.run([sys.executable, "-c", ODD], env=compiler_env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "6\n", done.stderr


def test_refused_in_the_interpreter(compiler_env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "llama2_kernels.static"]
    env = compiler_env | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "nothing can be compiled: TRITON_INTERPRET is set\n"


def test_one_table_of_launch_constants(compiler_env: dict[str, str]) -> None:
    """The report is of what is launched: the constants are those of `settings_for`."""
    from llama2_kernels import rms_norm

    for case in rms_norm.static_cases():
        launch, width = case.launches[0], case.elements
        settings = rms_norm.settings_for(width)
        assert launch.arguments["N"] == width and launch.arguments["A"] == settings.piece
        warps = settings.forward_warps if "forward" in case.op else settings.backward_warps
        assert launch.warps == warps
