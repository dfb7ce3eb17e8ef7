"""Whether a student and a teacher read the same tokens: compared by what they encode, not by how wide their heads are.

Text is rendered and tokenised once, by the student's tokenizer; these checks say whether the teacher can be shown those ids.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from potstill.errors import IncompatibleError

# Texts on which two tokenizers that share a vocabulary may still differ: digits, blanks, case, scripts, code, composed letters.
_TEXTS = (
    "Hello world",
    "  two  blanks\tand a tab\n\n\nthree lines ",
    "In 1999, 3.14159 was 12,345,678 times 0x1F.",
    "don't DON'T l'été naïve Ångström", "caf\u00e9 cafe\u0301", "日本語と中文、한국어",
    "Привет, мир! שלום مرحبا",
    "def f(x):\n    return x ** 2  # square\n",
    "🙂👩‍👩‍👧 ≠ ∑ fi ﬁ", "http://a.b/c?d=e&f=g#h",
)
_AS_THE_STUDENT = "text is tokenised as the student does"
# How many tokens, spread over the vocabulary, are written out as text and read again by both.
_SAMPLE = 2000


@dataclass(frozen=True)
class TokenizerComparison:
    """What `compare_tokenizers` found. `vocabulary_size` counts the ids, from 0, that mean the same to both."""

    vocabulary_size: int
    refusals: tuple[str, ...]
    """Why the teacher cannot be shown the student's ids."""
    notes: tuple[str, ...]
    """What is odd but harmless."""

    @property
    def same(self) -> bool:
        return not self.refusals

    @property
    def differences(self) -> list[str]:
        return [*self.refusals, *self.notes]


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id that the tokenizer gives: the rows of a head that are real."""
    return max(tokenizer.get_vocab().values()) + 1


def compare_tokenizers(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *,
    student_width: int | None = None, teacher_width: int | None = None,
) -> TokenizerComparison:
    """Compares ids, encodings, special tokens and templates; the widths (rows of the heads) are compared with them where given."""
    names = _by_id(student), _by_id(teacher)
    sizes = vocabulary_size(student), vocabulary_size(teacher)
    refusals = _different_ids(*names)
    if not refusals:
        refusals = _surplus_tokens(names[0], sizes[1]) + _different_encodings(student, teacher, min(sizes))
    refusals += _narrow_head("student", student_width, sizes[0]) + _narrow_head("teacher", teacher_width, sizes[1])
    if not refusals:
        refusals += _different_end(student, teacher)
    notes = _padded_rows("student", student_width, sizes[0]) + _padded_rows("teacher", teacher_width, sizes[1])
    if sizes[1] > sizes[0]:
        notes.append(f"the teacher knows {sizes[1] - sizes[0]} tokens more, the first is {names[1].get(sizes[0])!r}: they get no mass")
    notes += _different_start(student, teacher) + _different_templates(student, teacher)
    return TokenizerComparison(min(sizes), tuple(refusals), tuple(notes))


def refuse_different(comparison: TokenizerComparison, student: str, teacher: str) -> None:
    """Raises IncompatibleError, naming both models and the first difference, unless the comparison found them the same."""
    for refusal in comparison.refusals[:1]:
        raise IncompatibleError(f"the student {student} and the teacher {teacher} do not read the same tokens: {refusal}")


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}


def _different_ids(student: dict[int, str], teacher: dict[int, str]) -> list[str]:
    shared = range(min(max(student), max(teacher)) + 1)
    different = [number for number in shared if student.get(number) != teacher.get(number)]
    if not different:
        return []
    first = different[0]
    return [
        f"{len(different):,} of {len(shared):,} ids mean different tokens; the first is id {first}: "
        f"{student.get(first)!r} to the student, {teacher.get(first)!r} to the teacher. Choose a teacher with the student's tokenizer"
    ]


def _surplus_tokens(student: dict[int, str], teacher_size: int) -> list[str]:
    surplus = sorted(number for number in student if number >= teacher_size)
    if not surplus:
        return []
    return [
        f"the student has {len(surplus)} tokens that the teacher does not know, the first is id {surplus[0]}: {student[surplus[0]]!r}. "
        "Give the student the teacher's tokenizer, or remove the tokens that were added to it"
    ]


def _different_encodings(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, common: int) -> list[str]:
    """Two tokenizers with one vocabulary may still split a text differently (merges, normalisation, which tokens are special)."""
    added = [pair for tokenizer in (student, teacher) for pair in tokenizer.added_tokens_decoder.items()]
    special = [token.content for number, token in added if number < common]
    written = student.batch_decode([[number] for number in range(0, common, max(1, common // _SAMPLE))])
    texts = [*_TEXTS, *(f"a {token} b" for token in dict.fromkeys(special)), *written]
    encoded = [tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in (student, teacher)]
    for text, ours, theirs in zip(texts, *encoded, strict=True):
        if ours != theirs:
            place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
            return [
                f"they share their ids but split text differently: {text!r} is {_around(ours, place)} to the student and "
                f"{_around(theirs, place)} to the teacher. Choose a teacher with the student's tokenizer"
            ]
    return []


def _around(ids: list[int], place: int) -> str:
    part = ids[max(0, place - 2) : place + 3]
    return f"[{'... ' if place > 2 else ''}{', '.join(map(str, part))}{' ...' if place + 3 < len(ids) else ''}]"


def _narrow_head(side: str, width: int | None, size: int) -> list[str]:
    if width is None or width >= size:
        return []
    return [f"the {side}'s head has {width:,} rows for {size:,} tokens: tokens were added to its tokenizer and not to the model"]


def _padded_rows(side: str, width: int | None, size: int) -> list[str]:
    if width is None or width <= size:
        return []
    return [f"the {side}'s head has {width - size:,} rows beyond its {size:,} tokens: they get no mass"]


def _different_end(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[str]:
    ours, theirs = student.eos_token, teacher.eos_token
    if ours == theirs or ours is None or theirs is None:
        return []
    return [
        f"an answer ends with {ours!r} for the student and with {theirs!r} for the teacher, as with a base and an instruction model; "
        f"a teacher that never ends as the student does teaches it not to end. Say which: student.eos_token: {theirs!r}"
    ]


def _different_start(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[str]:
    notes = []
    if student.bos_token != teacher.bos_token:
        notes.append(f"BOS is {student.bos_token!r} to the student and {teacher.bos_token!r} to the teacher; {_AS_THE_STUDENT}")
    ours, theirs = (t("a")["input_ids"] != t("a", add_special_tokens=False)["input_ids"] for t in (student, teacher))
    if ours != theirs:
        adds, leaves = ("student", "teacher") if ours else ("teacher", "student")
        notes.append(f"the {adds}'s tokenizer adds special tokens by itself and the {leaves}'s does not; {_AS_THE_STUDENT}")
    return notes


def _different_templates(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[str]:
    if student.chat_template == teacher.chat_template:
        return []
    if student.chat_template is None:
        return ["only the teacher has a chat template"]
    if teacher.chat_template is None:
        return ["only the student has a chat template; the teacher sees text in it"]
    return ["their chat templates differ; the teacher sees text in the student's"]
