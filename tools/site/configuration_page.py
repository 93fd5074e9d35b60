"""The page of the configuration, from the pydantic models and the signatures of the tasks."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pydantic
from griffe import Docstring, DocstringSectionKind

from l3rs import Direction, Spec
from l3rs.directions import OPTIONS
from metatrain.config import Config, OptimizerConfig, TaskConfig
from tasks import TASKS
from tasks.augment import Augmentation

_HEAD = """# Configuration

A configuration is a YAML file. `key=value` arguments of a command are merged into it, and the result is checked as a
whole: an unknown key, a value of another type and a number out of range are errors, with the key, what was found and
what is allowed. Values are not converted: `"8"` is not a number. `${oc.env:NAME}` and other interpolations are those of
OmegaConf; they are saved as they were written.

A complete small configuration has a name and a task, everything else has a default:

```yaml
name: mine
task: {name: digits}
```
"""


def configuration_page() -> str:
    """Markdown: a table of keys for each section, then the options of each task."""
    parts = [_HEAD, "## Top level", _table(Config, "")]
    for key, model in _sections(Config, ""):
        parts += [f"## {key}", _summary(model), _table(model, f"{key}.")]
        if model is TaskConfig:
            parts.append("The options of each task are [below](#options-of-the-tasks).")
        if model is OptimizerConfig:
            parts.append(_directions())
    parts += ["## Options of the tasks", _augmentation(), *map(_task, TASKS)]
    return "\n\n".join(parts) + "\n"


def meanings(owner: Any) -> dict[str, str]:
    """{name: meaning} from the section Attributes or Args of a docstring; of the base classes, too."""
    found: dict[str, str] = {}
    for each in reversed(inspect.getmro(owner)) if isinstance(owner, type) else [owner]:
        for section in _parsed(inspect.getdoc(each) if each.__doc__ else None):
            if section.kind in (DocstringSectionKind.attributes, DocstringSectionKind.parameters):
                for item in section.value:
                    found |= dict.fromkeys(re.split(r",\s*", item.name), " ".join(item.description.split()))
    return found


def keys(model: type[pydantic.BaseModel]) -> dict[str, tuple[str, str, str]]:
    """{key: (type, default, meaning)} of a model's fields; sections of their own are left out."""
    said = meanings(model)
    if model is OptimizerConfig:
        said = {**meanings(Spec), **said}
    return {
        name: (_type(field.annotation, field.metadata), _default(field), said.get(name, ""))
        for name, field in model.model_fields.items()
        if _section(field.annotation) is None
    }


def _sections(model: type[pydantic.BaseModel], prefix: str) -> Iterator[tuple[str, type[pydantic.BaseModel]]]:
    for name, field in model.model_fields.items():
        if (section := _section(field.annotation)) is not None:
            yield prefix + name, section
            yield from _sections(section, f"{prefix}{name}.")


def _section(annotation: Any) -> Any:
    """The model of a field that is a section, a list of sections, or a section or null; else None."""
    kinds = (annotation, *getattr(annotation, "__args__", ()))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)), None)


def _table(model: type[pydantic.BaseModel], prefix: str) -> str:
    rows = [
        f"| `{prefix}{name}` | {_cell(kind)} | {default} | {_sentence(meaning)} |"
        for name, (kind, default, meaning) in keys(model).items()
    ]
    return "\n".join(["| Key | Type | Default | Meaning |", "|---|---|---|---|", *rows])


def _summary(owner: Any) -> str:
    sections = _parsed(inspect.getdoc(owner))
    text = next((s.value for s in sections if s.kind is DocstringSectionKind.text), "")
    return html.escape(text, quote=False)


def _parsed(text: str | None) -> list[Any]:
    return Docstring(text or "").parse("google", warnings=False)


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|")


def _sentence(text: str) -> str:
    return _cell(text[:1].upper() + text[1:])


_TYPES = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text", "NoneType": "null"}


def _type(annotation: Any, metadata: Any = ()) -> str:
    """A type in words, with its bounds."""
    origin, arguments = getattr(annotation, "__origin__", None), getattr(annotation, "__args__", ())
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _type(annotation.__origin__, annotation.__metadata__)
    name = getattr(origin, "__name__", "") or str(origin)
    if "Literal" in str(origin):
        return " or ".join(str(each) for each in arguments)
    if name == "tuple":
        if len(arguments) == 2 and arguments[1] is ...:
            return f"list of {_type(arguments[0])}"
        return "list: " + ", ".join(map(_type, arguments))
    if name == "dict":
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    if arguments:
        return " or ".join(_type(each) for each in arguments)
    return _TYPES.get(getattr(annotation, "__name__", ""), "anything") + _bounds(metadata)


def _bounds(metadata: Any) -> str:
    """` ≥ 1`, from what pydantic keeps of a field's limits."""
    constraints = [c for each in metadata for c in getattr(each, "metadata", None) or [each]]
    for attribute, sign in (("ge", "≥"), ("gt", ">")):
        for each in constraints:
            if getattr(each, attribute, None) is not None:
                return f" {sign} {getattr(each, attribute):g}"
    return ""


def _default(field: Any) -> str:
    return "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Direction):
        value = value.to_json()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(each)}" for key, each in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _directions() -> str:
    rows = [f"| `{name}` | {_cell(_yaml(options)) if options else 'none'} |" for name, options in OPTIONS.items()]
    head = "An entry of `directions` is a name, or a mapping of a name and options, e.g. `{name: adam, b2: 0.99}`:"
    return "\n".join([head, "", "| Direction | Options and their defaults |", "|---|---|", *rows])


def _augmentation() -> str:
    head = "`task.augment` wraps any task of JAX for meta-training; its keys:"
    return f"{head}\n\n{_rows(Augmentation, 'task.augment.')}"


def _task(name: str) -> str:
    return f"### {name}\n\n{_summary(TASKS[name])}\n\n{_rows(TASKS[name], 'task.')}"


def _rows(function: Any, prefix: str) -> str:
    said, lines = meanings(function), ["| Key | Default | Meaning |", "|---|---|---|"]
    for option in inspect.signature(function).parameters.values():
        default = "required" if option.default is option.empty else f"`{_yaml(option.default)}`"
        lines.append(f"| `{prefix}{option.name}` | {default} | {_sentence(said.get(option.name, ''))} |")
    return "\n".join(lines)
