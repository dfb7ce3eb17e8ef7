"""What of a recipe fits text that a model writes: who writes with which teacher, what is learned from it, and how it is drawn.

It looks at the recipe alone and opens nothing. Every refusal begins with the key and ends with the way out. Imports no torch.
"""

from typing import TYPE_CHECKING, Any

from potstill.recipes.fitting import members
from potstill.rollouts.config import RolloutsConfig, VllmGeneratorConfig
from potstill.teachers.config import CacheTeacherConfig, EnsembleTeacherConfig, LocalTeacherConfig, SelfTeacherConfig, ServerTeacherConfig

if TYPE_CHECKING:
    from potstill.recipes.schema import ObjectiveConfig, Recipe

PACKING = (
    "data.packing: what a model writes has a length that nobody knows before, so that rows cannot be packed ahead; leave it out, or set "
    "data.packing=false"
)


def without_packing(given: Any) -> Any:
    """The values of a recipe with packing off where a model writes and nothing is said of it."""
    if not isinstance(given, dict) or given.get("rollouts") is None or not isinstance(given.get("data"), dict):
        return given
    return given if "packing" in given["data"] else {**given, "data": {**given["data"], "packing": False}}


def by_drawn_tokens(objective: "ObjectiveConfig") -> bool:
    """Whether what is learned rests on tokens having been drawn by the student."""
    return objective.support == "written" or objective.policy is not None


def on_student_text(objective: "ObjectiveConfig") -> "ObjectiveConfig":
    """What the student's own text is learned by: never cross-entropy, which would only confirm what it wrote."""
    chosen = objective.on_student_text or objective
    weights = {"kd_ratio": 1.0} if chosen.kd_weight is None else {"kd_weight": chosen.kd_weight, "sft_weight": 0.0}
    return chosen.model_copy(update=weights)


def learns_given_text(rollouts: RolloutsConfig | None) -> bool:
    """Whether any step is taken on text that the student did not write."""
    return rollouts is None or rollouts.author not in ("student", "teacher_mixed")


def refuse_unfit_rollouts(recipe: "Recipe") -> None:
    """Raises ValueError, beginning with a key, for sections that cannot go together whatever lies on the disk."""
    _self_teacher(recipe)
    rollouts, objective = recipe.rollouts, recipe.objective
    if rollouts is None or rollouts.author in ("dataset", "teacher"):
        where = "there is no rollouts section" if rollouts is None else f"the author is {rollouts.author}"
        for key, said in {"on_student_text": objective.on_student_text, "policy": objective.policy}.items():
            if said is not None:
                raise ValueError(f"objective.{key}: is for text that the student writes, and {where}; say rollouts.author=student")
        if objective.support == "written":
            raise ValueError(f"objective.support: written credits tokens that the student drew, and {where}; say rollouts.author=student")
    if rollouts is None:
        return
    if recipe.data.packing:
        raise ValueError(PACKING)
    _prompts(recipe, rollouts)
    _teacher(recipe, rollouts)
    if rollouts.student_writes:
        _student_text(recipe, rollouts)
    elif rollouts.reward is not None:
        raise ValueError(f"rollouts.reward: is for what the student writes, and the author is {rollouts.author}; leave it out")


def _self_teacher(recipe: "Recipe") -> None:
    teacher, student, data = recipe.teacher, recipe.student, recipe.data
    if isinstance(teacher, SelfTeacherConfig):
        if teacher.weights == "base" and student.lora is None and student.adapter is None:
            raise ValueError(
                "teacher.weights: base is the student without its adapter, and it has none; add student.lora, or name the same model: "
                f"teacher={{kind: local, path: {student.path}}}"
            )
        if teacher.weights == "live" and data.teacher_prompt is None:
            raise ValueError(
                "teacher.weights: live and no data.teacher_prompt: teacher and student would be the same at every token, so that nothing "
                "is learned; say data.teacher_prompt, such as '{prompt}\\n\\nThe answer is {answer}'"
            )
        if recipe.training.fsdp:
            raise ValueError("training.fsdp: a student that is its own teacher must be whole on each rank; leave fsdp out")
    if data.teacher_prompt is None:
        return
    if recipe.teacher is None:
        raise ValueError("data.teacher_prompt: there is no teacher to read it; add one, such as teacher={kind: self}, or leave it out")
    for key, member in members(teacher):
        if isinstance(member, CacheTeacherConfig):
            raise ValueError(f"data.teacher_prompt: {key} holds answers to the student's prompts; name the teacher itself, or leave it out")
    if recipe.capture is not None:
        raise ValueError("capture: answers to another prompt than the student's are not recorded; leave out data.teacher_prompt or capture")


def _prompts(recipe: "Recipe", rollouts: RolloutsConfig) -> None:
    data = recipe.data
    of_text = any((item.format or data.format) == "text" for item in data.sources)
    writes = rollouts.student_writes or rollouts.teacher_writes
    if of_text and writes and rollouts.prompt_tokens is None:
        raise ValueError(
            "rollouts.prompt_tokens: rows of the format text have no prompt; say how many of their first tokens are it, as in "
            "rollouts.prompt_tokens=32"
        )
    if rollouts.prompt_tokens is not None and not of_text:
        raise ValueError(f"rollouts.prompt_tokens: is for the format text, and data.format is {data.format}; leave it out")
    longest = max(sampling.max_new_tokens for sampling in (rollouts.sampling, rollouts.teacher_sampling or rollouts.sampling))
    taken = longest + (rollouts.prompt_tokens or 1)
    if writes and taken > data.max_tokens:
        raise ValueError(
            f"rollouts.sampling.max_new_tokens: {longest} and a prompt do not fit into data.max_tokens: {data.max_tokens}; raise the one "
            "or lower the other"
        )


