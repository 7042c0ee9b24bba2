"""What the machine code of every kernel looks like, without a GPU: `python -m llama2_kernels.static [--json]`.

Each operator is recorded at the shapes of the real models with the launcher's own settings and hints, compiled ahead of
time for the A100 (sm_80) and the H200 (sm_90), and read: registers, spills, shared memory, how many programs a
multiprocessor holds, how wide its loads and stores are, bytes on the way. Beside it stand the least times that the
bytes, the instructions and the special functions allow, by the data sheet. Nothing is run, and no time is measured.

Where Liger-Kernel is installed its kernels for the same work stand in the last columns, with the settings that its own
launchers give.

A file of the package takes part by a function `static_cases(tokens) -> list[registry.Case]`: `registry.record` of each
operator with meta tensors, and the bytes that it moves. What is wrong with a kernel is said below the table, and the
exit status is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import math
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2_kernels import liger, registry
from llama2_kernels.registry import Case, Launch

FILES = ("rms_norm", "swiglu", "rope", "linear_cross_entropy")
MODELS = ("7b", "13b", "70b")


@dataclass(frozen=True)
class Machine:
    """The data sheet of a device. Multiprocessors of 65,536 registers, 2,048 threads and 32 programs each."""

    name: str
    sms: int
    gb_per_s: float
    ghz: float  # the highest clock: a bound is what no device is better than
    shared_sm: int  # bytes
    shared_program: int


MACHINES = {
    80: Machine("A100", 108, 2039.0, 1.41, 164 << 10, 163 << 10),
    90: Machine("H200", 132, 4800.0, 1.98, 228 << 10, 227 << 10),
}
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32


# --- machine code -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """A compiled kernel. Counters: instructions by class; of the whole, of all loops, of the loop that reads memory."""

    registers: int
    stack: int  # bytes a thread: of spilled registers, and of whatever else lies in local memory
    spills: int  # bytes that a thread stores there and loads again
    shared: int  # bytes a program
    all: Counter[str]
    loops: Counter[str]
    hot: Counter[str] | None


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\b(.*)")
_ACCESS = {
    **{"LDG": "load", "LD": "load", "STG": "store", "ST": "store", "LDGSTS": "copy"},
    **{"LDL": "local", "STL": "local"},
}
_CLASSES = {
    "fp64": ("DFMA", "DMUL", "DADD", "DSETP"),
    "special": ("MUFU",),
    "barrier": ("BAR",),
    "atomic": ("RED", "ATOM", "ATOMG"),
}


def _classes(opcode: str) -> Iterator[str]:
    """What an instruction counts as: "load.128", "load.kept.128" (evict_last: found in the cache), "special", ..."""
    base, *parts = opcode.split(".")
    yield "total"
    if base in _ACCESS:
        bits = next((p.lstrip("US") for p in parts if p in ("128", "64", "U16", "S16", "U8", "S8")), "32")
        yield f"{_ACCESS[base]}.{'kept.' if 'EL' in parts else ''}{bits}"
    for name, opcodes in _CLASSES.items():
        if base in opcodes:
            yield name


def _count(opcodes: Iterable[str]) -> Counter[str]:
    return Counter(name for opcode in opcodes for name in _classes(opcode))


def read_code(text: str, shared: int) -> Code:
    """`cuobjdump -res-usage -sass` of one kernel."""
    usage = {k: int(v) for k, v in re.findall(r"\b(REG|STACK):(\d+)", text)}
    lines = [(int(m[1], 16), m[3], m[4]) for m in map(_LINE.search, text.splitlines()) if m and m[3] != "NOP"]
    loops = []
    for address, opcode, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.split(".")[0] == "BRA" else None
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    bodies = [_count(op for at, op, _ in lines if low <= at <= high) for low, high in loops]
    # Of an unrolled loop and its remainder the smaller one: one turn of it.
    reading = [b for b in bodies if any(name.startswith(("load.", "copy.")) for name in b)]
    whole = _count(op for _, op, _ in lines)
    return Code(
        registers=usage["REG"],
        stack=usage["STACK"],
        spills=sum(n * int(name.split(".")[-1]) // 8 for name, n in whole.items() if name.startswith("local.")),
        shared=shared,
        all=whole,
        loops=_count(op for at, op, _ in lines if any(low <= at <= high for low, high in loops)),
        hot=min(reading, key=lambda body: body["total"], default=None),
    )


def compile_launch(launch: Launch, arch: int) -> Code:
    """Compile a recorded launch with the hints that the launcher would give. Raises what triton raises."""
    types, constants, hints = launch.signature()
    key = (launch.kernel, *(tuple(map(str, x.items())) for x in (types, constants, hints)))
    return _compiled(_Same(key, (types, constants, hints)), launch.warps, launch.stages, arch)


@dataclass(frozen=True)
class _Same:
    """What is compiled, equal by its key."""

    key: tuple[Any, ...]
    source: Any

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.key == other.key


@functools.cache
def _compiled(what: _Same, warps: int, stages: int, arch: int) -> Code:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, hints = what.source
    source = ASTSource(what.key[0], signature=types, constexprs=constants, attrs=hints)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        made = triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
        )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        dump = [_tool("cuobjdump"), "-res-usage", "-sass", str(cubin)]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    return read_code(text, made.metadata.shared)


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


# --- what follows from it -----------------------------------------------------------------------------------------


def fit(code: Code, warps: int, machine: Machine) -> tuple[int, str]:
    """Programs that a multiprocessor holds at once, and what they are limited by."""
    of_a_warp = math.ceil(code.registers * 32 / 256) * 256
    limits = {
        "programs": PROGRAMS,
        "threads": THREADS // (32 * warps),
        "registers": REGISTERS // of_a_warp // warps,
        # each resident program takes another KB
        "shared memory": machine.shared_sm // (code.shared + 1024) if code.shared <= machine.shared_program else 0,
    }
    least = min(limits, key=lambda name: limits[name])
    return limits[least], least


def _bytes(counts: Counter[str], kind: str) -> int:
    """Bytes of a thread's wide accesses of a kind: neither what is kept in the cache nor scalars of the whole row."""
    return 16 * counts[f"{kind}.128"]


