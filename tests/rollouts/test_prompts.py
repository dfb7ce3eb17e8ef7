"""What is answered: the part of a row before its last answer, what becomes of one that is too long, and the ends of written answers."""

import numpy as np
import pytest

from potstill.batch import Example
from potstill.data.examples import ExampleSetBuilder
from potstill.errors import ConfigError, DataError
from potstill.rollouts.endings import Endings
from potstill.rollouts.prompts import Prompts
from potstill.rollouts.writing import Completion


def row(marks: str, index: int = 0, **more) -> Example:
    """One token a letter, numbered from 10; "x" is a target."""
    return Example([10 + place for place in range(len(marks))], [mark == "x" for mark in marks], index, f"rows.jsonl:{index + 1}", **more)


def prompts(*rows: Example, room: int = 100, **more) -> Prompts:
    return Prompts(list(rows), max_tokens=room + 8, max_new_tokens=8, **more)


@pytest.mark.parametrize(
    ("marks", "prompt", "reference"),
    [("...xx", 3, 2), (".xx.xx", 4, 2), (".xx..xxx.", 5, 3), ("....", 4, 0), (".x", 1, 1), ("..x.", 2, 1), (".x.x.x", 5, 1)],
)
def test_a_prompt_ends_where_the_last_answer_begins(marks, prompt, reference):
    found = prompts(row(marks))[0]
    assert found.tokens == tuple(range(10, 10 + prompt))
    assert found.reference == tuple(range(10 + prompt, 10 + prompt + reference))


def test_what_belongs_to_a_row_comes_with_its_prompt():
    found = prompts(row(".x"), row("..xx", 1, route="mathematics"))[1]
    assert (found.origin, found.index, found.route, found.teacher_tokens) == ("rows.jsonl:2", 1, "mathematics", None)


@pytest.mark.parametrize("marks", ["xxx", "x.."])
def test_a_row_without_a_prompt_is_named(marks):
    with pytest.raises(DataError, match=r"rows\.jsonl:2: an answer, and nothing before it.*rollouts\.prompt_tokens"):
        prompts(row(".x"), row(marks, 1))


def test_the_first_tokens_of_plain_text_are_its_prompt():
    found = prompts(row("xxxxxx"), row("xx", 1), prompt_tokens=4)
    assert [found[place].tokens for place in range(2)] == [(10, 11, 12, 13), (10,)]
    assert [len(found[place].reference) for place in range(2)] == [2, 1]


@pytest.mark.parametrize(("length", "long"), [(4, False), (5, False), (6, True)])
def test_a_prompt_is_too_long_where_it_leaves_no_room_for_the_answer(length, long):
    rows = [row("..x"), row("." * length + "x", 1), row(".x", 2)]
    dropped, cut = (prompts(*rows, room=5, too_long=policy) for policy in ("drop", "truncate_left"))
    assert (dropped.counts.rows, dropped.counts.dropped, dropped.counts.longest) == (3, int(long), length)
    assert [example.index for example in dropped.examples] == ([0, 2] if long else [0, 1, 2])
    assert [dropped[place].index for place in range(len(dropped))] == [example.index for example in dropped.examples]
    assert cut.counts.truncated == int(long)
    assert cut[1].tokens == tuple(range(10 + int(long), 10 + length))
    assert cut[1].reference == (10 + length,)
    if long:
        with pytest.raises(DataError, match=r"rows\.jsonl:2.*6 tokens.*data\.max_tokens \(13\), as in 1 of 3.*prompt_too_long"):
            prompts(*rows, room=5)
    else:
        assert len(prompts(*rows, room=5)) == 3


def test_room_for_no_prompt_at_all():
    with pytest.raises(ConfigError, match=r"rollouts\.sampling\.max_new_tokens.*data\.max_tokens \(8\)"):
        prompts(row(".x"), room=0)
    with pytest.raises(DataError, match="drops all of them"):
        prompts(row("...x"), room=2, too_long="drop")


def test_the_teachers_prompt_stands_before_what_both_have_read():
    """It takes the place of the first tokens; of a longer prompt the rest follows."""
    found = prompts(row("......xx", teacher_prompt=[90, 91], prompt_length=4))[0]
    assert (found.tokens, found.teacher_tokens) == ((10, 11, 12, 13, 14, 15), (90, 91, 14, 15))


