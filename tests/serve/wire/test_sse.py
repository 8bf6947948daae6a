from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.wire.sse import LONGEST, EventTooLong, Parser, dumps, emit

LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)


def parsed(*pieces: bytes) -> list[bytes]:
    parser = Parser()
    return [event for piece in pieces for event in parser.feed(piece)]


@given(st.lists(LINES), st.sampled_from(["\n", "\r\n", "\r"]), st.data())
def test_events_are_the_same_wherever_the_stream_is_cut(
    texts: list[str], end: str, data: st.DataObject
) -> None:
    stream = "".join(f": comment{end}data: {text}{end}{end}" for text in texts).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    places = [0, *cuts, len(stream)]
    pieces = [stream[begin:after] for begin, after in itertools.pairwise(places)]
    # A last lone \r may be half of \r\n, so its event is known to be over when more comes.
    assert parsed(*pieces, b": end\n") == [text.encode() for text in texts]


def test_what_chat_streams_use() -> None:
    assert parsed(emit(b"{}"), b"data:[DONE]\n\n") == [b"{}", b"[DONE]"]
    assert parsed(b"event: x\nid: 1\nretry: 2\ndata: a\ndata: b\n\n") == [b"a\nb"]
    assert parsed(b"data: cut off") == []
    assert parsed(b"\n\n\n: ping\n\n") == []


def test_an_endless_event_is_an_error() -> None:
    parser = Parser()
    with pytest.raises(EventTooLong):
        for _ in range(LONGEST // 2**19 + 1):
            parser.feed(b"data: " + b"x" * 2**19 + b"\n")


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists))
def test_json_comes_back(value: object) -> None:
    assert json.loads(dumps(value)) == value


def test_json_holds_what_utf8_cannot() -> None:
    assert json.loads(dumps({"text": "\ud800"})) == {"text": "\ud800"}
