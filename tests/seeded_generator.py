"""A generator without a model: what it writes is a function of prompt, seed and step alone; it ends, is cut or says nothing.

For tests of what becomes of written text; whoever tests the writing takes a model.
"""

import random

from potstill.rollouts.writing import Completion

END = 2


class SeededGenerator:
    """Counts its calls; writes up to five tokens of 320, an end after most of them."""

    name = "a seeded generator"

    def __init__(self, vocabulary_size: int = 320, share_empty: float = 0.1):
        self.calls, self.version, self._size, self._share_empty = 0, 0, vocabulary_size, share_empty

    def generate(self, prompts, sampling):
        self.calls += 1
        return [self._write(prompt, sampling) for prompt in prompts]

    def _write(self, prompt, sampling):
        numbers = random.Random(repr((prompt.tokens, prompt.seed, self.version)))
        if numbers.random() < self._share_empty:
            return Completion((END,), (-numbers.random(),), True, self.version)
        tokens = [numbers.randrange(3, self._size) for _ in range(numbers.randint(1, min(5, sampling.max_new_tokens - 1)))]
        ended = numbers.random() < 0.7
        tokens += [END] * ended
        return Completion(tuple(tokens), tuple(-numbers.random() for _ in tokens), ended, self.version)

    def refresh(self, step):
        self.version = step

    def heed(self, check):
        """It writes at once."""

    def close(self):
        """It holds nothing."""
