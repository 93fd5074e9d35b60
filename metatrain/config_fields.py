"""The types of values in a configuration, which are not converted; and the fields of `l3rs.Spec` as such values."""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Any

import pydantic
from pydantic import Field

from l3rs import Spec

# Upper bounds are far above what anybody can compute: a number beyond them is not meant.
Count = Annotated[int, Field(strict=True, ge=1, le=10**9)]
Few = Annotated[int, Field(strict=True, ge=1, le=10**5)]
Positive = Annotated[float, Field(strict=True, gt=0, le=1e9)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(max_length=1000)]
Name = Annotated[str, Field(max_length=100)]


class Section(pydantic.BaseModel):
    """A section of a configuration: its keys are those of its class."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _spec_fields() -> dict[str, Any]:
    """{field: (type, default)} of `l3rs.Spec`, apart from the layers, which follow from the task."""
    types, fields = typing.get_type_hints(Spec), dataclasses.fields(Spec)
    found = {field.name: (_strict(types[field.name]), field.default) for field in fields if field.name != "layers"}
    directions = tuple(direction.to_json() for direction in Spec.directions)
    return {**found, "directions": (tuple[Text | dict[str, Any], ...], directions)}


def _strict(kind: Any) -> Any:
    """The type of a field, without conversions: True is no whole number."""
    if kind in (int, float, bool):
        return Annotated[kind, Field(strict=True)]
    if typing.get_origin(kind) is tuple:
        return tuple[tuple(item if item is ... else _strict(item) for item in typing.get_args(kind))]  # type: ignore[misc]
    return kind


SpecFields: Any = pydantic.create_model("SpecFields", __base__=Section, **_spec_fields())
