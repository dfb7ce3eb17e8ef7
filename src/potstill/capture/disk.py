"""How many bytes a capture will write, from its format before the first answer and from the first unit after it; and whether they fit."""

from math import log2

from potstill.cache.records import RecordFormat
from potstill.errors import StorageError
from potstill.place import Folder, place_at
from potstill.storage import free_bytes

# Of a quantised log-probability, coded in order; of a count and a weight that follow from the draw. Measured means lie below.
_BITS_OF_VALUE = 3.5
_BITS_OF_COUNT = 3.0
_BYTES_OF_ROW = 6.0
_BYTES_OF_SEQUENCE = 96.0  # its key, row count, checksum and place, in the data file and in the index
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def bytes_per_row(format: RecordFormat) -> float:
    """A bound on the mean over real text, each kind's own; random numbers compress less."""
    top = _BYTES_OF_ROW + _kept(format) * (8.0 if format.exact else (_bits_of_id(format, _kept(format)) + _BITS_OF_VALUE) / 8)
    drawn = _BYTES_OF_ROW + format.num_samples * (_bits_of_id(format, format.num_samples) + _BITS_OF_COUNT) / 8
    drawn += 0.0 if format.proposal_exponent == 1.0 else 4.0 * format.num_samples
    numbers = format.width * _BYTES[format.dtype]
    of_kind = {"top_k": top, "sampled": drawn, "top_k_sampled": top + drawn, "hidden": numbers, "projected": numbers + 8}
    return float(of_kind[format.outcomes])


def _kept(format: RecordFormat) -> int:
    return min(format.k, format.vocabulary_size)


def _bits_of_id(format: RecordFormat, count: int) -> float:
    """Of an id in a sorted set of `count`: a gap of V / count on average, and what a code of it costs."""
    return log2(max(format.vocabulary_size / max(count, 1), 1.0)) + 2.0


def predicted_bytes(format: RecordFormat, rows: int, sequences: int, *, per_row: float | None = None) -> int:
    """Of so many answers; `per_row` is what was measured, where something was."""
    return int(rows * (bytes_per_row(format) if per_row is None else per_row) + sequences * _BYTES_OF_SEQUENCE)


def require_room(path: str, bytes_needed: int, *, measured: bool = False) -> None:
    """Raises StorageError where the disk under a local cache has fewer bytes free; what a remote place holds is not known."""
    place = place_at(path)
    if not isinstance(place, Folder) or (free := free_bytes(place.path)) >= bytes_needed:
        return
    how = "by the size of the first answers" if measured else "as far as can be told before the first answer"
    raise StorageError(
        f"capture.path: {place.name}: {bytes_needed:,} bytes are needed, {how}, and {free:,} are free; make room, choose another path, "
        "or record less: a smaller capture.k or capture.num_samples"
    )
