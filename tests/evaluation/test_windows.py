"""Windows: every target once, half a window of context, and the document's name kept."""

import pytest

from potstill.batch import Example
from potstill.evaluation.windows import Window, windows


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 12, 13, 40, 41])
@pytest.mark.parametrize("max_tokens", [2, 3, 8])
def test_every_target_is_in_exactly_one_window_with_its_context(length, max_tokens):
    # Tokens are their own positions, so a target says where it stands in the text.
    example = Example(list(range(length)), [True] * length, 5, "file:1")
    found = list(windows([example], max_tokens))
    targets, answered = [], 0
    for one in found:
        window = one.example
        # Of one unbroken answer every window goes on where the one before ended.
        assert one.before == answered
        answered += window.num_targets
        assert len(window.tokens) <= max_tokens
        assert (window.index, window.origin) == (5, "file:1")
        assert window.tokens == list(range(window.tokens[0], window.tokens[0] + len(window.tokens)))
        for place, (token, is_target) in enumerate(zip(window.tokens, window.is_target, strict=True)):
            if is_target and place > 0:
                targets.append(token)
                assert place >= min(token, max_tokens // 2)
    assert targets == list(range(1, length))


def test_windows_without_a_target_are_left_out():
    example = Example(list(range(30)), [False] * 28 + [True, True], 0)
    found = list(windows([example], 8))
    assert len(found) == 1
    assert [token for token, target in zip(found[0].example.tokens, found[0].example.is_target, strict=True) if target] == [28, 29]
    assert found[0].before == 0


def test_a_window_knows_how_much_of_its_answer_was_read_before():
    marks = [True] * 3 + [False] * 2 + [True] * 9 + [False] * 4 + [True] * 6
    found = list(windows([Example(list(range(len(marks))), marks, 0)], 8))
    spans = [(one.example.tokens[one.example.is_target.index(True)], one.before) for one in found]
    assert spans == [(0, 0), (8, 3), (12, 7), (18, 0), (20, 2)]


def test_a_short_text_is_left_as_it_is():
    example = Example([1, 2, 3], [False, True, True], 0)
    assert list(windows([example], 3)) == [Window(example)]


def test_a_window_of_one_token_predicts_nothing():
    with pytest.raises(ValueError, match="at least 2"):
        list(windows([Example([1, 2], [True, True], 0)], 1))