def _teacher(recipe: "Recipe", rollouts: RolloutsConfig) -> None:
    """Who can answer text that is not written yet, and who can write it."""
    teacher = recipe.teacher
    if rollouts.teacher_writes:
        if teacher is None:
            raise ValueError(f"rollouts.author: {rollouts.author} needs a teacher that writes; add teacher: {{kind: local, path: ...}}")
        if isinstance(teacher, SelfTeacherConfig | EnsembleTeacherConfig):
            what = "the student itself" if isinstance(teacher, SelfTeacherConfig) else "several teachers"
            raise ValueError(
                f"rollouts.author: {rollouts.author} lets the teacher write, and it is {what}; say author: student, or name one teacher"
            )
        if isinstance(teacher, ServerTeacherConfig) and rollouts.author == "teacher_mixed":
            raise ValueError(
                "rollouts.author: teacher_mixed draws each token from both distributions at once, which a server does not give; name a "
                "local teacher, or say author: student"
            )
        if isinstance(teacher, ServerTeacherConfig) and teacher.backend != "vllm":
            raise ValueError(f"teacher.backend: {teacher.backend} is not asked to write; say vllm, or rollouts.author=student")
    asked = recipe.asks_teacher and (rollouts.student_writes or rollouts.teacher_writes)
    for key, member in members(teacher):
        if isinstance(member, CacheTeacherConfig) and (asked or rollouts.teacher_writes):
            raise ValueError(
                f"{key}.kind: a cache holds answers to the rows of the data set, and none to text that is not written yet; name the "
                "teacher itself, or say rollouts.author=dataset"
            )
        if isinstance(member, LocalTeacherConfig) and member.sharded and rollouts.teacher_writes:
            raise ValueError(f"{key}.sharded: a teacher that writes must be whole on each rank; leave sharded out")


def _student_text(recipe: "Recipe", rollouts: RolloutsConfig) -> None:
    objective, key = recipe.objective, "objective.on_student_text" if recipe.objective.on_student_text else "objective"
    if recipe.teacher is None:
        raise ValueError(
            "rollouts.author: without a teacher there is nothing to learn from the student's own text: a reward stands beside a "
            "divergence; add a teacher and say potstill distill (teacher={kind: self} with an adapter holds it near its base), or say "
            "author: dataset"
        )
    chosen = objective.on_student_text or objective
    if chosen.on_student_text is not None:
        raise ValueError("objective.on_student_text.on_student_text: one objective for the student's own text is enough; leave it out")
    if not chosen.asks_teacher:
        raise ValueError(
            f"{key}.{'divergence' if chosen.divergence == 'cross_entropy' else 'kd_ratio'}: the student's own text is learned by a "
            "divergence alone, never by cross-entropy; name one, as in objective.on_student_text={divergence: reverse_kl}"
        )
    if objective.on_student_text is not None and chosen.weights[1] > 0:
        weight = "kd_ratio" if chosen.kd_weight is None else "sft_weight"
        raise ValueError(f"{key}.{weight}: there is no cross-entropy on the student's own text; leave it out")
    if objective.on_student_text is None and by_drawn_tokens(objective) and learns_given_text(rollouts):
        raise ValueError(
            f"objective.{'support' if objective.support == 'written' else 'policy'}: credits tokens that the student drew, and with the "
            f"author {rollouts.author} other text is learned too; put it under objective.on_student_text"
        )
    if (by_drawn_tokens(chosen) or rollouts.reward is not None) and not rollouts.sampling.whole:
        why = "rollouts.reward" if rollouts.reward is not None and not by_drawn_tokens(chosen) else key
        raise ValueError(
            f"rollouts.sampling: {why} credits the tokens that were drawn, and with temperature 0, top_p or top_k some could never be; "
            "leave top_p and top_k out and set a temperature above 0"
        )
    follows_loss = rollouts.author == "replay" and rollouts.replay.schedule == "distillm" and rollouts.replay.start == 0
    if follows_loss and recipe.data.validation is None:
        raise ValueError(
            "rollouts.replay.schedule: distillm lets the student write once the validation loss has risen, and there is no validation set; "
            "give one, or a rollouts.replay.start above 0"
        )
    _generator(recipe, rollouts)


def _generator(recipe: "Recipe", rollouts: RolloutsConfig) -> None:
    generator, student = rollouts.generator, recipe.student
    if not isinstance(generator, VllmGeneratorConfig):
        return
    if rollouts.author == "teacher_mixed":
        raise ValueError("rollouts.generator.kind: teacher_mixed is written in this process, where both models are; say kind: local")
    adapts = student.lora is not None or student.adapter is not None
    if generator.weights == "adapter" and not adapts:
        raise ValueError("rollouts.generator.weights: adapter, and the student learns whole; add student.lora, or say push or reload")
