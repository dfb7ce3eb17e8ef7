"""Laws of training on text that is written during training: a real student writes, real models answer, the real loop learns."""

from dataclasses import replace

import pytest
import torch

from faultfs import without_syncing
from potstill.run_folder import RunFolder
from potstill.training.turns import Feed
from small_runs import Run, digest, examples, execute, furthest, make_distiller, make_teacher, weights

# Windows of 8, the last of an epoch short.
RUN = Run(divergence="reverse_kl", num_examples=13, num_validation=4, author="student").but(
    batch_size=2, accumulation=4, epochs=None, steps=3, save_steps=100, eval_steps=2
)


@pytest.fixture(autouse=True)
def _unsynced():
    with without_syncing():
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The run, its weights and its folder."""
    path = tmp_path_factory.mktemp("on_policy") / "run"
    with without_syncing():
        distiller, summary = execute(RUN, path)
    return weights(distiller), summary, RunFolder.read(path)


def _lines(folder: RunFolder) -> list[dict]:
    return [line for line in folder.read_metrics() if "loss" in line]


def test_the_student_learns_from_its_own_text(done):
    trained, summary, folder = done
    assert furthest(trained, weights(make_distiller(RUN))) > 1e-3
    lines = _lines(folder)
    lengths = [line["rollouts/length"] for line in lines]
    # What was learned from is what was written: the prompts are no targets, and every answer's token is one.
    assert summary.target_tokens == sum(length * rows for length, rows in zip(lengths, (8, 5, 8), strict=True))
    assert len(set(lengths)) > 1
    # A forward pass over the written text finds the entropy that the drawing estimated: both average -log q over the same tokens.
    assert [line["loss/ce"] for line in lines] == pytest.approx([line["rollouts/entropy"] for line in lines], abs=1e-4)
    assert all(line["loss/student"] == pytest.approx(line["loss"], rel=1e-6) and line["rollouts/staleness"] == 0 for line in lines)
    assert [line["step"] for line in folder.read_rollouts()] == [1, 1, 2, 2, 3, 3]
    assert folder.read_rollouts()[0]["answer"].startswith("(")


def test_a_mixture_without_the_student_is_the_data_set_bit_for_bit(tmp_path):
    off_policy = replace(RUN, author=None)
    found = []
    for name, run in (("mixture", replace(RUN, author="mixture", share=0.0)), ("data_set", off_policy)):
        distiller, _ = execute(run, tmp_path / name)
        found.append(digest(weights(distiller)))
    assert found[0] == found[1]
    names = ("step", "loss", "loss/ce", "loss/kd", "grad_norm", "target_tokens")
    left, right = ([[line[key] for key in names] for line in _lines(RunFolder.read(tmp_path / name))] for name in ("mixture", "data_set"))
    assert left == right


def test_a_mixture_of_the_student_alone_is_the_student(done, tmp_path):
    distiller, _ = execute(replace(RUN, author="mixture", share=1.0), tmp_path / "run")
    assert digest(weights(distiller)) == digest(done[0])


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (1, 8)])
def test_how_a_step_is_cut_into_micro_batches_does_not_matter(batch_size, accumulation, done, tmp_path):
    distiller, summary = execute(RUN.but(batch_size=batch_size, accumulation=accumulation), tmp_path / "run")
    assert summary.target_tokens == done[1].target_tokens
    assert furthest(weights(distiller), done[0]) < 1e-6


def test_counting_before_the_text_is_written_would_show(done, tmp_path, monkeypatch):
    """The law above has teeth: with the counts of the rows as they stood in the data, the weights are others."""
    from potstill.training.seam import DistillationTrainer

    def of_the_data(trainer, turn):
        return trainer.feed.training.batch(turn.batch.examples).num_targets

    monkeypatch.setattr(DistillationTrainer, "count", of_the_data)
    distiller, _ = execute(RUN, tmp_path / "run")
    assert furthest(weights(distiller), done[0]) > 1e-5


@pytest.mark.parametrize("author", ["student", "teacher_mixed"])
def test_a_teacher_that_is_the_student_gives_no_gradient(author, tmp_path, monkeypatch):
    """Nothing to learn, whoever's tokens were drawn: the divergence of equal distributions is zero, and so is its gradient."""
    import small_runs

    def same():
        from potstill.teachers.local import LocalTeacher

        return LocalTeacher(small_runs.make_student("plain"))

    monkeypatch.setattr(small_runs, "make_teacher", same)
    execute(replace(RUN, author=author).but(steps=1, weight_decay=0.0), tmp_path / "run")
    line = _lines(RunFolder.read(tmp_path / "run"))[0]
    assert abs(line["loss"]) < 1e-7
    assert line["grad_norm"] < 1e-6


def test_two_streams_each_count_their_own(tmp_path):
    """The loss of a step with two texts is the weighted sum of two means, each over its own targets."""
    run = replace(RUN, author="pair", kd_ratio=1.0).but(steps=1)
    execute(run, tmp_path / "run")
    line = _lines(RunFolder.read(tmp_path / "run"))[0]
    assert line["loss"] == pytest.approx(0.7 * line["loss/student"] + 1.3 * line["loss/teacher"], rel=1e-5)
    assert line["rollouts/length"] != line["rollouts/teacher/length"]


