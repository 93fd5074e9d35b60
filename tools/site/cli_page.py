"""The page of the command line, from its own declarations."""

from __future__ import annotations

import html
from typing import Any

import typer

from metatrain.cli import app

_HEAD = """# Commands

    metatrain COMMAND …

{help}

`metatrain COMMAND --help` prints the same for one command.
"""


def cli_page() -> str:
    """Markdown: a section for each command with its arguments and options."""
    group: Any = typer.main.get_command(app)
    parts = [_HEAD.format(help=group.help.strip())]
    for name, command in group.commands.items():
        parts.append(_section(name, command))
    return "\n".join(parts)


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join(["metatrain", name, *map(_usage, arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"## {name}", "", f"    {usage}", "", (command.help or "").strip(), ""]
    for title, parameters in (("Argument", arguments), ("Option", options)):
        if parameters:
            lines += [f"| {title} | Default | Meaning |", "|---|---|---|", *map(_row, parameters), ""]
    return "\n".join(lines)


def _usage(argument: Any) -> str:
    name = _name(argument) + (" …" if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _name(argument: Any) -> str:
    return str(argument.metavar or argument.name).upper()


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        shown = f"`{_name(parameter)}`"
    else:
        value = "" if parameter.is_flag else f" {parameter.metavar or _kind(parameter)}"
        shown = ", ".join(f"`{spelling}{value}`" for spelling in reversed(parameter.opts))
    return f"| {shown} | {_default(parameter)} | {html.escape(parameter.help or '', quote=False)} |"


def _kind(option: Any) -> str:
    """What `--help` calls the value; where it is found depends on the version of typer."""
    described = getattr(option, "type_descriptor", None)
    if described is None:
        return str(option.type.name).upper()
    return {"int": "INTEGER", "float": "FLOAT", "Path": "PATH"}.get(
        getattr(described.annotation, "__name__", ""), "TEXT"
    )


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    default = parameter.default
    if callable(default) or default is None or default is False or default == () or default == []:
        return ""
    return f"`{default}`"
