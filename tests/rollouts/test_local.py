"""The local generator: transformers' own greedy text on every family, and answers that depend on their own seed alone."""

import pytest
import torch

from local_writing import PROMPTS, STOPS, greedy_by_transformers, local_generator, tokens_of
from potstill.errors import ModelError, UsageError
from potstill.models.causal_lm import CausalLM
from potstill.rollouts.local import LocalGenerator
from potstill.rollouts.writing import Prompt, Sampling
from tiny import tiny_llama
from tiny_families import FAMILIES, family_model

# A plain cache, learned positions, windows of 4 tokens with a soft-cap, windows alone, positions from the mask.
QUICK = ("llama", "qwen2", "gpt2", "gemma2", "mistral", "bloom", "opt")


def _families() -> list:
    """All but the one without such a cache, and the one whose head is refused when it is loaded."""
    fitting = sorted(set(FAMILIES) - {"mamba", "minicpm3"})
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in fitting]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", _families())
def test_greedy_text_is_that_of_transformers_token_for_token(family):
    model = family_model(family)
    found = local_generator(model).generate(PROMPTS, Sampling(temperature=0, max_new_tokens=20))
    assert [list(answer.tokens) for answer in found] == greedy_by_transformers(model, PROMPTS, 20)
    for answer in found:
        assert answer.ended == (answer.tokens[-1] in STOPS)
        assert answer.ended or len(answer.tokens) == 20


def test_a_family_without_a_key_value_cache_is_refused_by_name():
    with pytest.raises(ModelError, match="MambaForCausalLM keeps no key-value cache"):
        local_generator(family_model("mamba"))


def test_an_answer_depends_on_its_own_seed_and_prompt_alone():
    model = tiny_llama(vocabulary_size=96)
    sampling = Sampling(max_new_tokens=20)
    together = local_generator(model).generate(PROMPTS, sampling)
    assert len({len(answer.tokens) for answer in together}) > 2  # rows left the batch at different tokens
    for size in (1, 2, 4):
        for answer, other in zip(together, local_generator(model, batch_size=size).generate(PROMPTS, sampling), strict=True):
            assert other.tokens == answer.tokens
            assert other.log_probs == pytest.approx(answer.log_probs, abs=1e-5)
    backwards = local_generator(model).generate(PROMPTS[::-1], sampling)[::-1]
    assert [answer.tokens for answer in backwards] == [answer.tokens for answer in together]


def test_an_empty_prompt_is_refused():
    with pytest.raises(UsageError, match="prompt 1 has no token"):
        local_generator(tiny_llama(vocabulary_size=96)).generate([PROMPTS[0], Prompt((), 1)], Sampling())


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_prompt_beyond_a_table_of_positions_is_refused_before_anything_is_written(family):
    model = family_model(family)
    fits, beyond = Prompt(tokens_of(55, 0), 0), Prompt(tokens_of(56, 0), 0)
    assert len(local_generator(model, stop_ids=[]).generate([fits], Sampling(max_new_tokens=10))[0].tokens) == 10
    with pytest.raises(UsageError, match=r"reads at most 64 tokens, and prompt 1 with an answer of 10 has 65"):
        local_generator(model).generate([fits, beyond], Sampling(max_new_tokens=10))


def test_positions_that_are_computed_have_no_end():
    answer = local_generator(family_model("llama"), stop_ids=[]).generate([Prompt(tokens_of(60, 0), 0)], Sampling(max_new_tokens=10))[0]
    assert len(answer.tokens) == 10


def test_no_prompts_no_answers():
    assert local_generator(tiny_llama(vocabulary_size=96)).generate([], Sampling()) == []


