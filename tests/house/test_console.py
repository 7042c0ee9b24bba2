"""Only console.py writes to stderr, and nothing prints: stdout carries records. Read from the syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "llama2cli"
WRITER = "console.py"


def violations(source: str, path: str) -> list[str]:
    """Lines that print, write to stderr or go round the console, as `path:line: what`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        what = None
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("print", "warnings.warn", "traceback.print_exc", "rich.print", "faulthandler.enable"):
                what = f"calls {called}"
            if any(k.arg == "err" and ast.unparse(k.value) != "False" for k in node.keywords) and "echo" in called:
                what = f"calls {called} with err"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stderr", "sys.__stderr__"):
            what = "touches sys.stderr"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names]
            if "logging" in names or (isinstance(node, ast.ImportFrom) and node.module == "logging"):
                what = "imports logging"
            if isinstance(node, ast.ImportFrom) and node.module == "sys" and "stderr" in names:
                what = "imports stderr"
        if what is not None:
            found.append(f"{path}:{node.lineno}: {what}")  # type: ignore[attr-defined]
    return found


def test_only_the_console_writes_to_stderr() -> None:
    """The whole package keeps the rule."""
    paths = [p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).as_posix() != WRITER]
    assert len(paths) > 10
    assert [line for p in paths for line in violations(p.read_text(), p.relative_to(PACKAGE).as_posix())] == []


@pytest.mark.parametrize(
    "source",
    [
        "print('x')",
        "import sys\nsys.stderr.write('x')",
        "import sys\nprint('x', file=sys.stderr)",
        "from sys import stderr",
        "import logging",
        "from logging import getLogger",
        "import warnings\nwarnings.warn('x')",
        "import typer\ntyper.echo('x', err=True)",
    ],
)
def test_a_planted_print_is_found(source: str) -> None:
    """The rule fails on each way round it."""
    assert violations(source, "planted.py")


def test_stdout_is_not_reported() -> None:
    """Records go to stdout."""
    assert (
        violations("import sys\nsys.stdout.write('x')\nfrom llama2cli import console\nconsole.say('x')", "p.py") == []
    )
