"""What a task's program takes and what it gives: its fields, with their types as JSON schemas.

    interface.json   {"schema": 1, "inputs": {field: JSON schema}, "outputs": {field: JSON schema},
                      "optional": [output, ...], "predictors": [name, ...]}

The trainer writes it into a release from the loaded program; serving describes itself by it, and checks
inputs by the same types. A schema holds no `$ref`, so it can be put into any document.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PydanticInvalidForJsonSchema,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)

from serve.release import ReleaseInvalid

Schema = dict[str, Any]
Mode = Literal["validation", "serialization"]


class Interface(BaseModel):
    """interface.json."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    inputs: dict[str, Schema]
    """All of them are needed."""
    outputs: dict[str, Schema]
    optional: list[str]
    """Outputs that an answer may lack."""
    predictors: list[str]

    def text(self) -> str:
        """The interface as it is written: the same bytes for the same program."""
        return json.dumps(self.model_dump(by_alias=True), indent=2, ensure_ascii=False) + "\n"

    def request(self) -> Schema:
        """JSON schema of an object with the inputs."""
        return {
            "type": "object",
            "properties": self.inputs,
            "required": list(self.inputs),
            "additionalProperties": False,
        }

    def answer(self) -> Schema:
        """JSON schema of an object with the outputs."""
        required = [name for name in self.outputs if name not in self.optional]
        return {"type": "object", "properties": self.outputs, "required": required}


class Inputs:
    """The types of a program's inputs.

    Args:
        module: a DSPy module.
        names: of its inputs, in order.
    """

    def __init__(self, module: Any, names: Sequence[str]) -> None:
        found = _fields(module, "input_fields")
        hints = _hints(type(module).forward)
        types = {name: found[name].annotation if name in found else hints.get(name, Any) for name in names}
        self._adapters = {name: _adapter(kind) for name, kind in types.items()}
        self._described = {name: _description(found.get(name)) for name in names}

    @property
    def names(self) -> list[str]:
        return list(self._adapters)

    def schemas(self) -> dict[str, Schema]:
        """JSON schema by input."""
        return {
            name: _schema(adapter, "validation") | self._described[name]
            for name, adapter in self._adapters.items()
        }

    def faults(self, values: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Every input that is missing, unknown or of another type: its name, and what is wrong with it."""
        taken = ", ".join(self._adapters)
        faults = [(name, f"{name} is missing; send it") for name in self._adapters if name not in values]
        faults += [
            (name, f"{name} is no input; send {taken}") for name in values if name not in self._adapters
        ]
        for name, adapter in self._adapters.items():
            if name in values:
                faults += [(name, told) for told in _mistyped(adapter, name, values[name])]
        return faults


def describe(module: Any, inputs: Sequence[str], seen: Sequence[Mapping[str, Any]]) -> Interface:
    """The interface of a loaded program.

    Args:
        module: a DSPy module.
        inputs: names of its inputs.
        seen: outputs that it gave, one mapping a run. What a program returns is decided by its code; these
            tell which of its predictors' fields it does return, and which not always. With none, all may be.
    """
    fields = _fields(module, "output_fields")
    given = {name for outputs in seen for name in outputs}
    names = [name for name in fields if name in given or not seen] + sorted(given - fields.keys())
    return Interface(
        inputs=Inputs(module, inputs).schemas(),
        outputs={name: _output(fields.get(name)) for name in names},
        optional=[name for name in names if not seen or any(name not in outputs for outputs in seen)],
        predictors=[name for name, _ in module.named_predictors()],
    )


def read(path: Path) -> Interface:
    """Read interface.json.

    Raises:
        ReleaseInvalid: it is something else.
    """
    try:
        return Interface.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        fault = f"{path} is no interface that this version reads ({error}); run release again, or roll back"
        raise ReleaseInvalid([fault]) from error


def _fields(module: Any, kind: Literal["input_fields", "output_fields"]) -> dict[str, Any]:
    """By name, over all predictors; of two with the same name the first."""
    found: dict[str, Any] = {}
    for _, predict in module.named_predictors():
        for name, field in getattr(predict.signature, kind).items():
            found.setdefault(name, field)
    return found


def _hints(forward: Callable[..., Any]) -> dict[str, Any]:
    """What the program's own code says of its inputs; annotations that cannot be evaluated say nothing."""
    try:
        return get_type_hints(forward)
    except (NameError, TypeError, AttributeError):
        return {}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Validates the type, or anything where JSON cannot hold it."""
    try:
        return TypeAdapter(kind)
    except PydanticUserError:
        return TypeAdapter(Any)


def _output(field: Any) -> Schema:
    return {} if field is None else _schema(_adapter(field.annotation), "serialization") | _description(field)


def _schema(adapter: TypeAdapter[Any], mode: Mode) -> Schema:
    try:
        schema = adapter.json_schema(mode=mode)
    except PydanticInvalidForJsonSchema:
        return {}
    inlined: Schema = _inlined(schema, schema.get("$defs", {}))
    return inlined


def _inlined(value: Any, definitions: Mapping[str, Any], within: tuple[str, ...] = ()) -> Any:
    """A schema with its references replaced; a type that holds itself ends in one that takes anything."""
    if isinstance(value, list):
        return [_inlined(each, definitions, within) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {
        key: _inlined(each, definitions, within)
        for key, each in value.items()
        if key not in ("$ref", "$defs") and not (key == "discriminator" and "mapping" in each)
    }
    name = str(value.get("$ref", "")).rpartition("/")[2]
    if not name or name in within:
        return kept
    return _inlined(definitions[name], definitions, (*within, name)) | kept


def _description(field: Any) -> Schema:
    """What the signature says of the field; DSPy puts `${name}` where it says nothing."""
    text = (field.json_schema_extra or {}).get("desc") if field is not None else None
    return {"description": text} if text and not text.startswith("${") else {}


def _mistyped(adapter: TypeAdapter[Any], name: str, value: Any) -> list[str]:
    text = json.dumps(value)
    try:
        adapter.validate_json(text, strict=True)
    except ValidationError as error:
        shown = text if len(text) <= 60 else f"{text[:57]}…"
        return [
            f"{'.'.join(str(part) for part in (name, *fault['loc']))}: {fault['msg']} ({name} is {shown})"
            for fault in error.errors(include_url=False, include_context=False, include_input=False)
        ]
    return []
