"""The column of a row that names who answers it. Knows names; knows no teacher."""

from collections.abc import Collection
from dataclasses import dataclass

from potstill.data.lines import Rejects, Row, printable
from potstill.errors import DataError


@dataclass(frozen=True)
class Routing:
    """`column` of every row holds one of `names`."""

    column: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, column: str | None, names: Collection[str]) -> "Routing | None":
        return None if column is None else cls(column, tuple(names))

    def route(self, row: Row) -> str:
        return row.values[self.column]

    def checked(self, rows: list[Row], path: str, rejects: Rejects) -> list[Row]:
        """The rows that name one of the known. A column that no row has stops at once; else a row without it is a bad row."""
        known = ", ".join(self.names)
        if rows and not any(self.column in row.values for row in rows):
            present = sorted({column for row in rows for column in row.values})
            raise DataError(printable(
                f"{path}: no column {self.column!r}, which says for each row who answers it ({known}); the columns are {', '.join(present)}"
            ))  # fmt: skip
        good = []
        for row in rows:
            value = row.values.get(self.column)
            if self.column not in row.values:
                reason = f"column {self.column!r} is missing, which says who answers the row; known are {known}"
            elif not isinstance(value, str) or value not in self.names:
                reason = f"column {self.column!r} is {str(value)[:100]!r}, which names nobody who answers; known are {known}"
            else:
                good.append(row)
                continue
            rejects.refuse(row.origin, reason, repr(row.values)[:1000])
        return good
