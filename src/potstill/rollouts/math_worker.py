"""The process that compares mathematical answers, started by math_checker.py alone: a pair of texts a line, a verdict a line.

A model's text is parsed here and nowhere else, so that what hangs, fills the memory or breaks the parser costs this process and not a
training or an evaluation. It reads and writes its own pipes, and no file.
"""

import json
import logging
import re
import sys
from contextlib import suppress

from math_verify import parse, verify

# One reading or one comparison of two; whoever started this process waits for all of a pair's together.
SECONDS = 3
_MEMORY_BYTES = 4 * 2**30
_DELIMITED = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed|\\begin\s*\{\s*(?:equation|align|gather|math)")
_WORD = re.compile(r"[^\W\d_]{3,}")


def expression(part: str) -> str:
    """A text marked as mathematics unless it is prose, of which the last expression is compared.

    Bare LaTeX and bare formulas stand between dollar signs, because math-verify looks for LaTeX between them alone.
    """
    prose = "\\" not in part and _WORD.search(part) is not None
    return part if prose or _DELIMITED.search(part) else f"${part}$"


def are_equal(answer: str, reference: str) -> bool:
    """Whether both are the same mathematical object: numbers to six decimals, expressions by symbols, sets, intervals, matrices."""
    wanted = parse(expression(reference), parsing_timeout=SECONDS)
    found = parse(expression(answer), parsing_timeout=SECONDS)
    return bool(wanted and found) and bool(verify(wanted, found, timeout_seconds=SECONDS))


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


def main() -> None:
    """Answers until the pipe is closed."""
    _limit_memory()
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        answer, reference = json.loads(line)
        try:
            verdict = are_equal(answer, reference)
        except (Exception, RecursionError, MemoryError):
            verdict = False
        sys.stdout.write(json.dumps(verdict) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
