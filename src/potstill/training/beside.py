"""Plain text that is learned beside whatever a step is taken on: made into rows with an order of their own.

That it is learned by its cross-entropy, and never asked of a teacher, is the matter of the stream's objective.
"""

from collections.abc import Sequence

from potstill.batch import Example
from potstill.errors import ConfigError, DataError
from potstill.rollouts.config import TextConfig
from potstill.training.config import TrainingConfig
from potstill.training.feeding import Rows
from potstill.training.order import Division, GlobalOrder, mix
from potstill.training.processes import launched_ranks
from potstill.training.turns import Beside

KEY = "rollouts.text"


def make_beside(texts: Sequence[Example], config: TextConfig, training: TrainingConfig, *, seed: int, pad_token: int) -> Beside:
    """`texts` are pieces of plain text, one a row. Each step takes as many micro-batches of them as of everything else.

    The order is a function of (seed, step), as that of the training set is, and another one. `Beside.rows.fingerprint` belongs to what
    must be equal when a run is resumed. Raises DataError where there is no text, ConfigError where the ranks cannot share a step of it.
    """
    if not any(example.num_targets for example in texts):
        raise DataError(f"{KEY}.path: {config.path} holds no text to learn from; every row was empty or left out")
    batch_size = config.batch_size or training.batch_size
    try:
        Division.of(launched_ranks()[1], batch_size, training.accumulation)
    except ConfigError as error:
        raise ConfigError(f"{KEY}.batch_size is {batch_size}: {error}") from error
    own = mix(seed, 1)
    rows = Rows(texts, pad_token=pad_token, seed=own, max_tokens=None)
    return Beside(GlobalOrder(rows.lengths, seed=own, batch_size=batch_size, accumulation=training.accumulation), rows, config.weight)