def test_the_teachers_text_is_learned_with_the_recipes_objective(tmp_path):
    distiller, _ = execute(replace(RUN, author="teacher"), tmp_path / "run")
    line = _lines(RunFolder.read(tmp_path / "run"))[0]
    assert line["loss"] == pytest.approx(0.5 * line["loss/ce"] + 0.5 * line["loss/kd"], rel=1e-5)
    assert "rollouts/length" not in line
    assert line["rollouts/teacher/length"] > 0
    assert furthest(weights(distiller), weights(make_distiller(RUN))) > 1e-3
    assert {text["by"] for text in RunFolder.read(tmp_path / "run").read_rollouts()} == {"teacher"}


def test_turns_are_equally_many_whatever_is_written():
    """What an author writes changes no rank's number of micro-batches: ranks meet after each of them."""
    from potstill.training.feeding import Rows
    from potstill.training.order import GlobalOrder
    from potstill.training.processes import Ranks
    from small_runs import make_author

    rows = Rows(examples(13), pad_token=0, seed=3, max_tokens=None)
    order = GlobalOrder(rows.lengths, seed=3, batch_size=2, accumulation=4)
    distiller = make_distiller(RUN)
    author = make_author(replace(RUN, author="pair"), distiller.student, make_teacher(), Ranks(), examples(13))
    feed = Feed(order, rows, None, author)
    for step in range(2):
        for world_size in (1, 2):
            for rank in range(world_size):
                turns = feed.turns(order.window(step), rank, world_size)
                assert len(turns) == 2 * 4 // world_size
                assert all(turn.batch.log_probs is not None for turn in turns if turn.stream == "student" and turn.batch.num_targets)
                assert not turns[-1].everywhere_empty


def test_writing_leaves_the_random_numbers_alone(tmp_path):
    """Dropout of the trained forward is a function of the micro-batch; the student writes without any."""
    from potstill.training.processes import Ranks
    from small_runs import make_author, make_student

    student = make_student("plain", 0.3)
    student.train()
    author = make_author(RUN, student, None, Ranks(), examples(13))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = author.write("student", [0, 1, 2], 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == author.write("student", [0, 1, 2], 0)
    assert student.training
    assert first != author.write("student", [0, 1, 2], 1)


# ---------------------------------------------------------------- what is compared, and what is kept


@pytest.mark.parametrize("kind", ["plain", "lora", "lora_head", "checkpointed"])
def test_credit_is_taken_without_dropout(kind, tmp_path, monkeypatch):
    """Text is drawn without dropout, so the ratio to it is taken without: a teacher that is the student then credits nothing."""
    import small_runs
    from potstill.objectives.distribution import DistributionMatching
    from potstill.objectives.policy import PolicyGradient
    from potstill.teachers.local import LocalTeacher
    from potstill.training.distiller import Distiller

    monkeypatch.setattr(small_runs, "make_teacher", lambda: LocalTeacher(small_runs.make_student(kind)))
    own = PolicyGradient(support="written", vocabulary_size=small_runs.VOCABULARY)
    of_data = DistributionMatching(vocabulary_size=small_runs.VOCABULARY)
    distiller = Distiller(small_runs.make_student(kind, dropout=0.3), {"dataset": of_data, "student": own})
    execute(replace(RUN, student=kind).but(steps=1), tmp_path / "run", distiller=distiller)
    line = _lines(RunFolder.read(tmp_path / "run"))[0]
    assert line["grad_norm"] < 1e-6
    assert line["loss/ce"] == pytest.approx(line["rollouts/entropy"], abs=1e-4)


def test_other_streams_keep_their_dropout(tmp_path):
    """It is off for the credited stream alone, and on again in the next micro-batch."""
    import small_runs

    def trained(name, dropout):
        run = replace(RUN, author="pair", rewarded=True, dropout=dropout).but(steps=1)
        execute(run, tmp_path / name, distiller=small_runs.make_distiller(run))
        return _lines(RunFolder.read(tmp_path / name))[0]

    with_dropout, without = trained("with", 0.5), trained("without", 0.0)
    assert with_dropout["loss/student"] == pytest.approx(without["loss/student"], rel=1e-6)
    assert with_dropout["loss/teacher"] != pytest.approx(without["loss/teacher"], rel=1e-6)


def test_an_author_hears_of_nats_a_target_however_the_objective_sums(tmp_path, monkeypatch):
    from potstill.rollouts.authors import OneAuthor

    heard: dict[str, list[float]] = {"token_mean": [], "seq_sum": []}
    for reduction, losses in heard.items():
        monkeypatch.setattr(OneAuthor, "validated", lambda author, loss, losses=losses: losses.append(loss))
        execute(replace(RUN, reduction=reduction).but(steps=1, eval_steps=1, learning_rate=1e-30), tmp_path / reduction)
    assert len(heard["token_mean"]) == 1
    assert heard["seq_sum"] == pytest.approx(heard["token_mean"], rel=1e-5)


def test_a_teacher_that_follows_hears_of_steps_that_were_taken_alone(tmp_path, monkeypatch):
    import small_runs
    from potstill.teachers.local import LocalTeacher
    from potstill.training.seam import DistillationTrainer

    class Following(LocalTeacher):
        steps = 0

        def step_done(self) -> None:
            self.steps += 1

    made = []

    def teacher():
        made.append(Following(make_teacher().causal_lm))
        return made[-1]

    guard = DistillationTrainer.refuse_non_finite

    def broken(trainer):
        if trainer.state.global_step == 1:
            trainer.grad_norm = float("nan")
        guard(trainer)

    monkeypatch.setattr(small_runs, "make_teacher", teacher)
    monkeypatch.setattr(DistillationTrainer, "refuse_non_finite", broken)
    _, summary = execute(RUN.but(non_finite={"skip": 1}), tmp_path / "run")
    assert summary.non_finite_steps == 1
    assert made[-1].steps == summary.steps - 1 == 2
