"""The part of Go's text/template that chat templates use: range, if, variables, eq and its kin."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

ACTION = re.compile(r"\{\{(-\s)?(.*?)(\s-)?\}\}", re.DOTALL)
TOKEN = re.compile(r'\s*("(?:\\.|[^"\\])*"|`[^`]*`|\$?[\w.]+|\$|\)(?:\.\w+)*|[(,|]|:=|=)')


class TemplateError(Exception):
    """The template is wrong, or uses what this renderer does not know."""


@dataclass
class Block:
    """Text, or an action with the nodes inside it."""

    kind: str
    expression: str = ""
    text: str = ""
    nodes: list[Block] = field(default_factory=list)
    otherwise: list[Block] = field(default_factory=list)


def render(template: str, messages: Sequence[dict[str, Any]]) -> str:
    """The prompt that Ollama makes of messages: same-role neighbours are merged first.

    Raises:
        TemplateError: the template is wrong.
    """
    merged: list[dict[str, str]] = []
    for message in messages:
        if merged and merged[-1]["Role"] == message["role"]:
            merged[-1]["Content"] += "\n\n" + str(message["content"])
        else:
            merged.append({"Role": str(message["role"]), "Content": str(message["content"])})
    system = "\n\n".join(str(m["content"]) for m in messages if m["role"] == "system")
    root = {"Messages": merged, "System": system, "Response": "", "Prompt": "", "Tools": [], "Suffix": ""}
    if ".Messages" not in template:
        last = {m["Role"]: m["Content"] for m in merged}
        root |= {"Prompt": last.get("user", "")}
    return "".join(_run(parse(template), root, {"$": root}))


def parse(template: str) -> list[Block]:
    """The template's nodes.

    Raises:
        TemplateError: an action is unknown, or a block is not closed.
    """
    root = Block("root")
    stack: list[tuple[Block, list[Block]]] = [(root, root.nodes)]
    for kind, content in _lex(template):
        if kind == "text":
            stack[-1][1].append(Block("text", text=content))
            continue
        word, _, rest = content.partition(" ")
        if word in ("if", "range"):
            block = Block(word, rest)
            stack[-1][1].append(block)
            stack.append((block, block.nodes))
        elif word == "else" and len(stack) > 1:
            block = stack[-1][0]
            stack[-1] = (block, block.otherwise)
            if rest.strip():
                nested = Block("if", rest.strip().removeprefix("if "))
                block.otherwise.append(nested)
                stack[-1] = (nested, nested.nodes)
        elif word == "end" and len(stack) > 1:
            stack.pop()
        elif word in ("end", "else", "define", "template", "with", "block"):
            raise TemplateError(f"unexpected {{{{{word}}}}}")
        else:
            stack[-1][1].append(Block("value", content))
    if len(stack) > 1:
        raise TemplateError(f"unexpected EOF, {stack[-1][0].kind} is not closed")
    return root.nodes


def _lex(template: str) -> list[tuple[str, str]]:
    pieces: list[tuple[str, str]] = []
    at, trim = 0, False
    for action in ACTION.finditer(template):
        text = template[at : action.start()]
        text = text.lstrip() if trim else text
        pieces.append(("text", text.rstrip() if action[1] else text))
        if not action[2].strip().startswith("/*"):
            pieces.append(("action", action[2].strip()))
        at, trim = action.end(), bool(action[3])
    rest = template[at:]
    if "{{" in rest:
        raise TemplateError("unclosed action")
    pieces.append(("text", rest.lstrip() if trim else rest))
    return pieces


def _run(nodes: list[Block], dot: Any, variables: dict[str, Any]) -> list[str]:
    out: list[str] = []
    for node in nodes:
        if node.kind == "text":
            out.append(node.text)
        elif node.kind == "if":
            branch = node.nodes if _truth(_assigned(node.expression, dot, variables)) else node.otherwise
            out += _run(branch, dot, variables)
        elif node.kind == "range":
            out += _range(node, dot, variables)
        else:
            value = _assigned(node.expression, dot, variables)
            shown = not re.match(r"\$\w+\s*:?=", node.expression)
            out.append(str(value if value is not None else "") if shown else "")
    return out


def _range(node: Block, dot: Any, variables: dict[str, Any]) -> list[str]:
    names, _, expression = node.expression.rpartition(":=")
    keys = [name.strip() for name in names.split(",")] if names else []
    items = _evaluate(expression, dot, variables)
    out: list[str] = []
    for index, item in enumerate(items):
        inner = variables | dict(zip(keys[-2:], (index, item) if len(keys) == 2 else (item,), strict=False))
        out += _run(node.nodes, item, inner)
    return out if items else _run(node.otherwise, dot, variables)


def _assigned(expression: str, dot: Any, variables: dict[str, Any]) -> Any:
    match = re.match(r"(\$\w+)\s*:?=\s*(.*)", expression, re.DOTALL)
    if not match:
        return _evaluate(expression, dot, variables)
    variables[match[1]] = _evaluate(match[2], dot, variables)
    return variables[match[1]]


def _evaluate(expression: str, dot: Any, variables: dict[str, Any]) -> Any:
    tokens: list[str] = []
    at = 0
    expression = expression.strip()
    while at < len(expression):
        match = TOKEN.match(expression, at)
        if not match:
            raise TemplateError(f"unexpected {expression[at:]!r}")
        tokens.append(match[1])
        at = match.end()
    values = _call(tokens, dot, variables)
    if tokens:
        raise TemplateError(f"unexpected {tokens[0]!r} in {expression!r}")
    return values


def _call(tokens: list[str], dot: Any, variables: dict[str, Any]) -> Any:
    """One operand, or a function with its arguments, up to a closing parenthesis or the end."""
    head = tokens.pop(0) if tokens else ""
    if head in FUNCTIONS:
        arguments = []
        while tokens and not tokens[0].startswith(")"):
            arguments.append(_operand(tokens.pop(0), tokens, dot, variables))
        return FUNCTIONS[head](*arguments)
    return _operand(head, tokens, dot, variables)


def _operand(token: str, tokens: list[str], dot: Any, variables: dict[str, Any]) -> Any:
    if token == "(":
        value = _call(tokens, dot, variables)
        if not tokens or not tokens[0].startswith(")"):
            raise TemplateError("missing )")
        return _field(value, tokens.pop(0)[1:].split("."))
    if token.startswith('"'):
        return json.loads(token)
    if token.startswith("`"):
        return token[1:-1]
    if re.fullmatch(r"-?\d+", token):
        return int(token)
    if token in ("true", "false"):
        return token == "true"
    if token.startswith((".", "$")):
        name, *path = token.split(".")
        if name and name not in variables:
            raise TemplateError(f"undefined variable {name!r}")
        return _field(variables[name] if name else dot, path)
    raise TemplateError(f"function {token!r} not defined")


def _field(value: Any, path: list[str]) -> Any:
    for part in filter(None, path):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _truth(value: Any) -> bool:
    return bool(value)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda first, second: first != second,
    "gt": lambda first, second: first > second,
    "lt": lambda first, second: first < second,
    "not": lambda value: not _truth(value),
    "and": lambda *values: next((value for value in values if not _truth(value)), values[-1]),
    "or": lambda *values: next((value for value in values if _truth(value)), values[-1]),
    "len": len,
    "index": lambda values, at: values[at],
    "slice": lambda values, start=0, end=None: values[start:end],
    "json": json.dumps,
}
