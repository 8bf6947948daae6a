"""The fields of a program as JSON schemas, and inputs held against them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import dspy
import pytest
from pydantic import BaseModel

from serve import interface
from serve.interface import Inputs, describe
from serve.release import ReleaseInvalid


class Address(BaseModel):
    city: str


class Person(BaseModel):
    name: str
    home: Address
    friends: list[Person] = []


class NoJson:
    """A type that JSON cannot hold."""


class Sort(dspy.Signature):  # type: ignore[misc]
    """Sort it."""

    text: str = dspy.InputField(desc="what was said")
    tags: list[str] = dspy.InputField()
    who: Person = dspy.InputField()
    label: Literal["a", "b"] = dspy.OutputField(desc="one of two")
    counts: dict[str, int] = dspy.OutputField()
    person: Person = dspy.OutputField()


class Check(dspy.Signature):  # type: ignore[misc]
    """Check it."""

    label: str = dspy.InputField()
    right: bool = dspy.OutputField()
    score: float = dspy.OutputField()


class Program(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.sort = dspy.Predict(Sort)
        self.check = dspy.Predict(Check)

    def forward(self, text: str, tags: list[str], limit: int, anything, odd: NoJson):  # type: ignore[no-untyped-def]
        raise NotImplementedError


NAMES = ["text", "tags", "who", "odd", "limit", "anything"]


def test_inputs_have_the_types_of_the_signatures_else_of_forward_else_any() -> None:
    schemas = Inputs(Program(), NAMES).schemas()
    assert schemas["text"] == {"type": "string", "description": "what was said"}
    assert schemas["tags"] == {"type": "array", "items": {"type": "string"}}
    assert schemas["limit"] == {"type": "integer"}
    assert schemas["anything"] == schemas["odd"] == {}


def test_schemas_hold_no_references() -> None:
    made = describe(Program(), NAMES, [])
    assert "$ref" not in made.text()
    assert "$defs" not in made.text()
    person = made.outputs["person"]
    assert person["properties"]["home"]["properties"]["city"]["type"] == "string"
    assert person["properties"]["friends"]["items"] == {}  # it holds itself


def test_outputs_are_those_that_the_program_gave() -> None:
    seen = [{"label": "a", "right": True, "extra": 1}, {"label": "b", "extra": 2}]
    made = describe(Program(), NAMES, seen)
    assert list(made.outputs) == ["label", "right", "extra"]
    assert made.outputs["label"] == {"enum": ["a", "b"], "type": "string", "description": "one of two"}
    assert made.outputs["extra"] == {}
    assert made.optional == ["right"]
    assert made.answer()["required"] == ["label", "extra"]
    assert made.predictors == ["sort", "check"]


def test_outputs_that_nobody_has_seen_may_all_be_absent() -> None:
    made = describe(Program(), NAMES, [])
    assert list(made.outputs) == made.optional == ["label", "counts", "person", "right", "score"]
    assert made.outputs["score"] == {"type": "number"}


def test_the_written_interface_reads_back_equal(tmp_path: Path) -> None:
    made = describe(Program(), NAMES, [])
    (tmp_path / "interface.json").write_text(made.text())
    assert interface.read(tmp_path / "interface.json") == made
    assert made.text() == describe(Program(), NAMES, []).text()
    assert made.request()["required"] == NAMES
    assert made.request()["additionalProperties"] is False


def test_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "interface.json").write_text(json.dumps({"schema": 2}))
    with pytest.raises(ReleaseInvalid, match=r"interface\.json is no interface that this version reads"):
        interface.read(tmp_path / "interface.json")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({}, []),
        ({"tags": "a"}, ["tags: Input should be a valid"]),
        ({"tags": ["a", 1]}, ["tags.1: Input should be a valid string"]),
        ({"limit": True}, ["limit: Input should be a valid integer (limit is true)"]),
        ({"limit": "3", "text": 3}, ["text: Input", "limit: Input"]),
        ({"who": {"name": "Ann"}}, ["who.home: Field required"]),
        ({"more": 1}, ["more is no input; send text, tags, who, odd, limit, anything"]),
        ({"text": "\ud800"}, ["text: Invalid JSON"]),
    ],
)
def test_faults_name_field_and_value(change: dict[str, Any], parts: list[str]) -> None:
    values: dict[str, Any] = {
        "text": "x",
        "tags": [],
        "who": {"name": "Ann", "home": {"city": "Bonn"}},
        "odd": 1,
        "limit": 2,
        "anything": None,
    }
    faults = [told for _, told in Inputs(Program(), NAMES).faults(values | change)]
    assert len(faults) == len(parts)
    assert all(part in told for part, told in zip(parts, faults, strict=True))


def test_missing_inputs_are_all_named() -> None:
    assert [name for name, _ in Inputs(Program(), NAMES).faults({})] == NAMES
