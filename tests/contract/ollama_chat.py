"""Inference as the double gives it: /api/chat and /v1/chat/completions over one path."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

from tests.contract.go_template import render
from tests.contract.ollama_engine import Engine, Generated
from tests.contract.ollama_state import CHATML, Faults, Model, Models, Refused

NUMBER, INTEGER = (int, float), (int,)
OPTIONS: dict[str, tuple[str, tuple[type, ...]]] = {
    "temperature": ("float32", NUMBER),
    "top_p": ("float32", NUMBER),
    "min_p": ("float32", NUMBER),
    "repeat_penalty": ("float32", NUMBER),
    "frequency_penalty": ("float32", NUMBER),
    "presence_penalty": ("float32", NUMBER),
    "top_k": ("integer", INTEGER),
    "seed": ("integer", INTEGER),
    "num_predict": ("integer", INTEGER),
    "num_ctx": ("integer", INTEGER),
    "stop": ("array", (list,)),
}
DEFAULTS: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "num_predict": -1, "seed": -1}
FROM_OPENAI = {"max_tokens": "num_predict"} | {
    key: key for key in ("seed", "temperature", "top_p", "frequency_penalty", "presence_penalty")
}
"""All that /v1 honours; max_completion_tokens, n, options and others are silently ignored."""
Answers = Iterator[dict[str, Any] | str]
"""One object for a plain answer; lines for a streamed one."""
TURN = threading.Lock()
"""One request at a time, and the others wait without limit."""


class Server(Protocol):
    """What inference needs of the double."""

    models: Models
    faults: Faults
    engine: Engine
    loaded: dict[str, str]
    loads: list[str]


def native(server: Server, body: dict[str, Any], entry: dict[str, Any]) -> Answers:
    """/api/chat."""
    model = _model(server, body)
    messages = body.get("messages") or []
    unload = _keep_alive(body) == 0
    if not messages:
        _load(server, model, unload)
        yield {
            **_head(model, body),
            **_message(""),
            "done": True,
            "done_reason": "unload" if unload else "load",
        }
        return
    prompt = _prompt(model, messages)
    if body.get("_debug_render_only"):
        yield {**_head(model, body), "_debug_info": {"rendered_template": prompt}}
        return
    options = {**DEFAULTS, **model.parameters, **(body.get("options") or {})}
    done = _generate(server, model, prompt, options, body=body, entry=entry)
    _load(server, model, unload)
    wanted = bool(body.get("logprobs"))
    counts = {"prompt_eval_count": done.prompt_tokens, "eval_count": len(done.tokens)}
    end = {"done": True, "done_reason": done.reason, **counts} if done.reason else {"done": False}
    if body.get("stream", True):
        for token in done.tokens:
            logprobs = {"logprobs": [token]} if wanted else {}
            yield (
                json.dumps({**_head(model, body), **_message(token["token"]), "done": False, **logprobs})
                + "\n"
            )
        yield json.dumps({**_head(model, body), **_message(""), **end}) + "\n"
    else:
        yield {**_head(model, body), **_message(done.text), **end} | (
            {"logprobs": done.tokens} if wanted else {}
        )


def openai(server: Server, body: dict[str, Any], entry: dict[str, Any]) -> Answers:
    """/v1/chat/completions."""
    model = _model(server, body)
    if not body.get("messages"):
        raise Refused(400, "[] is too short - 'messages'")
    prompt = _prompt(model, body["messages"])
    if body.get("_debug_render_only"):
        yield {"_debug_info": {"rendered_template": prompt}}
        return
    asked = {option: body[key] for key, option in FROM_OPENAI.items() if body.get(key) is not None}
    if body.get("stop") is not None:
        asked["stop"] = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
    forced = {"temperature": 1.0, "top_p": 1.0}  # over the model's own parameters
    options = {**DEFAULTS, **model.parameters, **forced, **asked}
    done = _generate(server, model, prompt, options, body=body, entry=entry)
    _load(server, model, unload=False)
    yield from _openai_answer(done, body)


def _openai_answer(done: Generated, body: dict[str, Any]) -> Answers:
    head = {
        "id": "chatcmpl-1",
        "created": int(time.time()),
        "model": body["model"],
        "system_fingerprint": "fp_ollama",
    }
    completion = len(done.tokens) if done.reason else 0
    prompt = done.prompt_tokens if done.reason else 0
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    wanted = bool(body.get("logprobs"))
    if not body.get("stream"):
        message = {"role": "assistant", "content": done.text}
        choice = {"index": 0, "message": message, "finish_reason": done.reason}
        choice |= {"logprobs": {"content": done.tokens}} if wanted else {}
        yield {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
        return
    head["object"] = "chat.completion.chunk"
    for token in done.tokens:
        chunk: dict[str, Any] = {"index": 0, "delta": {"role": "assistant", "content": token["token"]}}
        chunk |= {"finish_reason": None} | ({"logprobs": {"content": [token]}} if wanted else {})
        yield f"data: {json.dumps({**head, 'choices': [chunk]})}\n\n"
    if done.reason is None:
        return  # no finish chunk, no [DONE]
    last = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": done.reason}
    yield f"data: {json.dumps({**head, 'choices': [last]})}\n\n"
    if (body.get("stream_options") or {}).get("include_usage"):
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


def _generate(
    server: Server,
    model: Model,
    prompt: str,
    options: dict[str, Any],
    *,
    body: dict[str, Any],
    entry: dict[str, Any],
) -> Generated:
    top = int(body.get("top_logprobs") or 0)
    if not 0 <= top <= 20:
        raise Refused(400, "top_logprobs must be between 0 and 20")
    if server.faults.strikes("busy"):
        raise Refused(503, "server busy, please try again.  maximum pending requests exceeded")
    for name, value in options.items():
        kind, types = OPTIONS.get(name, ("any", (object,)))
        if not isinstance(value, types) or isinstance(value, bool):
            raise Refused(500, f'option "{name}" must be of type {kind}')
    entry["options"] = options
    with TURN:
        done = server.engine.complete(model.gguf, prompt, options, top, model.adapter)
    if server.faults.strikes("token_repeat"):
        done.reason = None
    return done


def _model(server: Server, body: dict[str, Any]) -> Model:
    name = str(body.get("model") or "")
    if not name:
        raise Refused(400, "model is required")
    if name.endswith((":cloud", "-cloud")):
        raise Refused(403, "remote inference is unavailable")
    return server.models.get(name)


def _prompt(model: Model, messages: list[dict[str, Any]]) -> str:
    if model.template is not None:
        return render(model.template, messages)
    if not model.jinja:
        return render(CHATML, messages)
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(model.jinja)
    return template.render(messages=messages, add_generation_prompt=True, bos_token="")


def _keep_alive(body: dict[str, Any]) -> float | str:
    given = body.get("keep_alive", "5m")
    if isinstance(given, str) and not given.rstrip("hms").replace(".", "").lstrip("-").isdigit():
        raise Refused(400, f'time: invalid duration "{given}"')
    return 0 if given in ("0", "0s", "0m") else given


def _load(server: Server, model: Model, unload: bool) -> None:
    holder = server.loaded.get(str(model.gguf))
    if holder is None or server.models.adapter_of(holder) != model.adapter:  # one runner slot a GGUF file
        server.loaded[str(model.gguf)] = model.name
        server.loads.append(model.name)
    if unload:
        del server.loaded[str(model.gguf)]


def _head(model: Model, body: dict[str, Any]) -> dict[str, Any]:
    return {"model": body["model"], "created_at": model.modified_at}


def _message(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}}