def _widths(counts: Counter[str], kind: str) -> dict[str, int]:
    """Accesses of a kind by their bits."""
    found: Counter[str] = Counter()
    for name, n in counts.items():
        if name.startswith(kind + "."):
            found[name.split(".")[-1]] += n
    return dict(sorted(found.items(), key=lambda item: -int(item[0])))


def describe(case: Case, launch: Launch, arch: int) -> dict[str, Any]:
    """One launch of a case on one architecture; bounds only for the first, which moves the bytes."""
    machine, code = MACHINES[arch], compile_launch(launch, arch)
    first = launch is case.launches[0]
    programs, threads = math.prod(launch.grid), 32 * launch.warps
    most, limit = fit(code, launch.warps, machine)
    resident = min(most, -(-programs // machine.sms))
    hot = code.hot or code.all
    stages = launch.arguments.get("STAGES", launch.stages)
    flight = _bytes(hot, "load") + _bytes(hot, "copy") * max(1, stages - 1)
    row: dict[str, Any] = {
        "op": case.op,
        "model": case.model,
        "kernel": launch.kernel.__name__,
        "arch": arch,
        "grid": list(launch.grid),
        "warps": launch.warps,
        "registers": code.registers,
        "spills": code.spills,
        "stack": code.stack,
        "shared": code.shared,
        "programs_fit": most,
        "limited_by": limit,
        "programs_resident": resident,
        "occupancy": round(resident * threads / THREADS, 3),
        "loads": _widths(hot, "load"),
        "copies": _widths(hot, "copy"),
        "stores": _widths(code.all, "store"),
        "in_loop": code.hot is not None,
        "kb_in_flight": round(flight * threads * resident / 1024, 1),
        "instructions": code.all["total"],
    }
    if first:
        row |= {
            "tokens": case.tokens,
            "bytes_per_token": round(case.bytes_per_token, 1),
            "least_bytes_per_token": case.least_bytes_per_token,
            "bytes_per_element": round(case.bytes_per_token / case.elements, 3) if case.elements else None,
            "memory_us": round(case.bytes_per_token * case.tokens / machine.gb_per_s / 1e3, 1),
            **_issue(case, code, programs, launch, machine),
        }
    row["faults"] = list(faults(case, launch, code, most, machine))
    return row


def _issue(case: Case, code: Code, programs: int, launch: Launch, machine: Machine) -> dict[str, float | None]:
    """Microseconds in which the instructions can be issued: four a clock and multiprocessor, 16 special results."""
    turns = case.turns or (case.tokens / programs if case.per_sm else None)
    if code.hot is not None and turns is None:
        return {"issue_us": None, "special_us": None}

    def executed(name: str) -> float:
        once = code.all[name] - code.loops[name]
        return once + (code.hot or Counter())[name] * (turns or 0) if code.hot is not None else code.all[name]

    a_us = machine.sms * machine.ghz * 1e3
    warps = programs * launch.warps
    return {
        "issue_us": round(warps * executed("total") / (4 * a_us), 1),
        "special_us": round(warps * 32 * executed("special") / (16 * a_us), 1),
    }


def faults(case: Case, launch: Launch, code: Code, most: int, machine: Machine) -> Iterator[str]:
    """What must not be: spills, local memory, fp64, atomics, narrow access in the kernel that moves the bytes."""
    if code.spills > case.spill_bytes:
        yield f"{code.spills} bytes spilled"
    if code.stack and not case.spill_bytes:
        yield f"{code.stack} bytes of local memory"
    if code.all["fp64"]:
        yield f"{code.all['fp64']} instructions in fp64"
    if code.all["atomic"]:
        yield f"{code.all['atomic']} atomics"
    if not most:
        yield f"{code.shared} bytes of shared memory, {machine.name} has {machine.shared_program}"
    if case.per_sm is not None and launch is case.launches[0] and most < case.per_sm:
        yield f"{case.per_sm} programs a multiprocessor are launched, {most} fit"


# --- cases --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _launched_on(machine: Machine) -> Iterator[None]:
    """Record grids as for this device."""
    before, registry.UNKNOWN_SMS = registry.UNKNOWN_SMS, machine.sms
    try:
        yield
    finally:
        registry.UNKNOWN_SMS = before


def cases(arch: int, tokens: int = 8192) -> list[Case]:
    """Every operator at the shapes of 7b, 13b and 70b, as it is launched on a device of this architecture."""
    with _launched_on(MACHINES[arch]):
        return [
            case for name in FILES for case in importlib.import_module(f"llama2_kernels.{name}").static_cases(tokens)
        ]


def rows(arch: int, *, model: str | None = None, only: str = "", tokens: int = 8192) -> Iterator[dict[str, Any]]:
    """A row for each launch that differs from the others of its case."""
    for case in cases(arch, tokens):
        if only in case.op and model in (None, case.model):
            yield from describe_all(case, arch)


def describe_all(case: Case, arch: int) -> Iterator[dict[str, Any]]:
    """The launches of a case, each kernel once."""
    seen: set[str] = set()
    for launch in case.launches:
        if launch.kernel.__name__ not in seen:
            seen.add(launch.kernel.__name__)
            yield describe(case, launch, arch)


# --- report -------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "warps": lambda r: str(r["warps"]),
    "registers": lambda r: str(r["registers"]),
    "spills": lambda r: str(r["spills"]),
    "shared B": lambda r: f"{r['shared']:,}",
    "programs/SM": lambda r: f"{r['programs_resident']} of {r['programs_fit']}",
    "occupancy": lambda r: f"{r['occupancy']:.0%}",
    "loads": lambda r: _wide(r["loads"] | {f"{k} async": n for k, n in r["copies"].items()}),
    "stores": lambda r: _wide(r["stores"]),
    "B/element": lambda r: f"{r['bytes_per_element']:.2f}" if r.get("bytes_per_element") else "",
    "KB in flight": lambda r: f"{r['kb_in_flight']:.0f}" if "tokens" in r else "",
    "memory us": lambda r: f"{r['memory_us']:.0f}" if "tokens" in r else "",
    "issue us": lambda r: _maybe(r.get("issue_us")),
    "special us": lambda r: _maybe(r.get("special_us")),
}
OTHERS = ("warps", "registers", "spills", "programs/SM", "B/element", "KB in flight")


def _wide(counts: dict[str, int]) -> str:
    return " ".join(f"{n}x{bits}" for bits, n in counts.items())


def _maybe(us: float | None) -> str:
    return "" if us is None else f"{us:.0f}"


def table(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown; where the architectures differ a cell has both, the A100 first."""
    by_case: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in ours:
        by_case.setdefault((row["op"], row["model"], row["kernel"]), []).append(row)
    beside: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in others:
        beside.setdefault((row["op"], row["model"]), []).append(row)
    names = ["operator", "model", "kernel", *COLUMNS, *(f"Liger: {name}" for name in OTHERS if others)]
    yield _line(names)
    yield _line(["---", "---", "---", *("---:" for _ in names[3:])])
    for (op, model, kernel), found in by_case.items():
        cells = [_both(found, show) for show in COLUMNS.values()]
        if others:
            peers = beside.get((op, model), []) if "tokens" in found[0] else []
            cells += [_both(peers, COLUMNS[name]) for name in OTHERS]
        yield _line([op, model, kernel, *cells])


def _both(found: list[dict[str, Any]], show: Callable[[dict[str, Any]], str]) -> str:
    return " / ".join(dict.fromkeys(show(row) for row in found))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m llama2_kernels.static", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--arch", type=int, choices=list(MACHINES), help="one architecture only")
    parser.add_argument("--model", choices=MODELS, help="one model only")
    parser.add_argument("--only", default="", help="operators whose name contains this")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a call (default: 8192)")
    asked = parser.parse_args()
    if not registry.HAS_TRITON or registry.INTERPRET:
        why = "TRITON_INTERPRET is set" if registry.HAS_TRITON else "triton is not installed"
        print(f"nothing can be compiled: {why}", file=sys.stderr)
        return 2
    archs = [asked.arch] if asked.arch else list(MACHINES)
    found: list[dict[str, Any]] = []
    for arch in archs:
        for row in rows(arch, model=asked.model, only=asked.only, tokens=asked.tokens):
            found.append(row)
            if asked.json:
                print(json.dumps(row), flush=True)
    peers = [] if asked.json or not liger.version() else list(_peers(archs, asked))
    if not asked.json:
        devices = " / ".join(f"{MACHINES[a].name} (sm_{a}, {MACHINES[a].gb_per_s:,.0f} GB/s)" for a in archs)
        print(f"bf16, {asked.tokens} tokens, {devices}; triton {importlib.import_module('triton').__version__}", end="")
        print(f", Liger-Kernel {liger.version()}\n" if peers else "\n")
        print("\n".join(table(found, peers)))
    wrong = [f"{r['op']}, {r['model']}, {r['kernel']}, sm_{r['arch']}: {fault}" for r in found for fault in r["faults"]]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def _peers(archs: Iterable[int], asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for arch in archs:
        for case in liger.static_cases(asked.tokens, MACHINES[arch].sms):
            if asked.only in case.op and asked.model in (None, case.model):
                yield from describe_all(case, arch)


if __name__ == "__main__":
    sys.exit(main())
