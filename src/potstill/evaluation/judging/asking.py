"""Asks the judge: several questions at once, each until its answer holds a verdict or is given up; every answer is kept as it came.

Torn connections, 429 and outages are serving's affair. A request that the server refuses while it answers others (too long for its
context, not to its taste) gets no verdict, and the refusal is kept in its place.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from potstill.errors import ServerError
from potstill.evaluation.judging.kept_lines import KeptLines
from potstill.evaluation.judging.questions import Heard, JudgeQuestion, Verdict, heard
from potstill.evaluation.judging.settings import JudgeConfig, Style
from potstill.evaluation.judging.verdicts import read_choice, read_grade
from potstill.evaluation.judging.wording import REMINDER
from potstill.serving.endpoint import Endpoint, Unanswered, Unbelievable, keeping
from potstill.serving.loop import Loop, together
from potstill.serving.pool import Pool
from potstill.serving.service import Service
from potstill.serving.strict_json import is_list, is_object, parse

PATH = "/v1/chat/completions"
_MOST_BYTES = 8 * 2**20
_SHOWN_AGAIN = 4000   # characters of an answer without a verdict that the judge is reminded of
_OF_ONE_REQUEST = frozenset({400, 413, 422})
_REFUSED_AT_ONCE = 3  # so many refusals before any answer: the requests as such are wrong


def service_of(judge: JudgeConfig) -> Service:
    """How it is asked, with the keys of a plan's judge section in every message."""

    def hint(path: str, status: int, said: str) -> str:
        if status in (401, 403):
            return "check the key: judge.api_key_env or judge.api_key_file"
        if status == 404:
            return "check judge.url and judge.model"
        if status in (400, 422):
            return "judge.body adds keys to a request, and leaves one out where it says null: judge.body='{temperature: null}'"
        return ""

    return Service(
        section="judge", url=judge.url, api_key_env=judge.api_key_env, api_key_file=judge.api_key_file, concurrency=judge.concurrency,
        request_seconds=judge.request_seconds, max_outage_seconds=judge.max_outage_seconds, hint=hint,
        if_one_fails="look into the server's log, or raise judge.request_seconds",
        if_unbelievable="is judge.url an OpenAI-compatible server?",
    )  # fmt: skip


class Judge:
    """Asks one server, and keeps what it says in `kept`. Close it."""

    def __init__(self, config: JudgeConfig, style: Style, kept: KeptLines):
        self._config, self._style, self._kept = config, style, kept
        service = service_of(config)
        self._endpoint = Endpoint(service)
        self._pool = Pool(service, f"the judge {config.model}", self._look)
        self._loop = Loop()
        self._read: Callable[[str], Verdict | None] = read_choice if style == "pairs" else read_grade

    def heed(self, check: Callable[[], None]) -> None:
        """`check` is called several times a second while the judge is asked; what it raises ends the asking."""
        self._loop.check = check

    def close(self) -> None:
        self._loop.close(self._endpoint.close())

    def ask(self, questions: Sequence[JudgeQuestion], settled: Callable[[], None] = lambda: None) -> None:
        """Asks until every question is settled, and calls `settled` for each that was not before. All that was answered is kept.

        Raises OutageError and ServerError; after either the same call goes on where this one ended.
        """
        self._loop.run(self._ask_all(self.unsettled(questions), settled))

    def unsettled(self, questions: Sequence[JudgeQuestion]) -> list[JudgeQuestion]:
        """What is still to be asked; of questions that are word for word alike one."""
        return list({question.key(self._config): question for question in questions if not self.heard(question).settled}.values())

    def heard(self, question: JudgeQuestion) -> Heard:
        return heard(question, self._config, self._kept)

    async def _look(self, seconds: float) -> None:
        """Only an answer to a question shows that a judge is there: one that lists its models may be out, and every answer costs."""
        raise Unanswered("nothing else is asked of a judge")

    async def _ask_all(self, questions: Sequence[JudgeQuestion], settled: Callable[[], None]) -> None:
        """The first ones alone, until one is answered: where the requests as such are wrong, few are spent on finding out."""
        refusals: list[tuple[JudgeQuestion, ServerError]] = []
        rest = list(questions)
        answered = any(line.get("judge") == self._config.model and "refused" not in line for line in self._kept)
        while rest and not answered:
            question = rest.pop(0)
            try:
                await self._settle(question)
                settled()
                answered = True
            except ServerError as error:
                if error.status not in _OF_ONE_REQUEST:
                    raise
                refusals.append((question, error))
                if len(refusals) == _REFUSED_AT_ONCE or not rest:
                    raise
        for question, error in refusals:
            self._keep_refusal(question, error)
            settled()

        async def one(question: JudgeQuestion) -> None:
            try:
                await self._settle(question)
            except ServerError as error:
                if error.status not in _OF_ONE_REQUEST:
                    raise
                self._keep_refusal(question, error)
            settled()

        await together([one(question) for question in rest])

    async def _settle(self, question: JudgeQuestion) -> None:
        while not (known := self.heard(question)).settled:
            body = self._body(question, known)
            answer = await self._pool.ask(lambda seconds, body=body: self._exchange(body, seconds))
            verdict = self._read(answer["answer"])
            self._kept.add([self._line(question, len(known.lines) + 1) | answer | {"verdict": verdict}])
            # Other questions are waiting for their turn; without this one that is answered at once would keep the loop.
            await asyncio.sleep(0)

    def _body(self, question: JudgeQuestion, known: Heard) -> dict[str, Any]:
        """As the first time; after an answer without a verdict with that answer and a reminder behind it."""
        body = question.body(self._config)
        said = known.words.strip()
        if said:
            reminder = [{"role": "assistant", "content": said[-_SHOWN_AGAIN:]}, {"role": "user", "content": REMINDER[self._style]}]
            body["messages"] = [*body["messages"], *reminder]
        return body

    async def _exchange(self, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        raw = await self._endpoint.post(PATH, body, seconds=seconds, most_bytes=_MOST_BYTES)
        with keeping(raw):
            return read_answer(parse(raw))

    def _line(self, question: JudgeQuestion, number: int) -> dict[str, Any]:
        return {
            "key": question.key(self._config), "item": question.item, "turn": question.turn + 1, "shown": list(question.shown),
            "judge": self._config.model, "try": number,
        }  # fmt: skip

    def _keep_refusal(self, question: JudgeQuestion, error: ServerError) -> None:
        line = self._line(question, len(self.heard(question).lines) + 1)
        self._kept.add([line | {"answer": "", "refused": str(error), "verdict": None}])


def read_answer(answer: Any) -> dict[str, Any]:
    """The text of a chat completion, why it ended, and as whom the server answers. No text (a refusal) is an empty one.

    Raises Unbelievable where the JSON is no chat completion.
    """
    answer = is_object(answer, "the answer")
    choice = is_object(is_list(answer.get("choices"), "choices", 1)[0], "the choice")
    text = is_object(choice.get("message"), "the message").get("content")
    if text is not None and not isinstance(text, str):
        raise Unbelievable(f"the content of its message is of type {type(text).__name__}, not text")
    ended, served = choice.get("finish_reason"), answer.get("model")
    return {
        "answer": text or "", "finish_reason": ended if isinstance(ended, str) else None,
        "served_as": served if isinstance(served, str) else None,
    }  # fmt: skip
