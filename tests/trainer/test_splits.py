"""Splits: nothing is shared, new data moves nobody, the sealed split wins."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import Example, example_id
from trainer.settings import CurateSettings
from trainer.splits import assign


def example(text: str, split: str | None = None) -> Example:
    return Example(example_id({"text": text}, ["text"]), {"text": text}, split)


def shingles(text: str) -> set[str]:
    text = " ".join(text.lower().split())
    return {text[at : at + 4] for at in range(max(1, len(text) - 3))}


@settings(max_examples=50)
@given(st.lists(st.text(alphabet="abcd ", min_size=1, max_size=14), min_size=2, max_size=30))
def test_no_two_survivors_are_near_duplicates(texts: list[str]) -> None:
    result = assign([example(text) for text in texts], ["text"], CurateSettings(near_duplicate=0.6), 0)
    kept = [shingles(str(one.values["text"])) for one in result.examples()]
    for index, one in enumerate(kept):
        for other in kept[index + 1 :]:
            assert len(one & other) / len(one | other) < 0.6
    assert len(kept) + sum(map(len, result.dropped.values())) == len(texts)


def test_more_data_moves_no_example() -> None:
    few = [example(f"text number {number}") for number in range(50)]
    many = few + [example(f"another line {number}") for number in range(50)]
    plain = CurateSettings(near_duplicate=1.0)
    before, after = assign(few, ["text"], plain, 0), assign(many, ["text"], plain, 0)
    for split, examples in before.splits.items():
        assert {one.id for one in examples} <= {one.id for one in after.splits[split]}


def test_a_duplicate_stays_in_the_more_sealed_split() -> None:
    rows = [example("the very same ticket", "train"), example("the very same ticket", "test")]
    near = [example("the very same ticket!", "calibrate")]
    result = assign(rows + near, ["text"], CurateSettings(), 0)
    assert [len(result.splits[name]) for name in ("train", "calibrate", "test")] == [0, 0, 1]
    assert {reason: len(ids) for reason, ids in result.dropped.items()} == {
        "exact duplicate": 1,
        "near-duplicate": 1,
    }
