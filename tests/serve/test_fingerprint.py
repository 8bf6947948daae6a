"""Recognising a predictor's prompt by its fixed parts."""

from __future__ import annotations

from serve.fingerprint import fingerprint, fixed_parts, query

SYSTEM = {"role": "system", "content": "Your input fields are: text"}
END = "\n\nRespond with the corresponding output fields, starting with the field `[[ ## label ## ]]`."


def last(text: str) -> str:
    return f"[[ ## text ## ]]\n{text}{END}"


def test_only_the_last_message_may_differ() -> None:
    one = [SYSTEM, {"role": "user", "content": last("a")}]
    other = [SYSTEM, {"role": "user", "content": last("b")}]
    assert fingerprint(one) == fingerprint(other) and len(fingerprint(one)) == 64
    assert fingerprint([{**SYSTEM, "content": f" {SYSTEM['content']}\n"}, one[1]]) == fingerprint(one)
    assert fingerprint([{**SYSTEM, "name": None}, one[1]]) == fingerprint(one)
    for changed in ({**SYSTEM, "content": "other"}, {**SYSTEM, "role": "user"}, {**SYSTEM, "name": "x"}):
        assert fingerprint([changed, one[1]]) != fingerprint(one)
    assert fingerprint([SYSTEM, *one]) != fingerprint(one)
    assert fingerprint([]) == fingerprint([{"role": "user", "content": "x"}])


def test_what_the_inputs_share_by_chance_is_not_fixed() -> None:
    contents = [last("Dear team, the line is down.\n\nBest"), last("Dear team, my bill is wrong.\n\nBest")]
    prefix, suffix = fixed_parts(contents)
    assert (prefix, suffix) == ("[[ ## text ## ]]\n", END)
    assert query(last("Hello"), prefix, suffix) == "Hello"
    assert query(last(""), prefix, suffix) == ""


def test_a_single_conversation_gives_the_same_parts() -> None:
    assert fixed_parts([last("only one")]) == ("[[ ## text ## ]]\n", END)


def test_several_inputs_keep_their_markers_in_the_query() -> None:
    contents = [f"[[ ## a ## ]]\n{a}\n\n[[ ## b ## ]]\n{b}{END}" for a, b in (("x", "1"), ("y", "2"))]
    prefix, suffix = fixed_parts(contents)
    assert query(contents[0], prefix, suffix) == "x\n\n[[ ## b ## ]]\n1"


def test_another_prompt_is_not_matched() -> None:
    prefix, suffix = fixed_parts([last("a"), last("b")])
    assert query("[[ ## text ## ]]\na", prefix, suffix) is None
    assert query("What is the capital of France?", prefix, suffix) is None
    assert query(prefix.strip(), prefix, suffix) is None


def test_prompts_without_markers() -> None:
    assert fixed_parts(["a b", "a c"]) == ("", "")
    assert fixed_parts([]) == ("", "")
    assert fixed_parts(["Classify:\n\nx", "Classify:\n\ny"]) == ("Classify:\n\n", "")
