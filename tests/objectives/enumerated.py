"""Policies over a few tokens as tables, every text enumerated, in plain floats: the analytic gradients that estimators must average to.

Shares nothing with the package. A policy maps a prefix (a tuple of tokens) to logits; END closes a text, and so does its greatest length.
Gradients are central differences of an objective in which what its definition holds constant is held.
"""

import math

END = 2
TOKENS = (0, 1, END)


def softmax(logits):
    powers = [math.exp(x) for x in logits]
    return [x / sum(powers) for x in powers]


class Tables:
    """Student, teacher and what text is drawn from, as logits by prefix, for texts of at most `longest` tokens."""

    def __init__(self, student, teacher, drawn_from=None, longest=3):
        self.student, self.teacher, self.longest = student, teacher, longest
        self.drawn = drawn_from or (lambda prefix: softmax(student[prefix]))

    def over(self, prefix):
        return len(prefix) == self.longest or (prefix and prefix[-1] == END)

    def prefixes(self, start=()):
        """Those after which a token is drawn, the shorter first."""
        if self.over(start):
            return []
        return sorted([start, *(p for token in TOKENS for p in self.prefixes((*start, token)))], key=lambda p: (len(p), p))

    def texts(self, start=(), chance=None):
        """(text, probability) of everything that may be drawn after `start`, under what text is drawn from or `chance`."""
        if self.over(start):
            return [(start, 1.0)]
        probs = (chance or self.drawn)(start)
        return [(text, probs[token] * rest) for token in TOKENS for text, rest in self.texts((*start, token), chance)]

    def visits(self, prefix):
        """How often a drawn text passes through this prefix."""
        return math.prod(self.drawn(prefix[:place])[prefix[place]] for place in range(len(prefix)))

    def log_ratio(self, prefix, token):
        return math.log(softmax(self.teacher[prefix])[token] / softmax(self.student[prefix])[token])

    def local(self, prefix, logits):
        q, p = softmax(logits), softmax(self.teacher[prefix])
        return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))

    def return_of(self, prefix, after):
        """E of a function of the log-ratios that follow `prefix`, the rest being drawn from what text is drawn from."""
        found = 0.0
        for text, chance in self.texts(prefix):
            ratios = [self.log_ratio(text[:place], text[place]) for place in range(len(prefix), len(text))]
            found += chance * after(ratios)
        return found

    def slopes(self, objective):
        """d objective(prefix, logits) / d logits at every prefix, weighed by how often it is visited."""
        found, step = {}, 1e-6
        for prefix in self.prefixes():
            row = self.student[prefix]
            sides = []
            for token in TOKENS:
                moved = [[x + (step * sign if place == token else 0.0) for place, x in enumerate(row)] for sign in (1, -1)]
                sides.append((objective(prefix, moved[0]) - objective(prefix, moved[1])) / (2 * step))
            found[prefix] = [self.visits(prefix) * slope for slope in sides]
        return found

    def local_slopes(self):
        return self.slopes(self.local)

    def return_slopes(self, after):
        """Of minus the expected return: the token is drawn from the moved student, what follows as it was drawn."""
        returns = {(*p, token): self.return_of((*p, token), after) for p in self.prefixes() for token in TOKENS}
        return self.slopes(lambda p, logits: -sum(a * returns[(*p, t)] for t, a in zip(TOKENS, softmax(logits), strict=True)))

    def sequence_slopes(self, value):
        """Of sum over texts of q(text) value(text, q), everything moved, nothing held."""
        found, step = {}, 1e-6
        for prefix in self.prefixes():
            sides = []
            for token in TOKENS:
                both = []
                for sign in (1, -1):
                    row = list(self.student[prefix])
                    row[token] += sign * step
                    moved = {**self.student, prefix: row}
                    texts = self.texts(chance=lambda p, moved=moved: softmax(moved[p]))
                    both.append(sum(chance * value(text, moved) for text, chance in texts))
                sides.append((both[0] - both[1]) / (2 * step))
            found[prefix] = sides
        return found

    def sequence_reverse_kl(self, text, student):
        """log q(text) - log p(text)."""
        pairs = [(softmax(student[text[:i]])[text[i]], softmax(self.teacher[text[:i]])[text[i]]) for i in range(len(text))]
        return sum(math.log(q / p) for q, p in pairs)


def added(*slopes):
    return {prefix: [sum(values) for values in zip(*(s[prefix] for s in slopes), strict=True)] for prefix in slopes[0]}
