"""Answers side by side: every word of a text is there once, those that the first student lacks are marked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reported
from potstill.reporting.answers import MOST_CHARACTERS, _parts, side_by_side
from potstill.reporting.records import normalise


def read(**changes):
    return normalise(reported.evaluation() | changes)[0]


@given(before=st.text(alphabet="ab .\n<é", max_size=40), text=st.text(alphabet="ab .\n<é", max_size=40))
def test_the_parts_are_the_text_and_what_is_not_marked_stands_in_the_other(before, text):
    parts = _parts(before, text)
    assert "".join(part for part, _ in parts) == text
    kept = "".join(part for part, is_new in parts if not is_new)
    rest = iter(before)
    assert all(sign in rest for sign in kept)       # a subsequence
    assert (before == text) <= (not any(is_new for _, is_new in parts))


@pytest.mark.parametrize(
    ("before", "text", "marked"),
    [("the cat sat", "the dog sat", ["dog"]), ("5 apples", "5 apples.", ["."]), ("a b", "a b", []), ("", "new", ["new"])],
)
def test_words_that_the_first_student_lacks_are_marked(before, text, marked):
    assert [part for part, is_new in _parts(before, text) if is_new] == marked


def test_long_texts_are_compared_as_a_whole():
    before, text = "a " * 2000, "b " * 2000
    assert _parts(before, text) == ((text, True),)


def test_each_item_shows_prompt_reference_and_every_answer_beside_the_baseline():
    (task,) = side_by_side([read()])
    assert (task.title, task.compared_with, task.left_out, len(task.entries)) == ("arithmetic", "SFT", 0, 12)
    entry = task.entries[0]
    assert [(answer.model, answer.is_teacher, answer.is_reference, answer.right) for answer in entry.answers] == [
        ("teacher", True, False, False), ("SFT", False, True, True), ("KD 0.5", False, False, True), ("KD 1", False, False, False),
    ]  # fmt: skip
    assert (entry.reference, entry.differ, entry.divided) == ("1", True, True)
    assert [part for part, is_new in entry.answers[3].parts if is_new] == ["2"]
    assert not any(is_new for _, is_new in entry.answers[1].parts)


def test_whether_answers_differ_or_are_divided_is_known():
    samples = read()["samples"][:1]
    for answer in samples[0]["answers"]:
        answer |= {"text": " same ", "right": True}
    samples[0]["answers"][0]["text"] = "same"
    (entry,) = side_by_side([read(samples=samples)])[0].entries
    assert (entry.differ, entry.divided) == (False, False)


def test_without_students_or_baseline_nothing_is_compared_with_what_is_not_there():
    samples = read()["samples"][:1]
    samples[0]["answers"] = samples[0]["answers"][:1]
    (task,) = side_by_side([read(samples=samples, baseline="nobody")])
    assert task.compared_with is None
    assert not any(is_new for answer in task.entries[0].answers for _, is_new in answer.parts)


def test_long_answers_and_long_lists_are_cut_and_counted():
    record = read(samples=[{**sample, "prompt": "p" * 9000} for sample in read()["samples"]])
    (task,) = side_by_side([record], all_characters=30_000)
    assert 1 <= len(task.entries) < 12
    assert task.left_out == 12 - len(task.entries)
    assert (len(task.entries[0].prompt), task.entries[0].prompt_cut) == (MOST_CHARACTERS, 9000 - MOST_CHARACTERS)
