"""Agreement measured in chunks through the heads, against a float64 reference in probability space from whole logits."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from potstill.batch import Batch, Example
from potstill.data.collation import collate
from potstill.errors import DataError, NonFiniteError
from potstill.evaluation.agreement import calibration_bin, expected_calibration_error, measure, measure_documents, measure_rows
from potstill.evaluation.metrics import (
    COLUMN,
    FORWARD_KL_ROWS,
    METRICS,
    expected_tokens_per_round,
)
from potstill.evaluation.row_quantiles import EDGES
from potstill.evaluation.scores import compare_scores, estimate_over_seeds
from potstill.models.causal_lm import CausalLM
from tiny import tiny_llama, tiny_tokenizer

VOCABULARY = 320


def sharp(seed: int, scale: float = 12.0, **changes) -> CausalLM:
    """A tiny model whose head is scaled up, so that its distributions are far from uniform and far from one another."""
    model = tiny_llama(seed, **changes)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return CausalLM(model, VOCABULARY)


@pytest.fixture(scope="module")
def models():
    """A student, and a teacher that agrees with it now and then: the same weights, disturbed."""
    teacher = sharp(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight += 0.4 * weight.std(unbiased=False) * torch.randn(weight.shape, generator=generator)
    return sharp(0), teacher


@pytest.fixture(scope="module")
def examples():
    generator = np.random.default_rng(0)
    made = []
    for index, length in enumerate((23, 9, 31, 14, 6, 18)):
        is_target = generator.random(length) < 0.6
        is_target[-1] = True
        made.append(Example(generator.integers(3, VOCABULARY, length).tolist(), is_target.tolist(), 10 + index))
    return made


def batches(examples, size=2):
    return [collate([[example] for example in examples[start : start + size]], pad_token=0) for start in range(0, len(examples), size)]


def reference(student, teacher, examples, tokenizer=None):
    """Every metric from its definition: one document at a time, float64 probabilities, no chunk, no mask, no shared code."""
    rows = []
    for example in examples:
        tokens = torch.tensor([example.tokens])
        probabilities = [
            torch.softmax(model.model(input_ids=tokens).logits[0].double(), dim=-1).detach().numpy() for model in (student, teacher)
        ]
        for position, target in enumerate(example.is_target[1:]):
            if target:
                rows.append((probabilities[0][position], probabilities[1][position], example.tokens[position + 1]))
    student_rows, teacher_rows = (np.stack([row[side] for row in rows]) for side in (0, 1))
    targets = np.array([row[2] for row in rows])
    mixture = (student_rows + teacher_rows) / 2
    mean = lambda values: float(np.mean(values))  # noqa: E731
    kl = lambda one, other: (one * np.log(one / other)).sum(axis=1)  # noqa: E731
    nats = -np.log(student_rows[np.arange(len(targets)), targets])
    teacher_nats = -np.log(teacher_rows[np.arange(len(targets)), targets])
    one_hot = np.eye(student_rows.shape[1])[targets]
    confidence, correct = student_rows.max(axis=1), student_rows.argmax(axis=1) == targets
    error = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    entropies = [-(rows * np.log(rows)).sum(axis=1) for rows in (student_rows, teacher_rows)]
    found = {
        "cross_entropy": mean(nats), "perplexity": math.exp(mean(nats)), "teacher_perplexity": math.exp(mean(teacher_nats)),
        "top1_agreement": mean(student_rows.argmax(axis=1) == teacher_rows.argmax(axis=1)),
        "overlap_at_5": mean([len(set(one) & set(other)) / 5 for one, other in zip(
            np.argsort(-student_rows)[:, :5].tolist(), np.argsort(-teacher_rows)[:, :5].tolist(), strict=True)]),
        "teacher_top1_rank": mean([row.tolist().index(first) + 1 for row, first in zip(
            np.argsort(-student_rows), teacher_rows.argmax(axis=1), strict=True)]),
        "forward_kl_median": np.median(kl(teacher_rows, student_rows)),
        "forward_kl_p99": np.quantile(kl(teacher_rows, student_rows), 0.99, method="inverted_cdf"),
        "forward_kl": mean(kl(teacher_rows, student_rows)), "reverse_kl": mean(kl(student_rows, teacher_rows)),
        "jsd": mean((kl(teacher_rows, mixture) + kl(student_rows, mixture)) / 2),
        "total_variation": mean(np.abs(student_rows - teacher_rows).sum(axis=1) / 2),
        "acceptance_rate": mean(np.minimum(student_rows, teacher_rows).sum(axis=1)),
        "expected_calibration_error": error, "brier_score": mean(np.square(student_rows - one_hot).sum(axis=1)),
        "entropy": mean(entropies[0]), "entropy_gap": mean(entropies[0]) - mean(entropies[1]),
    }  # fmt: skip
    if tokenizer is not None:
        num_bytes = sum(
            len(tokenizer.convert_ids_to_tokens(token))
            for example in examples for token, target in zip(example.tokens[1:], example.is_target[1:], strict=True)
            if target and token > 2
        )  # fmt: skip
        found["bits_per_byte"] = nats.sum() / math.log(2) / num_bytes
        found["teacher_bits_per_byte"] = teacher_nats.sum() / math.log(2) / num_bytes
    return found


def test_every_metric_equals_its_definition(models, examples):
    tokenizer = tiny_tokenizer()
    found = measure(models[0], batches(examples), models[1], tokenizer=tokenizer)
    expected = reference(*models, examples, tokenizer)
    assert found.keys() == expected.keys() == METRICS.keys()
    assert 0.1 < expected["top1_agreement"] < 0.9
    assert expected["forward_kl"] > 0.1
    assert 0.2 < expected["overlap_at_5"] < 0.9
    assert expected["teacher_top1_rank"] > 1.5
    for name, value in expected.items():
        # Quantiles are read off bins whose edges are a factor of 10 ** (1 / 12) apart.
        rel = 10 ** (1 / 12) - 1 if name in ("forward_kl_median", "forward_kl_p99") else 2e-5
        assert found[name].value == pytest.approx(value, rel=rel, abs=2e-6), name
        assert found[name].standard_error > 0, name
    num_targets = sum(example.num_targets for example in examples)
    assert found["forward_kl"].count == num_targets
    assert found["forward_kl"].num_clusters == len(examples)
    assert found["bits_per_byte"].count != num_targets


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
def test_chunks_change_nothing(models, examples, chunk_rows):
    whole = measure_documents(models[0], batches(examples), models[1])
    found = measure_documents(models[0], batches(examples), models[1], chunk_rows=chunk_rows)
    np.testing.assert_allclose(found.totals, whole.totals, rtol=1e-6, atol=1e-6)


def test_packing_padding_and_batching_change_nothing(models, examples):
    apart = measure_documents(models[0], batches(examples, size=1), models[1])
    packed = collate([[examples[4], examples[0], examples[1]], [examples[3], examples[2]], [examples[5]]], pad_token=7)
    together = measure_documents(models[0], [packed], models[1])
    assert together.items == apart.items == ("10", "11", "12", "13", "14", "15")
    np.testing.assert_allclose(together.totals, apart.totals, rtol=1e-4, atol=1e-4)


class WidestRows(TorchDispatchMode):
    """The largest number of rows of any vocabulary-wide tensor that is made, views of the heads themselves left out."""

    def __init__(self, heads):
        super().__init__()
        self.rows, self.heads = 0, {head.weight.untyped_storage().data_ptr() for head in heads}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_wide = isinstance(result, torch.Tensor) and result.shape[-1:] == (VOCABULARY,)
        if is_wide and result.untyped_storage().data_ptr() not in self.heads:
            self.rows = max(self.rows, result.numel() // VOCABULARY)
        return result


def test_no_logits_of_a_whole_batch_exist(models, examples):
    with WidestRows([model.head() for model in models]) as widest:
        measure_documents(models[0], batches(examples), models[1], chunk_rows=4)
    assert widest.rows == 4


def test_a_model_agrees_with_itself(models, examples):
    found = measure(models[0], batches(examples), models[0])
    for name in ("forward_kl", "reverse_kl", "jsd", "total_variation", "entropy_gap"):
        assert found[name].value == pytest.approx(0, abs=1e-7), name
    assert found["top1_agreement"].value == 1
    assert found["acceptance_rate"].value == pytest.approx(1, abs=1e-7)
    assert found["teacher_perplexity"].value == found["perplexity"].value


def test_without_a_teacher_or_a_tokenizer_only_their_metrics_are_missing(models, examples):
    found = measure(models[0], batches(examples))
    assert set(found) == {"cross_entropy", "perplexity", "expected_calibration_error", "brier_score", "entropy"}
    assert found["perplexity"] == measure(models[0], batches(examples), models[1])["perplexity"]


@pytest.mark.parametrize("padded", ["student", "teacher", "both"])
def test_rows_beyond_the_tokenizer_have_no_mass(models, examples, padded):
    def widened(model):
        wide = tiny_llama(0, vocabulary_size=VOCABULARY + 64)
        state = {name: value.clone() for name, value in model.model.state_dict().items()}
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            # Logits of these rows would swamp every real one.
            state[name] = torch.cat([state[name], torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 50])
        wide.load_state_dict(state)
        return CausalLM(wide, VOCABULARY)

    student, teacher = models
    student = widened(student) if padded in ("student", "both") else student
    teacher = widened(teacher) if padded in ("teacher", "both") else teacher
    expected = measure_documents(*_first(models, examples))
    found = measure_documents(student, batches(examples), teacher)
    np.testing.assert_allclose(found.totals, expected.totals, rtol=1e-6, atol=1e-6)


def _first(models, examples):
    return models[0], batches(examples), models[1]


def test_the_vocabulary_of_both_is_the_smaller_of_the_two(models, examples):
    shorter = [Example([min(token, 299) for token in one.tokens], one.is_target, one.index) for one in examples]
    narrow = CausalLM(models[0].model, 300)
    found = measure(narrow, batches(shorter), models[1])
    expected = measure(narrow, batches(shorter), CausalLM(models[1].model, 300))
    assert found["entropy_gap"].value == pytest.approx(expected["entropy_gap"].value)


def test_several_windows_of_one_document_are_one_cluster(models, examples):
    twice = [Example(example.tokens, example.is_target, 10 + number % 3) for number, example in enumerate(examples)]
    found = measure_documents(models[0], batches(twice), models[1])
    assert found.items == ("10", "11", "12")
    np.testing.assert_allclose(found.totals.sum(axis=0), measure_documents(*_first(models, examples)).totals.sum(axis=0), rtol=1e-9)


def test_batches_that_name_no_examples_keep_their_documents_apart(models, examples):
    nameless = [Batch(one.tokens, one.positions, one.documents, one.is_target) for one in batches(examples)]
    found = measure_documents(models[0], nameless, models[1])
    assert len(found.items) == len(examples)
    np.testing.assert_allclose(found.totals, measure_documents(*_first(models, examples)).totals, rtol=1e-12)


def test_dropout_is_off_while_measuring_and_the_mode_is_given_back(examples):
    student = sharp(0, attention_dropout=0.5)
    calm = measure(student, batches(examples))
    student.train()
    assert measure(student, batches(examples)) == calm
    assert student.training
    assert student.model.training


def test_the_mode_is_given_back_after_a_failure(models):
    student = models[0].train()
    with pytest.raises(DataError, match="nothing to measure"):
        measure(student, [])
    assert student.training
    student.eval()


def test_text_without_targets_is_refused(models):
    with pytest.raises(DataError, match="no batch holds a target token"):
        measure(models[0], batches([Example([5, 6, 7], [False] * 3, 0), Example([5], [True], 1)]))


def test_a_broken_model_is_named_and_not_averaged(models, examples):
    broken = sharp(0)
    with torch.no_grad():
        broken.model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="document 10: its measurement is not finite"):
        measure(broken, batches(examples), models[1])


# The fixture distributions and what they must give.
STUDENT, TEACHER = (0.4, 0.1, 0.3, 0.2), (0.5, 0.3, 0.15, 0.05)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("forward_kl", 0.2678686671), ("reverse_kl", 0.2860843770), ("jsd", 0.0657814514), ("tvd", 0.3), ("agreements", 1.0),
        ("nats", 2.3025850930), ("teacher_nats", -math.log(0.3)), ("entropy", 1.2798542258), ("teacher_entropy", 1.1421200430),
        ("brier", 0.4**2 + 0.9**2 + 0.3**2 + 0.2**2), ("overlaps", 1.0), ("teacher_ranks", 1.0),
    ],
)  # fmt: skip
def test_one_row_has_the_values_of_the_fixture(column, expected):
    student, teacher = (torch.tensor([row], dtype=torch.float64).log() for row in (STUDENT, TEACHER))
    assert measure_rows(student, teacher, torch.tensor([1]))[0, COLUMN[column]].item() == pytest.approx(expected, abs=1e-9)


def test_a_row_is_counted_in_the_bin_of_its_distance():
    student, teacher = (torch.tensor([row, TEACHER], dtype=torch.float64).log() for row in (STUDENT, TEACHER))
    counts = measure_rows(student, teacher, torch.tensor([1, 1]))[:, FORWARD_KL_ROWS:]
    assert counts.sum(dim=1).tolist() == [1, 1]
    (place,) = counts[0].nonzero()[0].tolist()
    assert EDGES[place - 1] <= 0.2678686671 < EDGES[place]
    assert counts[1, 0] == 1


def test_the_rank_counts_what_the_student_finds_more_likely():
    student, teacher = (torch.tensor([row], dtype=torch.float64).log() for row in ((0.3, 0.1, 0.1, 0.5), (0.2, 0.6, 0.1, 0.1)))
    measured = measure_rows(student, teacher, torch.tensor([0]))[0]
    # A token that is exactly as likely does not stand before it.
    assert measured[COLUMN["teacher_ranks"]] == 3
    assert measured[COLUMN["agreements"]] == 0


def test_an_impossible_outcome_adds_no_entropy():
    student = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert measure_rows(student, None, torch.tensor([0]))[0, COLUMN["entropy"]].item() == pytest.approx(math.log(2))


def test_the_calibration_error_of_the_fixture():
    confidence, correct = torch.tensor([0.9, 0.8, 0.6, 0.55]), torch.tensor([1, 0, 1, 0])
    assert expected_calibration_error(confidence, correct, num_bins=4) == pytest.approx(0.2125)


def test_bins_are_closed_on_the_right():
    edges = torch.tensor([0.0, 1 / 15, 2 / 15, 14 / 15, 1.0], dtype=torch.float64)
    assert calibration_bin(edges, 15).tolist() == [0, 0, 1, 13, 14]
    assert calibration_bin(edges + 1e-9, 15).tolist()[1:4] == [1, 2, 14]


def test_speculative_decoding_gets_the_tokens_of_the_fixture():
    acceptance = 1 - 0.5 * sum(abs(one - other) for one, other in zip(STUDENT, TEACHER, strict=True))
    assert acceptance == pytest.approx(0.7)
    assert expected_tokens_per_round(acceptance, 4) == pytest.approx(2.7731)
    assert expected_tokens_per_round(1.0, 4) == 5
    assert expected_tokens_per_round(0.0, 4) == 1


def test_a_uniform_model_has_the_vocabulary_as_perplexity(examples):
    uniform = sharp(0, scale=0.0)
    assert measure(uniform, batches(examples))["perplexity"].value == pytest.approx(VOCABULARY, rel=1e-6)


def test_each_document_alone_adds_up_to_the_whole(models, examples):
    found = measure_documents(*_first(models, examples), tokenizer=tiny_tokenizer())
    rows = found.by_item()
    assert [row["item"] for row in rows] == ["10", "11", "12", "13", "14", "15"]
    weighted = sum(row["forward_kl"] * row["targets"] for row in rows) / sum(row["targets"] for row in rows)
    assert weighted == pytest.approx(found.estimate("forward_kl").value)


def test_seeds_are_joined_and_models_compared_document_by_document(models, examples):
    runs = [measure_documents(sharp(seed), batches(examples), models[1]) for seed in (0, 2)]
    others = [measure_documents(sharp(seed), batches(examples), models[1]) for seed in (3, 4)]
    joined = estimate_over_seeds("forward_kl", runs)
    assert joined.value == pytest.approx(np.mean([run.estimate("forward_kl").value for run in runs]))
    found = compare_scores("forward_kl", runs, others)
    assert found.difference.value == pytest.approx(joined.value - estimate_over_seeds("forward_kl", others).value)
    with pytest.raises(ValueError, match="different items"):
        compare_scores("forward_kl", runs, [measure_documents(sharp(3), batches(examples[1:]), models[1])])
    with pytest.raises(ValueError, match="different items"):
        estimate_over_seeds("forward_kl", [runs[0], measure_documents(sharp(2), batches(examples[1:]), models[1])])
