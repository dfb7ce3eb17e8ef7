"""From a DataConfig and a tokenizer to the prompts that its rows ask, and the token that ends an answer to them.

`prepare` gives what is trained on; this gives what is answered. It knows no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from potstill.data.answer_columns import Question, answered, open_rows
from potstill.data.config import DataConfig
from potstill.data.formats import Reading, check_columns
from potstill.data.lines import Rejects
from potstill.data.questions import as_trained, questions
from potstill.data.rendering import Rendered, Renderer
from potstill.data.sources import read_training_sources
from potstill.data.templates import settle_template


@dataclass(frozen=True)
class Asked:
    """The prompts of the rows; `sources` says of each from which of `data.train`'s it is. `rows` counts those that were read, `rejected`
    those of them, and of lines, that were left out as malformed."""

    questions: list[Question]
    sources: list[int]
    renderer: Renderer
    rows: int
    rejected: int

    def ends(self) -> list[int]:
        """The special token that an answer to these rows ends with in training: a chat template may end a turn with one of its own."""
        if not self.questions:
            return []
        question = self.questions[0]
        (read,) = as_trained([(answered(question, "Answer", ended=True, sample=0), question.reading)], self.renderer)
        last = read.tokens[read.spans[-1][1] - 1] if isinstance(read, Rendered) and read.spans else None
        return [last] if last in self.renderer.ending_ids and last is not None else []


def ask(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, end_of_text: Sequence[int] = (), prompt_tokens: int | None = None,
    wording: str | None = None,
) -> Asked:  # fmt: skip
    """The prompts of `data.train`, of any length, as training renders them. The tokenizer gets the named chat template, if one is named.

    `end_of_text`: further ids at which the model stops. `prompt_tokens` and `wording` as in `questions`. Raises DataError.
    """
    rejects = Rejects(data.bad_lines_allowed)
    sources = read_training_sources(data, rejects, seed)
    if any((item.format or data.format) in ("instruct", "chat") for item, _ in sources):
        settle_template(tokenizer, data.chat_template)
    renderer = Renderer(tokenizer, end_of_text=end_of_text, template_variables=data.template_variables)
    found: list[Question] = []
    places: list[int] = []
    for place, (item, rows) in enumerate(sources):
        reading = Reading(item.format or data.format, data.columns if item.columns is None else item.columns, data.instruct_prompt)
        rows = check_columns(open_rows(rows, reading), reading, item.path, rejects)
        asked = list(questions(rows, reading, renderer, rejects, prompt_tokens, wording))
        found += asked
        places += [place] * len(asked)
    return Asked(found, places, renderer, sum(len(rows) for _, rows in sources), len(rejects.items))
