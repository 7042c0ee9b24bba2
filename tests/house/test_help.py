"""Help answers at once and truthfully: no heavy import, an example at its end, and every flag of the example exists."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shlex
import subprocess
import sys
from typing import Any

import pytest
import typer

from llama2cli import cli

HEAVY = ["torch", "transformers", "numpy", "triton", "sentencepiece", "rich", "hypothesis"]
CHILD = """
import json, sys
from llama2cli import cli
code = cli.invoke(json.loads(sys.argv[1]))
print("\\n" + json.dumps([code, sorted(set(json.loads(sys.argv[2])) & set(sys.modules))]))
"""


def ask(*args: str) -> tuple[str, int, list[str]]:
    """Run a command line in a fresh interpreter: its stdout, its exit code, the heavy modules it had loaded."""
    command = [sys.executable, "-c", CHILD, json.dumps(args), json.dumps(HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    text, _, last = done.stdout.rstrip("\n").rpartition("\n")
    code, loaded = json.loads(last)
    return text, code, loaded


def examples(doc: str) -> list[str]:
    """The lines under the `Example:` that ends a docstring; empty when it does not end with one."""
    _, mark, tail = inspect.cleandoc(doc).rpartition("\nExample:\n")
    lines = [line for line in tail.splitlines() if line.strip()]
    return [line.strip() for line in lines] if mark and all(line.startswith("  ") for line in lines) else []


def ours(lines: list[str]) -> list[list[str]]:
    """The arguments of each `llama2 ...` in the lines of a shell script with pipes."""
    script = "\n".join(lines).replace("\\\n", " ").replace("\n", "\n; ")
    lexer = shlex.shlex(script, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    redirect = False
    for word in lexer:
        if set(word) <= set("|&;()"):
            commands.append([])
        elif set(word) <= set("<>"):
            redirect = True
        elif redirect:
            redirect = False
        else:
            commands[-1].append(word)
    return [c[1:] for c in commands if c and c[0] == "llama2"]


def parses(args: list[str]) -> Any:
    """The settings that a command line gives, without running it. Raises what the command line would report."""
    got: list[Any] = []
    app = cli.build(cli.command_of(args), args, got.append)
    typer.main.get_command(app)(list(args), prog_name="llama2", standalone_mode=False)
    return got[0]


def test_top_help_names_every_command() -> None:
    """`llama2 --help` lists the table of commands, `llama2 eval` that of its measures; they load nothing heavy."""
    for asked, group in (("--help", ""), *((name, f"{name} ") for name in cli.GROUPS)):
        text, code, loaded = ask(asked)
        assert code == 0 and loaded == []
        listed = {group + line.split()[0] for line in text.partition("Commands:")[2].splitlines() if line.strip()}
        mine = {name for name in [*cli.COMMANDS, *cli.GROUPS] if name.rpartition(" ")[0] == group.strip()}
        assert mine <= listed
        assert ask(*asked.split(), "-h")[1] == 0 or not group


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_light_and_ends_with_an_example(command: str) -> None:
    """`llama2 X --help` exits 0 without torch, transformers or numpy, and shows every flag and the example."""
    text, code, loaded = ask(*command.split(), "--help")
    assert code == 0
    assert loaded == []
    settings = cli.stage(command).Settings
    lines = examples(settings.__doc__ or "")
    assert lines, "the docstring of Settings does not end with `Example:` and indented lines"
    for line in lines:
        assert line in [shown.strip() for shown in text.splitlines()], f"the help does not show: {line}"
    for field in dataclasses.fields(settings):
        assert field.metadata["positional"] or cli.long_flag(field) in text, field.name


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_example_is_accepted(command: str) -> None:
    """The example's own command line parses: its flags exist, its values have the right type."""
    found = ours(examples(cli.stage(command).Settings.__doc__ or ""))
    assert any(cli.command_of(args) == command for args in found), f"no example of {command} itself"
    for args in found:
        parses(args)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_flag_is_explained(command: str) -> None:
    """Each field has a line of help, in lower case and without a full stop, like the others."""
    for field in dataclasses.fields(cli.stage(command).Settings):
        help = field.metadata["help"]
        assert help and not help.endswith("."), field.name


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_misspelt_flag_gets_a_suggestion(command: str) -> None:
    """One line, exit code 2, and the flag that was meant."""
    done = subprocess.run(
        [sys.executable, "-m", "llama2cli", *command.split(), "--sede", "1"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "--seed" in done.stderr


def test_an_example_with_a_lost_flag_is_found() -> None:
    """The check of examples fails on a flag, a value or a command that does not exist."""
    assert parses(["plan", "7b", "--gpus", "8"]).gpus == 8
    for line in (
        "llama2 plan 7b --gpuz 8",
        "llama2 plan 7b --gpus many",
        "llama2 eval prefs x",
        "cat x | llama2 plan --nothing",
    ):
        with pytest.raises((typer.TyperException, SystemExit)):
            parses(ours([line])[0])


def test_a_docstring_without_example_is_found() -> None:
    """The example must be the end, and indented."""
    assert examples("What it does.\n\nExample:\n  llama2 plan 7b | jq .\n") == ["llama2 plan 7b | jq ."]
    assert ours(["llama2 plan 7b \\", "--json | jq .", "x | llama2 chat > y"]) == [["plan", "7b", "--json"], ["chat"]]
    assert examples("What it does.") == []
    assert examples("What it does.\n\nExample:\n  llama2 plan\n\nMore words.") == []


def test_a_heavy_import_is_found() -> None:
    """The child reports what it loaded: numpy, when it is imported before."""
    code = CHILD.replace("import json, sys", "import json, sys, numpy")
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(["--help"]), json.dumps(HEAVY)], capture_output=True, text=True
    )
    assert json.loads(done.stdout.splitlines()[-1])[1] == ["numpy"]
