"""Text for a terminal: content escaped, numbers readable. Imports nothing heavy."""


def printable(text: str) -> str:
    """The text with every character that could command a terminal written as an escape; line ends and tabs stay."""
    return "".join(char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text)


def in_words(count: int | float, unit: str) -> str:
    """1,234,567 tokens."""
    return f"{count:,} {unit}{'' if count == 1 else 's'}"


def gib(num_bytes: int | float) -> str:
    """A size in memory: MiB below one GiB."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
