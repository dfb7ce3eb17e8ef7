"""Writing text in this process: the local generator against transformers' own `generate`, interleaved, in processor time.

    python benchmarks/generation.py [--threads 1] [--rounds 7] [--case equal prompts answers both greedy]

The student of the other benchmarks (8M parameters, vocabulary 32,000), 8 prompts of up to 128 tokens, up to 128 new tokens each,
drawn at temperature 1. "answers" ends the answers at the lengths that the local generator's own text has had, in both.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

ROWS, PROMPT, NEW = 8, 128, 128
CASES = {
    "equal": "prompts and answers of equal length",
    "prompts": "prompts of 16 to 128 tokens",
    "answers": "answers of 1 to 128 tokens",
    "both": "prompts and answers of unequal length",
    "greedy": "as equal, the most likely token",
    "truncated": "as equal, top-k 50 and top-p 0.9",
    "samples": "8 answers to one prompt",
}


@dataclass(frozen=True)
class Case:
    """Prompts as ids, whether answers end by themselves, and the sampling in transformers' words."""

    prompts: list[list[int]]
    ending: bool
    sampling: dict


def make_case(name: str, vocabulary: int) -> Case:
    import torch

    generator = torch.Generator().manual_seed(3)
    lengths = [16 * (row + 1) for row in (5, 0, 7, 2, 6, 1, 4, 3)] if name in ("prompts", "both") else [PROMPT] * ROWS
    prompts = [torch.randint(600, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if name == "greedy":
        sampling["temperature"] = 0.0
    if name == "truncated":
        sampling.update(top_k=50, top_p=0.9)
    return Case([prompts[0]] * ROWS if name == "samples" else prompts, name in ("answers", "both"), sampling)


def ours(model, case: Case, seed: list[int]) -> Callable[[], list[int]]:
    """Gives the length of each answer; every call draws another text."""
    from potstill.models.causal_lm import CausalLM
    from potstill.rollouts.local import LocalGenerator
    from potstill.rollouts.writing import Prompt, Sampling, seed_of

    vocabulary = model.config.vocab_size
    # Untrained, every token is about as likely as another: 500 ends of 32,000 make answers of 64 tokens on average.
    generator = LocalGenerator(CausalLM(model, vocabulary), stop_ids=range(500) if case.ending else [], pad_token=0)

    def write() -> list[int]:
        prompts = [Prompt(tuple(tokens), seed_of(seed[0], row)) for row, tokens in enumerate(case.prompts)]
        return [len(answer.tokens) for answer in generator.generate(prompts, Sampling(**case.sampling, max_new_tokens=NEW))]

    return write


def theirs(model, case: Case, limits: list[int]) -> Callable[[], list[int]]:
    """transformers' generate on the left-padded batch, ended row by row at `limits`, which may change between two calls."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    longest = max(map(len, case.prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in case.prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in case.prompts])
    drawing = {**case.sampling, "do_sample": True} if case.sampling["temperature"] else {"do_sample": False}

    class Ends(StoppingCriteria):
        """Each row at its own length."""

        def __call__(self, input_ids, scores, **_):
            return torch.tensor(limits) <= input_ids.shape[1] - longest

    def write() -> list[int]:
        # An end-of-text token must be named for finished rows to be padded; it hardly ever comes.
        given = {"eos_token_id": 0, "stopping_criteria": StoppingCriteriaList([Ends()])} if case.ending else {"eos_token_id": None}
        found = model.generate(
            input_ids=tokens, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0, use_cache=True, **given, **drawing
        )
        return [min(limit, found.shape[1] - longest) for limit in limits]

    return write


def compare(name: str, rounds: int) -> tuple[float, float, float]:
    """Medians: seconds of ours, seconds of theirs, and the ratio round by round."""
    from training_step import make_models

    model = make_models()[0].eval()
    case, seed, limits = make_case(name, model.config.vocab_size), [0], [NEW] * ROWS
    mine, other = ours(model, case, seed), theirs(model, case, limits)
    taken: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        seed[0] = number
        start = time.process_time()
        limits[:] = mine()
        middle = time.process_time()
        other()
        if number:  # the first round warms up
            taken.append((middle - start, time.process_time() - middle))
    return (
        statistics.median(row[0] for row in taken), statistics.median(row[1] for row in taken),
        statistics.median(row[0] / row[1] for row in taken),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    given = parser.parse_args()
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(given.threads)
    print(f"{ROWS} rows, {PROMPT} + {NEW} tokens, {given.threads} thread(s), medians of {given.rounds} interleaved rounds, processor time")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| | ours, s | transformers, s | ratio |\n|---|---|---|---|")
    for name in given.case:
        mine, other, ratio = compare(name, given.rounds)
        print(f"| {CASES[name]} | {mine:.2f} | {other:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