@pytest.mark.parametrize(("seen", "long"), [(4, False), (5, False), (6, True)])
def test_what_the_teacher_reads_must_leave_room_for_the_answer_too(seen, long):
    """The same answer stands behind both prompts, so that the longer one decides."""
    rows = [row(".x"), row("..xx", 1, teacher_prompt=list(range(90, 90 + seen)), prompt_length=2)]
    dropped, cut = (prompts(*rows, room=5, too_long=policy) for policy in ("drop", "truncate_left"))
    assert (dropped.counts.dropped, dropped.counts.longest, cut.counts.truncated) == (int(long), seen, int(long))
    assert [example.index for example in dropped.examples] == ([0] if long else [0, 1])
    assert (cut[1].tokens, cut[1].teacher_tokens) == ((10, 11), tuple(range(90 + int(long), 90 + seen)))
    if long:
        with pytest.raises(DataError, match=r"rows\.jsonl:2: what the teacher reads.*\(data\.teacher_prompt\), 6 tokens.*prompt_too_long"):
            prompts(*rows, room=5)
    else:
        assert len(prompts(*rows, room=5)) == 2


@pytest.mark.parametrize(
    ("bos", "tokens", "teacher"),
    [(10, (10, 14, 15), (91, 92, 93)), (None, (13, 14, 15), (91, 92, 93)), (90, (13, 14, 15), (90, 92, 93))],
)
def test_a_cut_on_the_left_keeps_the_token_that_begins_a_text(bos, tokens, teacher):
    example = row("......xx", teacher_prompt=[90, 91, 92, 93], prompt_length=6)
    cut = prompts(example, room=3, too_long="truncate_left", bos=bos)[0]
    assert (cut.tokens, cut.teacher_tokens) == (tokens, teacher)


def test_a_set_of_flat_arrays_gives_the_same_prompts_and_is_numbered_anew_where_rows_are_dropped():
    builder = ExampleSetBuilder(np.ones(100, np.int64))
    for number, length in enumerate((3, 9, 4)):
        builder.add(list(range(10, 12 + length)), [(length, length + 2)], "rows.jsonl", number + 1)
    found = Prompts(builder.build(), max_tokens=10, max_new_tokens=4, too_long="drop")
    assert [(found[place].index, found[place].origin, len(found[place].tokens)) for place in range(len(found))] == [
        (0, "rows.jsonl:1", 3), (1, "rows.jsonl:3", 4),
    ]  # fmt: skip


# ---------------------------------------------------------------- ends


def completion(*tokens: int, ended: bool) -> Completion:
    return Completion(tokens, tuple(-1.0 for _ in tokens), ended)


def test_an_end_is_a_target_and_a_cut_answer_has_none_that_it_did_not_write():
    ends = Endings([2, 3])
    assert ends.marks(completion(5, 6, 2, ended=True)) == [True, True, True]
    assert ends.marks(completion(3, ended=True)) == [True]
    assert ends.marks(completion(5, 6, ended=False)) == [True, True]
    assert ends.marks(completion(ended=False)) == []
    assert Endings([2], cut_answers="drop").marks(completion(5, 6, ended=False)) == [False, False]
    assert Endings([2], cut_answers="drop").marks(completion(5, 2, ended=True)) == [True, True]


def test_an_end_that_the_other_model_does_not_know():
    ours, theirs = completion(5, 2, ended=True), completion(5, 3, ended=True)
    for policy, last in (("mask", False), ("keep", True)):
        ends = Endings([2, 3], frozenset([3]), policy)
        assert ends.marks(theirs) == [True, last]
        assert ends.marks(ours) == [True, True]
        assert (ends.is_foreign(theirs), ends.is_foreign(ours), ends.is_foreign(completion(3, ended=False))) == (True, False, False)
    with pytest.raises(ConfigError, match=r"rollouts\.foreign_end.*\[3\].*mask.*keep"):
        Endings([2, 3], frozenset([3]))
    Endings([2])