def _log_probs_of(model, prompt: Prompt, answer) -> torch.Tensor:
    """Of the drawn tokens by one forward pass over prompt and answer without a cache, float64 from the logits on: [T]."""
    tokens = torch.tensor([prompt.tokens + answer.tokens])
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt.tokens) - 1 : -1, :96]
    return logits.double().log_softmax(-1)[range(len(answer.tokens)), list(answer.tokens)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", _families())
def test_log_probabilities_are_those_of_a_forward_pass_while_rows_leave(family):
    model = family_model(family)
    answers = LocalGenerator(CausalLM(model, 96), stop_ids=range(12), pad_token=0).generate(PROMPTS, Sampling(max_new_tokens=24))
    assert len({len(answer.tokens) for answer in answers}) > 2
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert list(answer.log_probs) == pytest.approx(_log_probs_of(model, prompt, answer).tolist(), abs=1e-5)


def test_padding_of_every_row_is_forgotten_once_the_long_prompts_have_ended():
    model = tiny_llama(vocabulary_size=96)
    prompts = [Prompt(tokens_of(60, 1), 1), *PROMPTS]
    widths = []
    handle = model.model.layers[0].self_attn.register_forward_hook(
        lambda _module, _inputs, kwargs, _output: widths.append(kwargs["past_key_values"].layers[0].keys.shape[-2]), with_kwargs=True
    )
    # Whichever token comes first ends the long prompt's answer, so that it leaves at once.
    first = local_generator(model, stop_ids=[]).generate(prompts[:1], Sampling(max_new_tokens=1))[0].tokens[0]
    widths.clear()
    answers = local_generator(model, stop_ids=[first]).generate(prompts, Sampling(max_new_tokens=30))
    handle.remove()
    assert len(answers[0].tokens) == 1
    assert widths[0] == 60
    assert widths[1] == 13  # the longest prompt that is left, and one token
    for prompt, answer in zip(prompts, answers, strict=True):
        assert list(answer.log_probs) == pytest.approx(_log_probs_of(model, prompt, answer).tolist(), abs=1e-5)


def test_a_prompt_that_is_asked_several_times_is_read_once():
    model = tiny_llama(vocabulary_size=96)
    prompts = [Prompt(PROMPTS[0].tokens, seed) for seed in range(6)] + [PROMPTS[2]]
    sizes = []
    handle = model.model.embed_tokens.register_forward_hook(lambda _module, inputs, _output: sizes.append(tuple(inputs[0].shape)))
    answers = local_generator(model, stop_ids=[]).generate(prompts, Sampling(max_new_tokens=3))
    handle.remove()
    assert sizes == [(2, 9), (7, 1), (7, 1)]
    assert len({answer.tokens for answer in answers[:6]}) > 1
    alone = [local_generator(model, stop_ids=[]).generate([prompt], Sampling(max_new_tokens=3))[0].tokens for prompt in prompts]
    assert [answer.tokens for answer in answers] == alone


def test_the_rows_of_the_head_beyond_the_tokens_are_never_drawn():
    model = tiny_llama(vocabulary_size=128)
    with torch.no_grad():
        model.lm_head.weight[96:] = 50 * model.lm_head.weight[:32]  # louder than any real token
    for sampling in (Sampling(max_new_tokens=12), Sampling(temperature=0, max_new_tokens=12)):
        answers = local_generator(model).generate(PROMPTS, sampling)
        assert max(token for answer in answers for token in answer.tokens) < 96
    sampled = local_generator(model).generate(PROMPTS, Sampling(max_new_tokens=12))
    for prompt, answer in zip(PROMPTS, sampled, strict=True):
        assert list(answer.log_probs) == pytest.approx(_log_probs_of(model, prompt, answer).tolist(), abs=1e-5)


def test_what_the_model_says_of_generation_is_not_read():
    model = tiny_llama(vocabulary_size=96)
    before = local_generator(model).generate(PROMPTS, Sampling(max_new_tokens=8))
    settings = model.generation_config
    settings.top_k, settings.temperature, settings.eos_token_id, settings.max_length = 1, 0.1, list(range(96)), 3
    settings.repetition_penalty, settings.use_cache = 5.0, False
    model.config.use_cache = False
    assert local_generator(model).generate(PROMPTS, Sampling(max_new_tokens=8)) == before


# ---------------------------------------------------------------- what is around it stays as it was


def test_training_mode_gradients_and_random_states_stay_and_dropout_does_not_act():
    model = tiny_llama(vocabulary_size=96, attention_dropout=0.5)
    still = local_generator(model).generate(PROMPTS, Sampling(max_new_tokens=8))
    model.train()
    generator = local_generator(model)
    model.model.layers[1].eval()
    state = torch.get_rng_state()
    assert generator.generate(PROMPTS, Sampling(max_new_tokens=8)) == still
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.model.layers[0].self_attn.training
    assert not model.model.layers[1].training
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_cache_is_on_under_activation_checkpointing_which_stays_on():
    model = tiny_llama(vocabulary_size=96)
    still = local_generator(model).generate(PROMPTS, Sampling(max_new_tokens=8))
    model.train()
    model.activation_checkpointing_enable()
    lengths = []
    model.model.embed_tokens.register_forward_hook(lambda _module, inputs, _output: lengths.append(inputs[0].shape[1]))
    assert local_generator(model).generate(PROMPTS, Sampling(max_new_tokens=8)) == still
    assert lengths == [12] + [1] * 7
    assert model.model.layers[0].gradient_checkpointing


def test_what_heeding_raises_ends_the_writing_and_the_mode_comes_back():
    model = tiny_llama(vocabulary_size=96).train()
    generator, asked = local_generator(model, stop_ids=[]), []

    def check() -> None:
        asked.append(None)
        if len(asked) == 5:
            raise KeyboardInterrupt

    generator.heed(check)
    with pytest.raises(KeyboardInterrupt):
        generator.generate(PROMPTS, Sampling(max_new_tokens=8))
    assert model.training
    assert len(asked) == 5


def test_the_version_is_the_step_that_was_said_last():
    generator = local_generator(tiny_llama(vocabulary_size=96))
    assert generator.generate(PROMPTS[:1], Sampling(max_new_tokens=2))[0].version == 0
    generator.refresh(7)
    assert generator.generate(PROMPTS[:1], Sampling(max_new_tokens=2))[0].version == 7


# ---------------------------------------------------------------- ranks that share the parameters


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_rank_without_rows_steps_along_as_often_as_the_others(batch_size):
    """Two ranks as two threads that meet before every forward: neither may be there once more than the other."""
    import threading

    meeting, words = threading.Barrier(2, timeout=60), {}
    forwards = {0: 0, 1: 0}

    models = [tiny_llama(vocabulary_size=96) for _ in range(2)]  # not in the threads: they share torch's random state

    def work(rank: int, prompts: list[Prompt], found: dict) -> None:
        def agree(more: bool) -> bool:
            words[rank] = more
            meeting.wait()
            any_more = any(words.values())
            meeting.wait()
            return any_more

        def counted(*_) -> None:
            forwards[rank] += 1

        models[rank].model.register_forward_hook(counted)
        generator = local_generator(models[rank], agree=agree, batch_size=batch_size)
        found[rank] = generator.generate(prompts, Sampling(max_new_tokens=9))

    found: dict = {}
    threads = [threading.Thread(target=work, args=(rank, part, found)) for rank, part in enumerate((PROMPTS, PROMPTS[:1]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert forwards[0] == forwards[1] > 0
    alone = local_generator(tiny_llama(vocabulary_size=96)).generate(PROMPTS, Sampling(max_new_tokens=9))
    assert [answer.tokens for answer in found[0]] == [answer.tokens for answer in alone]
    assert [answer.tokens for answer in found[1]] == [alone[0].tokens]


def test_the_parameters_of_the_root_are_asked_for_around_everything():
    from contextlib import contextmanager

    model, inside = tiny_llama(vocabulary_size=96), []

    @contextmanager
    def enter():
        inside.append(True)
        yield
        inside.pop()

    seen = []
    model.model.register_forward_hook(lambda *_: seen.append(bool(inside)))
    local_generator(model, enter=enter).generate(PROMPTS[:2], Sampling(max_new_tokens=3))
    assert seen == [True] * 3
    assert not inside
