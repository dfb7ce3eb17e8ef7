"""What the look before a run says of text that a model writes: who writes it, behind which prompts, where it ends, what it takes."""

from collections.abc import Callable

from potstill.recipes.preparation import Preparation, Reader
from potstill.recipes.rollout_rules import by_drawn_tokens
from potstill.recipes.schema import Recipe
from potstill.recipes.words import gib, in_words
from potstill.rollouts.config import LocalGeneratorConfig, RolloutsConfig, SamplingConfig, VllmGeneratorConfig
from potstill.teachers.config import ServerTeacherConfig


def author_words(recipe: Recipe) -> str:
    """Who writes the text that is learned."""
    dataset = f"the data set: {', '.join(item.path for item in recipe.data.sources)} ({recipe.data.format})"
    rollouts = recipe.rollouts
    if rollouts is None or rollouts.author == "dataset":
        return dataset
    other = "the teacher" if rollouts.others == "teacher" else dataset
    replay, pair = rollouts.replay, rollouts.pair
    weight = "from 1 to 1.5 over the first half" if pair.gradual else f"{pair.student_weight:g}"
    return {
        "student": "the student, at every step",
        "teacher": "the teacher, at every step",
        "mixture": f"at each step the student, with probability {rollouts.student:g}, or {other}",
        "teacher_mixed": f"student and teacher together: each token is drawn from both, the teacher's share {rollouts.teacher_share:g}",
        "replay": f"the student, or a buffer of its last {replay.capacity:,} answers, or {other}: schedule {replay.schedule}, "
                  f"threshold {replay.start:g} at the start",
        "pair": f"to each prompt the student, with weight {weight}, and {other}",
    }[rollouts.author]  # fmt: skip


def longest_written(recipe: Recipe, preparation: Preparation) -> int:
    """Tokens of the longest prompt with the longest answer that may be written to it; 0 where the data set writes."""
    if recipe.rollouts is None or preparation.writing is None:
        return 0
    return min(preparation.writing.prompts.counts.longest + recipe.rollouts.sampling.max_new_tokens, recipe.data.max_tokens)


def beside_words(rollouts: RolloutsConfig | None) -> str | None:
    """The plain text that is learned beside; None where there is none."""
    text = None if rollouts is None else rollouts.text
    return None if text is None else f"{text.path}, its cross-entropy times {text.weight:g}"


def writing_rows(recipe: Recipe, preparation: Preparation) -> list[tuple[str, str]]:
    """Prompts, ends, sampling, where it is written and what that takes; nothing where the data set writes."""
    rollouts, writing = recipe.rollouts, preparation.writing
    if rollouts is None or writing is None:
        return []
    counts, named = writing.prompts.counts, _names(preparation)
    left = "" if not counts.dropped else f", {in_words(counts.dropped, 'row')} dropped"
    left += "" if not counts.truncated else f", {in_words(counts.truncated, 'prompt')} cut on the left"
    rows = [("prompts", f"{len(writing.prompts):,}, the longest of {in_words(counts.longest, 'token')}{left}")]
    if rollouts.student_writes:
        rows += [("the student draws", _drawing(rollouts.sampling)), ("its answers end with", named(writing.stops))]
    if rollouts.teacher_writes and rollouts.author != "teacher_mixed":
        rows += [("the teacher draws", _drawing(rollouts.teacher_sampling or rollouts.sampling)),
                 ("its answers end with", named(writing.teacher_stops))]  # fmt: skip
    if writing.foreign:
        done = "left out" if rollouts.foreign_end == "mask" else "learned"
        rows.append(("foreign ends", f"{named(tuple(writing.foreign))}, at which one of both goes on: {done}"))
    rows.append(("answers that are cut", "learned without an end" if rollouts.cut_answers == "keep" else "not learned"))
    if rollouts.reward is not None:
        rows.append(("reward", f"{rollouts.reward.weight:g} x {rollouts.reward.function}"))
    return rows + _places(recipe, rollouts, preparation)


def student_text_words(recipe: Recipe, said: Callable[..., str]) -> str | None:
    """The distance on the student's own text; None where it writes nothing. `said` puts an objective into words."""
    objective = recipe.student_objective
    if objective is None:
        return None
    words = said(objective)
    return f"{words}; by the tokens that were drawn" if by_drawn_tokens(objective) else words


def _names(preparation: Preparation) -> Callable[[tuple[int, ...]], str]:
    return lambda ids: " or ".join(preparation.student.tokenizer.convert_ids_to_tokens(sorted(ids)))


def _drawing(sampling: SamplingConfig) -> str:
    if sampling.temperature == 0:
        drawn = "the most likely token each time"
    else:
        cut = f", top_p {sampling.top_p:g}" * (sampling.top_p < 1) + f", top_k {sampling.top_k}" * (sampling.top_k > 0)
        drawn = f"temperature {sampling.temperature:g}{cut or ', from the whole vocabulary'}"
    return f"{drawn}; up to {in_words(sampling.max_new_tokens, 'new token')}"


def _places(recipe: Recipe, rollouts: RolloutsConfig, preparation: Preparation) -> list[tuple[str, str]]:
    """Where text is written, and the memory of its keys and values."""
    generator, rows, models = rollouts.generator, [], []
    if isinstance(generator, VllmGeneratorConfig) and rollouts.student_writes:
        stale = "" if generator.every == 1 else f", at most {generator.every} steps old"
        rows.append(("written by", f"the vLLM server {generator.url}; weights: {generator.weights}{stale}"))
    elif rollouts.student_writes:
        models.append(preparation.student)
    if rollouts.teacher_writes and isinstance(recipe.teacher, ServerTeacherConfig):
        rows.append(("the teacher writes", f"behind {recipe.teacher.url}"))
    elif rollouts.teacher_writes:
        models += preparation.teachers.values()
    if models:
        most = generator.batch_size if isinstance(generator, LocalGeneratorConfig) else None
        together = min(most or recipe.training.global_batch, recipe.training.global_batch)
        number = 2 if recipe.training.precision == "bf16" else 4
        size = together * longest_written(recipe, preparation) * sum(_cached_bytes(model, number) for model in models)
        rows.append(("written here", f"up to {in_words(together, 'answer')} side by side, {gib(size)} of keys and values while it lasts"))
    return rows


def _cached_bytes(reader: Reader, size: int) -> int:
    """Of one token, in every layer."""
    config = reader.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * size
