"""What of a recipe `potstill generate` can carry out; everything else is refused here, before torch is imported.

It opens small local data files and a checker of the user's, and no model.
"""

from pathlib import Path

from potstill.data.answer_columns import open_rows
from potstill.data.config import DataConfig
from potstill.data.formats import Reading, check_columns
from potstill.data.lines import Rejects
from potstill.errors import ConfigError
from potstill.models.config import LoadingConfig
from potstill.recipes.precheck import check_model, check_teacher, is_local
from potstill.recipes.schema import Recipe
from potstill.rollouts.checkers import CHECKERS, make_checker
from potstill.rollouts.generate_config import GenerateConfig
from potstill.teachers.config import LocalTeacherConfig, ServerTeacherConfig

SUFFIXES = (".jsonl", ".jsonl.gz")
# Larger files are read once, when they are rendered.
_READ_TWICE_BYTES = 4 * 2**20
CHECKER_KEY = "generate.filters.checker"

Writer = LoadingConfig | ServerTeacherConfig


def counts_path(path: str) -> Path:
    """The file beside a data set that says what became of the answers."""
    return Path(path).expanduser().with_name(Path(path).name + ".counts.json")


def writer_of(recipe: Recipe) -> tuple[str, Writer]:
    """Who answers, and the key that it stands under. Raises ConfigError for one that cannot write."""
    assert recipe.generate is not None
    if recipe.generate.author == "student":
        return "student", recipe.student
    teacher = recipe.teacher
    if isinstance(teacher, LocalTeacherConfig):
        return "teacher", teacher
    if isinstance(teacher, ServerTeacherConfig):
        if teacher.backend != "vllm":
            raise ConfigError(f"teacher.backend: {teacher.backend} is not asked to write; serve it with vLLM, or load it: kind: local")
        return "teacher", teacher
    found = "there is no teacher section" if teacher is None else f"a teacher of the kind {teacher.kind} writes nothing"
    raise ConfigError(
        f"generate.author: teacher, and {found}; name one that does, as in teacher='{{kind: local, path: ...}}', or say "
        "generate.author=student"
    )


def precheck_generate(recipe: Recipe, name: str) -> None:
    """Raises ConfigError, ModelError or DataError for the first thing that does not fit or is not there, naming the key and the remedy."""
    config = recipe.generate
    if config is None:
        raise ConfigError(f"{name}: generate: missing; say where the answers go, as in generate='{{path: answers.jsonl, samples: 1}}'")
    key, writer = writer_of(recipe)
    _check_paths(config, recipe.data)
    _check_data_format(config, recipe.data)
    _check_numbers(config, recipe.data)
    if recipe.data.teacher_prompt is not None and config.author == "student":
        raise ConfigError("data.teacher_prompt: is read by a teacher, and generate.author is student; leave one of them out")
    if isinstance(writer, ServerTeacherConfig):
        check_teacher(key, writer)
        if writer.api_key_file is not None:
            raise ConfigError("teacher.api_key_file: a server that writes takes its key from a variable; name it with teacher.api_key_env")
        if writer.tokenizer is None:
            check_model("student", recipe.student)
    else:
        check_model(key, writer)
    if config.filters.checker is not None:
        make_checker(config.filters.checker, CHECKER_KEY)
    _check_rows(recipe.data)


def _check_paths(config: GenerateConfig, data: DataConfig) -> None:
    for key, path in {"path": config.path, "dropped": config.dropped}.items():
        if path is not None and not path.endswith(SUFFIXES):
            raise ConfigError(f"generate.{key}: {path}: answers are written as {' or '.join(SUFFIXES)}; end the name so")
        if path is not None and Path(path).expanduser().is_dir():
            raise ConfigError(f"generate.{key}: {path}: is a folder; name a file")
    places = {item.path: "data.train" for item in data.sources} | ({data.held_out.path: "data.validation"} if data.held_out else {})
    written = [(key, Path(path).expanduser().resolve()) for key, path in (("path", config.path), ("dropped", config.dropped)) if path]
    for key, path in written:
        for source, where in places.items():
            if Path(source).expanduser().resolve() == path:
                raise ConfigError(f"generate.{key}: {path}: is read as {where}, and would be overwritten; name another file")
    if len({path for _, path in written}) < len(written):
        raise ConfigError("generate.dropped: the same file as generate.path; name another one")


def _check_data_format(config: GenerateConfig, data: DataConfig) -> None:
    formats = {item.format or data.format for item in data.sources}
    columns = [item.columns for item in data.sources if item.columns is not None]
    if len(formats) > 1 or any(found != data.columns for found in columns):
        raise ConfigError(
            "data.train: the sources of the mixture have formats or columns of their own, and one file is written; generate from one at a "
            "time, as in data.train=rows.jsonl, and mix what is written"
        )
    of_text = formats == {"text"}
    if of_text and config.prompt_tokens is None:
        raise ConfigError(
            "generate.prompt_tokens: rows of the format text have no prompt; say how many of their first tokens are it, as in "
            "generate.prompt_tokens=32"
        )
    if not of_text and config.prompt_tokens is not None:
        raise ConfigError(f"generate.prompt_tokens: is for the format text, and data.format is {formats.pop()}; leave it out")
    if of_text and config.filters.checker in CHECKERS:
        raise ConfigError(
            f"{CHECKER_KEY}: {config.filters.checker} compares with a row's own answer, and rows of the format text have none; leave it "
            "out, or name a function of yours"
        )


def _check_numbers(config: GenerateConfig, data: DataConfig) -> None:
    sampling, filters = config.sampling, config.filters
    if config.samples > 1 and sampling.temperature == 0:
        raise ConfigError(
            f"generate.samples: {config.samples} answers to a prompt are all the same at generate.sampling.temperature 0; set a "
            "temperature above 0, or one sample"
        )
    if sampling.max_new_tokens + (config.prompt_tokens or 1) > data.max_tokens:
        raise ConfigError(
            f"generate.sampling.max_new_tokens: {sampling.max_new_tokens} and a prompt do not fit into data.max_tokens: {data.max_tokens}; "
            "raise the one or lower the other"
        )
    if filters.min_tokens is not None and filters.min_tokens > min(filters.max_tokens or sampling.max_new_tokens, sampling.max_new_tokens):
        raise ConfigError(f"generate.filters.min_tokens: {filters.min_tokens} is more than an answer can have; nothing would be kept")


def _check_rows(data: DataConfig) -> None:
    """Reads small local files once, so that a malformed line or a missing column is said at once."""
    from potstill.data.sources import SUFFIXES as KNOWN
    from potstill.data.sources import read_source

    rejects = Rejects(data.bad_lines_allowed)
    for item in data.sources:
        path = Path(item.path).expanduser()
        if path.is_file() and path.stat().st_size > _READ_TWICE_BYTES:
            continue
        if not path.exists() and not is_local(item.path) and not item.path.endswith(KNOWN):
            continue  # a name on the hub
        reading = Reading(item.format or data.format, data.columns if item.columns is None else item.columns, data.instruct_prompt)
        check_columns(open_rows(read_source(item, rejects, data.text_rows), reading), reading, item.path, rejects)
