"""distinct-n with its error by deleting and counting again, self-BLEU and ROUGE-L against the published packages and brute force."""

import gzip
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from potstill.evaluation.diversity import SelfBleu, distinct, distinct_over_set, first_of_each, ngrams, words
from potstill.evaluation.overlap import longest_common_subsequence, rouge_l
from potstill.evaluation.statistics import jackknife, ratio

OUTPUTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "teacher_outputs" / "alpaca_eval_outputs.jsonl.gz"
ODD = ["", " ", "...", "the cat", "The cat!", "a a a a a", "Ünïcödé 漢字", "tab\tand\nline", "under_score x_1", "1,234.5 it's"]


@pytest.fixture(scope="module")
def answers():
    """Real answers of several models to the same prompts."""
    if not OUTPUTS.exists():
        pytest.skip("the real answers are not here")
    with gzip.open(OUTPUTS, "rt", encoding="utf-8") as file:
        rows = [json.loads(line)["outputs"] for _, line in zip(range(25), file, strict=False)]
    return [[str(answer)[:600] for answer in list(row.values())[:4]] for row in rows]


# ---------------------------------------------------------------- distinct-n


def drawn(prompts=12, answers=3, length=9, kinds=25, seed=0):
    generator = np.random.default_rng(seed)
    return [[generator.integers(0, kinds, length).tolist() for _ in range(answers)] for _ in range(prompts)]


@pytest.mark.parametrize("budget", [0, 1, 5, 12, 17, 30])
def test_a_budget_is_spent_whole_and_evenly(budget):
    lengths = [3, 0, 10, 4, 13]
    taken = first_of_each(lengths, budget)
    assert taken is not None
    assert sum(taken) == budget
    assert all(number <= length for number, length in zip(taken, lengths, strict=True))
    not_used_up = [number for number, length in zip(taken, lengths, strict=True) if number < length]
    assert max(not_used_up, default=0) - min(not_used_up, default=0) <= 1
    assert max(taken) <= max(not_used_up, default=max(taken)) + 1
    assert first_of_each(lengths, 31) is None


def test_distinct_over_the_set_is_the_share_that_differs():
    texts = drawn()
    grams = [[ngrams(answer, 2) for answer in of_prompt] for of_prompt in texts]
    whole = sum(len(answer) for of_prompt in grams for answer in of_prompt)
    found = distinct_over_set(grams, whole)
    assert found is not None
    different = len({gram for of_prompt in grams for answer in of_prompt for gram in answer})
    assert found[0].sum() == pytest.approx(different, abs=1e-9)
    assert found[1].sum() == whole
    assert distinct_over_set(grams, whole + 1) is None
    fronts = zip(grams[0], (4, 3, 3), strict=True)
    assert distinct(grams[0], 10) == (len({gram for answer, number in fronts for gram in answer[:number]}), 10)
    assert distinct(grams[0], 25) is None


@pytest.mark.parametrize("budget", [12 * 24, 12 * 12])
def test_its_error_is_that_of_deleting_each_prompt_and_counting_again(budget):
    grams = [[ngrams(answer, 2) for answer in of_prompt] for of_prompt in drawn()]
    found = distinct_over_set(grams, budget)
    assert found is not None
    _, influences = jackknife(ratio(), np.stack(found, axis=1))
    front = budget // 36
    kept = [[gram for answer in of_prompt for gram in answer[:front]] for of_prompt in grams]
    without = [len({gram for other in kept[:place] + kept[place + 1 :] for gram in other}) / (budget * 11 / 12) for place in range(12)]
    assert influences == pytest.approx((np.mean(without) - np.array(without)) * 11 / 12, abs=1e-12)


def test_its_error_is_not_smaller_than_that_of_asking_other_prompts():
    """What other prompts of the same kind would have given, by drawing them: the stated error covers it, and is no wild multiple."""
    values, errors = [], []
    for seed in range(300):
        found = distinct_over_set(drawn(prompts=20, kinds=400, seed=seed), 20 * 27)
        assert found is not None
        value, influences = jackknife(ratio(), np.stack(found, axis=1))
        values.append(value)
        errors.append(np.sqrt(20 / 19 * np.square(influences).sum()))
    assert np.std(values) * 0.95 < np.mean(errors) < np.std(values) * 2


def test_words_are_runs_of_letters_and_marks():
    assert words("It's 5.") == ["it", "'", "s", "5", "."]
    assert words(" \n") == []


# ---------------------------------------------------------------- self-BLEU


def test_self_bleu_is_sacrebleus_against_the_other_answers(answers):
    from sacrebleu import sentence_bleu

    score = SelfBleu("task")
    for of_prompt in answers[:10]:
        theirs = [
            sentence_bleu(answer, [other for at, other in enumerate(of_prompt) if at != place], smooth_method="exp", tokenize="13a",
                          use_effective_order=True).score
            for place, answer in enumerate(of_prompt)
        ]  # fmt: skip
        assert score.scores(of_prompt) == pytest.approx(theirs, abs=1e-9)


def test_equal_answers_have_a_self_bleu_of_100_and_strange_ones_of_0():
    score = SelfBleu("task")
    assert score.scores(["the cat sat"] * 3) == pytest.approx([100] * 3)
    assert score.scores(["one two", "three four"]) == pytest.approx([0, 0])
    assert score.scores(["", ""]) == [0, 0]
    assert all(0 <= one <= 100.0001 for one in score.scores(ODD))
    assert "13a" in score.stated


# ---------------------------------------------------------------- ROUGE-L


def test_the_stated_fixture():
    assert rouge_l("the cat sat on the mat", ["the cat lay on the mat"]) == pytest.approx(5 / 6, abs=1e-12)


def test_the_common_subsequence_equals_brute_force():
    generator = np.random.default_rng(0)
    for _ in range(100):
        first, second = (generator.integers(0, 3, generator.integers(0, 8)).tolist() for _ in range(2))
        of_second = {
            tuple(second[place] for place in places) for n in range(len(second) + 1) for places in combinations(range(len(second)), n)
        }
        longest = max(
            len(places) for n in range(len(first) + 1) for places in combinations(range(len(first)), n)
            if tuple(first[place] for place in places) in of_second
        )  # fmt: skip
        assert longest_common_subsequence(first, second) == longest


def test_rouge_l_is_the_packages_on_real_answers(answers):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    compared = 0
    for of_prompt in [*answers, [text for text in ODD if text.isascii()]]:
        for answer in of_prompt[:2]:
            references = of_prompt[2:]
            if all(text.isascii() for text in [answer, *references]):
                theirs = scorer.score_multi(references, answer)["rougeL"].fmeasure
                assert rouge_l(answer, references) == pytest.approx(theirs, abs=1e-12)
                compared += 1
    assert compared > 15


def test_the_best_reference_counts_and_letters_of_other_scripts_do():
    assert rouge_l("a b", ["x y", "a b"]) == 1
    assert rouge_l("漢字 b", ["漢字 b"]) == 1
    assert rouge_l("a", []) == rouge_l("", ["a"]) == rouge_l("a", ["..."]) == 0
