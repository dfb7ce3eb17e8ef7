"""Tokenizers are compared by what they encode: equal widths prove nothing, and unequal ones refute nothing."""

import json

import pytest

from potstill.errors import IncompatibleError
from potstill.models.tokenizers import compare_tokenizers, refuse_different, vocabulary_size
from tiny import CHATML_WITHOUT_MASK, tiny_tokenizer


def changed(change):
    """The tiny tokenizer after `change(its description)`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    description = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    change(description)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = tiny_tokenizer().chat_template
    return tokenizer


def swap_two_ids(description):
    vocabulary = description["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def test_a_tokenizer_equals_itself():
    comparison = compare_tokenizers(tiny_tokenizer(), tiny_tokenizer())
    assert comparison.same
    assert comparison.differences == []
    assert comparison.vocabulary_size == vocabulary_size(tiny_tokenizer()) == 320
    refuse_different(comparison, "student", "teacher")


def test_two_swapped_ids_at_equal_width_are_refused_and_named():
    student, teacher = tiny_tokenizer(), changed(swap_two_ids)
    assert len(student) == len(teacher)
    comparison = compare_tokenizers(student, teacher)
    first = min(student.convert_tokens_to_ids(["a", "b"]))
    assert not comparison.same
    assert "2 of 320 ids" in comparison.refusals[0]
    assert f"the first is id {first}" in comparison.refusals[0]
    with pytest.raises(IncompatibleError, match=r"the student S and the teacher T .*'a' to the student, 'b' to the teacher"):
        refuse_different(comparison, "S", "T")


def test_one_vocabulary_with_other_merges_is_refused():
    def drop_the_first_merge(description):
        del description["model"]["merges"][0]

    comparison = compare_tokenizers(tiny_tokenizer(), changed(drop_the_first_merge))
    assert not comparison.same
    assert "split text differently" in comparison.refusals[0]


def test_one_vocabulary_with_another_normalisation_is_refused():
    def lower_case(description):
        description["normalizer"] = {"type": "Lowercase"}

    assert "split text differently" in compare_tokenizers(tiny_tokenizer(), changed(lower_case)).refusals[0]


def test_a_token_that_is_special_to_one_side_alone_is_refused():
    def plain(description):
        description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] != "<|im_start|>"]

    assert not compare_tokenizers(tiny_tokenizer(), changed(plain)).same


def test_a_teacher_with_more_tokens_passes_and_they_get_no_mass():
    teacher = tiny_tokenizer()
    teacher.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|image|>"]})
    comparison = compare_tokenizers(tiny_tokenizer(), teacher, student_width=320, teacher_width=384)
    assert comparison.same
    assert comparison.vocabulary_size == 320
    assert any("2 tokens more, the first is '<|tool|>'" in note for note in comparison.notes)


def test_a_student_with_more_tokens_is_refused():
    student = tiny_tokenizer()
    student.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    refusal = compare_tokenizers(student, tiny_tokenizer()).refusals[0]
    assert "tokens that the teacher does not know, the first is id 320: '<|tool|>'" in refusal


def test_padded_rows_are_no_tokens():
    comparison = compare_tokenizers(tiny_tokenizer(), tiny_tokenizer(), student_width=336, teacher_width=384)
    assert comparison.same
    assert comparison.vocabulary_size == 320
    assert [note.split(" rows")[0] for note in comparison.notes] == ["the student's head has 16", "the teacher's head has 64"]


def test_a_head_narrower_than_its_tokenizer_is_refused():
    comparison = compare_tokenizers(tiny_tokenizer(), tiny_tokenizer(), student_width=319, teacher_width=320)
    assert "the student's head has 319 rows for 320 tokens" in comparison.refusals[0]


def test_another_end_is_refused_with_the_remedy_and_passes_once_it_is_said():
    student = tiny_tokenizer()
    student.eos_token = "<|endoftext|>"
    comparison = compare_tokenizers(student, tiny_tokenizer())
    assert "student.eos_token: '<|im_end|>'" in comparison.refusals[0]
    student.eos_token = "<|im_end|>"
    assert compare_tokenizers(student, tiny_tokenizer()).same


def test_another_start_or_template_is_noted_and_passes():
    teacher = tiny_tokenizer(chat_template=CHATML_WITHOUT_MASK)
    teacher.bos_token = "<|im_start|>"
    comparison = compare_tokenizers(tiny_tokenizer(), teacher)
    assert comparison.same
    assert any("BOS is None to the student and '<|im_start|>' to the teacher" in note for note in comparison.notes)
    assert any("chat templates differ" in note for note in comparison.notes)
    assert "only the teacher has a chat template" in compare_tokenizers(tiny_tokenizer(chat_template=None), teacher).notes


def test_real_tokenizers(shared_data):
    from transformers import AutoTokenizer

    llama3, qwen2, gpt2, neox = (
        AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name) for name in ("llama3", "qwen2", "gpt2", "gpt_neox")
    )
    different = compare_tokenizers(llama3, qwen2, student_width=128256, teacher_width=152064)
    with pytest.raises(IncompatibleError, match="the first is id 410: '00' to the student, 'ith' to the teacher"):
        refuse_different(different, "llama", "qwen")
    assert "the first is id 0: '!' to the student, '<|endoftext|>'" in compare_tokenizers(gpt2, neox).refusals[0]
    wide = compare_tokenizers(qwen2, qwen2, student_width=151936, teacher_width=152064)
    assert wide.same
    assert wide.vocabulary_size == 151646
    folders = [shared_data / "models" / name for name in ("stories260K-llama-hf", "tinystories-279K-llama-hf")]
    stories = [AutoTokenizer.from_pretrained(folder) for folder in folders]
    assert compare_tokenizers(*stories, student_width=512, teacher_width=512).same
