"""The shapes of requests and answers as JSON schemas, for /openapi.json. They say what `checks` enforces."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from serve.api.checks import FORMATS
from serve.routing.decision import Decision

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
NAME: Schema = {"type": "string", "pattern": "^[!-~]{1,256}$", "description": "A task."}
ANYTHING: Schema = {"type": "object"}
PARTS: Schema = {
    "type": "array",
    "items": {"type": "object", "properties": {"type": TEXT, "text": TEXT}, "required": ["type", "text"]},
}
LARGEST = 2**63 - 1


def ref(name: str) -> Schema:
    """A schema of `components`."""
    return {"$ref": f"#/components/schemas/{name}"}


def several(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def maybe(schema: Schema) -> Schema:
    """The same, or null, which says nothing."""
    return {"anyOf": [schema, {"type": "null"}]}


def thing(properties: Schema, *required: str, **more: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), **more}


def number(low: float, high: float) -> Schema:
    return maybe({"type": "number", "minimum": low, "maximum": high})


def whole(low: int, high: int = LARGEST) -> Schema:
    return maybe({"type": "integer", "minimum": low, "maximum": high})


def components() -> dict[str, Schema]:
    """Every schema that has a name."""
    return {
        **_requests(),
        **_answers(),
        **_ollama(),
        "Error": thing({"error": thing({"message": TEXT, "type": TEXT}, "message")}, "error"),
        "OllamaError": thing({"error": TEXT}, "error"),
        "Decision": TypeAdapter(Decision).json_schema(mode="serialization"),
        "Outcome": thing(
            {
                "route": {"enum": ["local", "teacher", "mixed", None]},
                "guarantee": TEXT,
                "release": TEXT,
                "cost_usd": maybe({"type": "number"}),
                "calls": several(ANYTHING),
            },
            "route",
            "guarantee",
            "release",
        ),
    }


def _requests() -> dict[str, Schema]:
    return {
        "Message": _message(),
        "Tool": thing(
            {
                "type": {"const": "function"},
                "function": thing(
                    {
                        "name": {"type": "string", "minLength": 1},
                        "description": TEXT,
                        "parameters": ANYTHING,
                    },
                    "name",
                ),
            },
            "type",
            "function",
        ),
        "ChatRequest": _chat_request(),
        "CompletionRequest": _completion_request(),
        "EmbeddingRequest": thing(
            {
                "model": NAME,
                "input": {
                    "anyOf": [{"type": "string", "minLength": 1}, several({"type": "string"}, minItems=1)]
                },
                "encoding_format": {"enum": ["float", "base64"]},
                "dimensions": {"type": "integer", "minimum": 1},
            },
            "model",
            "input",
        ),
    }


def _message() -> Schema:
    called = thing({"name": {"type": "string"}, "arguments": TEXT}, "name", "arguments")
    call = thing({"id": TEXT, "type": {"const": "function"}, "function": called}, "id", "type", "function")
    said = {"anyOf": [TEXT, PARTS]}
    return {
        "anyOf": [
            thing(
                {"role": {"enum": ["system", "developer", "user"]}, "content": said, "name": TEXT},
                "role",
                "content",
            ),
            thing({"role": {"const": "tool"}, "content": said, "tool_call_id": TEXT}, "role", "content")
            | {"required": ["role", "content", "tool_call_id"]},
            thing(
                {"role": {"const": "assistant"}, "content": maybe(said), "tool_calls": several(call)}, "role"
            ),
        ]
    }


def _sampling() -> dict[str, Schema]:
    """What a chat and a completion have in common."""
    return {
        "model": NAME,
        "stream": maybe(FLAG),
        "stream_options": maybe(thing({"include_usage": maybe(FLAG)})),
        "max_tokens": whole(1),
        "n": whole(1, 128),
        "seed": whole(-LARGEST),
        "temperature": number(0, 2),
        "top_p": number(0, 1),
        "presence_penalty": number(-2, 2),
        "frequency_penalty": number(-2, 2),
        "stop": maybe({"anyOf": [TEXT, several(TEXT, maxItems=4)]}),
        "logit_bias": maybe({"type": "object", "additionalProperties": {"type": "number"}}),
        "user": maybe(TEXT),
    }


def _chat_request() -> Schema:
    form = thing({"name": TEXT, "schema": ANYTHING}, "name", "schema")
    own = {
        "messages": several(ref("Message"), minItems=1),
        "max_completion_tokens": whole(1),
        "logprobs": maybe(FLAG),
        "top_logprobs": whole(0, 20),
        "tools": maybe(several(ref("Tool"))),
        "tool_choice": maybe({"anyOf": [{"enum": ["none", "auto", "required"]}, ANYTHING]}),
        "response_format": maybe(
            {
                "anyOf": [
                    thing({"type": {"enum": list(FORMATS[:2])}}, "type"),
                    thing({"type": {"const": FORMATS[2]}, "json_schema": form}, "type", "json_schema"),
                ]
            }
        ),
    }
    needs = [
        thing({"logprobs": {"const": True}}, "logprobs"),
        thing({"top_logprobs": {"enum": [None, 0]}}),
    ]
    return thing({**_sampling(), **own}, "model", "messages", anyOf=needs) | {
        "description": "Fields that are not named here are passed on untouched."
    }


def _completion_request() -> Schema:
    own = {
        "prompt": {"anyOf": [TEXT, several(TEXT, minItems=1, maxItems=1)]},
        "logprobs": whole(0, 5),
        "echo": maybe(FLAG),
    }
    needs = [thing({"echo": {"enum": [None, False]}}), thing({"logprobs": {"type": "null"}})]
    return thing({**_sampling(), **own}, "model", "prompt", anyOf=needs)


def _answers() -> dict[str, Schema]:
    counts = {"type": "integer", "minimum": 0}
    usage = {"prompt_tokens": counts, "completion_tokens": counts, "total_tokens": counts}
    known = {"id": maybe(TEXT), "object": TEXT, "created": {"type": "integer"}, "model": TEXT}
    shared = {**known, "usage": maybe(thing(usage)), "homestill": ref("Decision")}
    ended = {"index": {"type": "integer"}, "finish_reason": maybe(TEXT), "logprobs": maybe(ANYTHING)}
    answered = thing({"role": TEXT, "content": maybe(TEXT), "tool_calls": maybe(several(ANYTHING))})
    return {
        "ChatAnswer": thing(
            {**shared, "choices": several(thing({**ended, "message": answered}, "message"))},
            "choices",
            "homestill",
        ),
        "CompletionAnswer": thing(
            {**shared, "choices": several(thing({**ended, "text": TEXT}, "text"))}, "choices", "homestill"
        ),
        "EmbeddingAnswer": thing({"object": TEXT, "data": several(ANYTHING), "model": TEXT}, "data"),
        "Model": thing({"id": TEXT, "object": {"const": "model"}, "homestill": ANYTHING}, "id", "object"),
        "Models": thing({"object": {"const": "list"}, "data": several(ref("Model"))}, "object", "data"),
        "Health": thing({"status": TEXT, "offline": FLAG, "tasks": ANYTHING}, "status", "tasks"),
    }


def _ollama() -> dict[str, Schema]:
    options = thing(
        {
            "num_predict": {"anyOf": [{"type": "integer", "minimum": 1}, {"enum": [-1, -2, None]}]},
            "seed": whole(-LARGEST),
            "temperature": number(0, 2),
            "top_p": number(0, 1),
            "presence_penalty": number(-2, 2),
            "frequency_penalty": number(-2, 2),
            "stop": maybe(several(TEXT, maxItems=4)),
        }
    )
    shared = {
        "model": NAME,
        "stream": maybe(FLAG),
        "options": maybe(options),
        "format": maybe({"anyOf": [{"enum": ["", "json"]}, ANYTHING]}),
        "logprobs": maybe(FLAG),
        "top_logprobs": whole(0, 20),
        "keep_alive": maybe({"anyOf": [{"type": "number"}, TEXT]}),
    }
    message = thing({"role": {"enum": ["system", "user", "assistant"]}, "content": TEXT}, "role", "content")
    done = {"model": TEXT, "created_at": TEXT, "done": FLAG, "done_reason": TEXT, "homestill": ANYTHING}
    details = {"family": TEXT, "quantization_level": TEXT}
    listed = thing({"name": TEXT, "digest": TEXT, "size": {"type": "integer"}, "details": thing(details)})
    return {
        "OllamaChatRequest": thing(
            {**shared, "messages": maybe(several(message)), "tools": maybe(several(ref("Tool")))}, "model"
        ),
        "OllamaChatAnswer": thing({**done, "message": ANYTHING}, "model", "message", "done"),
        "OllamaGenerateRequest": thing({**shared, "prompt": maybe(TEXT), "system": maybe(TEXT)}, "model"),
        "OllamaGenerateAnswer": thing({**done, "response": TEXT}, "model", "response", "done"),
        "OllamaShowRequest": thing({"model": NAME}, "model"),
        "OllamaModels": thing({"models": several(listed)}, "models"),
    }
