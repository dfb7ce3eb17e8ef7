"""What an item is called, so that a person finds it and two models' answers to it are paired: the file's name and the line."""

from collections.abc import Sequence
from pathlib import PurePath


def item_names(origins: Sequence[str]) -> list[str]:
    """For each origin ("/data/rows.jsonl:17") its name ("rows.jsonl:17"): as much of the path as tells the sources apart.

    Equal origins have equal names: a row that stands in a mixture twice is one item.
    """
    sources = list(dict.fromkeys(origin.rpartition(":")[0] for origin in origins))
    parts = {source: PurePath(source).parts or (source,) for source in sources}
    length = 1
    while len({parts[source][-length:] for source in sources}) < len(sources):
        length += 1
    short = {source: "/".join(parts[source][-length:]).replace("//", "/") for source in sources}
    return [f"{short[source]}:{number}" for source, _, number in (origin.rpartition(":") for origin in origins)]
