"""Greedy answers: batches equal single prompts and transformers' own greedy search; nothing of a model's sampling settings leaks in."""

import json

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from potstill.errors import DataError
from potstill.evaluation.exact_match import Question, answer_ends, exact_match, generate_greedily, stop_tokens
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig
from potstill.models.loading import load_model, load_tokenizer
from tiny import save_pair, tiny_llama, tiny_tokenizer

VOCABULARY = 320
LENGTHS = (3, 11, 1, 7, 7, 15, 2)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model():
    made = tiny_llama(3)
    with torch.no_grad():
        made.lm_head.weight.mul_(10)
    return CausalLM(made, VOCABULARY)


@pytest.fixture(scope="module")
def prompts():
    generator = np.random.default_rng(0)
    return [generator.integers(3, VOCABULARY, length).tolist() for length in LENGTHS]


def theirs(model, prompt, stops, max_new_tokens):
    """transformers' generate, one prompt, with every setting stated."""
    settings = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=sorted(stops), pad_token_id=0)
    tokens = torch.tensor([prompt])
    found = model.model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    written = found[0, len(prompt) :].tolist()
    return (written[:-1], True) if written[-1] in stops else (written, False)


@pytest.fixture
def stops(model, prompts):
    """Tokens that these prompts' answers reach at different steps, so that some stop early, some late and some never."""
    free = generate_greedily(model, prompts, max_new_tokens=12, stop_tokens=frozenset({VOCABULARY + 1}), batch_size=1)
    return frozenset({free[0][0][2], free[1][0][7]})


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_batches_answer_as_single_prompts_and_as_transformers_do(model, prompts, stops, batch_size):
    expected = [theirs(model, prompt, stops, 12) for prompt in prompts]
    assert {stopped for _, stopped in expected} == {True, False}
    assert len({len(tokens) for tokens, _ in expected}) > 2
    assert generate_greedily(model, prompts, max_new_tokens=12, stop_tokens=stops, batch_size=1) == expected
    assert generate_greedily(model, prompts, max_new_tokens=12, stop_tokens=stops, batch_size=batch_size) == expected


def test_positions_are_counted_from_a_prompts_own_beginning(prompts):
    """Learned positions, unlike rotary ones, would tell how much padding stands on the left."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4, eos_token_id=2)
        model = CausalLM(GPT2LMHeadModel(config).eval(), VOCABULARY)
    alone = generate_greedily(model, prompts, max_new_tokens=8, stop_tokens=frozenset({2}), batch_size=1)
    assert generate_greedily(model, prompts, max_new_tokens=8, stop_tokens=frozenset({2}), batch_size=7) == alone


def test_the_models_own_sampling_settings_do_not_leak_in(model, prompts, stops):
    expected = generate_greedily(model, prompts, max_new_tokens=12, stop_tokens=stops)
    model.model.generation_config.update(
        do_sample=True, temperature=3.0, top_k=5, repetition_penalty=8.0, no_repeat_ngram_size=1, max_new_tokens=2, min_new_tokens=9,
        suppress_tokens=[expected[1][0][0]],
    )  # fmt: skip
    assert generate_greedily(model, prompts, max_new_tokens=12, stop_tokens=stops) == expected


def test_every_end_of_text_stops(model, tokenizer):
    model.model.generation_config.eos_token_id = [7, 9]
    model.model.config.eos_token_id = 11
    assert stop_tokens(model, tokenizer) == {7, 9, 11, tokenizer.eos_token_id}


def test_a_model_without_any_end_of_text_is_refused(model, tokenizer):
    model.model.generation_config.eos_token_id = model.model.config.eos_token_id = None
    nameless = tiny_tokenizer()
    nameless.eos_token = None
    with pytest.raises(DataError, match="end-of-sequence"):
        stop_tokens(model, nameless)


def test_padded_vocabulary_is_never_chosen(prompts):
    wide = tiny_llama(3, vocabulary_size=VOCABULARY + 32)
    with torch.no_grad():
        wide.lm_head.weight[VOCABULARY:] *= 1000
    model = CausalLM(wide, VOCABULARY)
    for tokens, _ in generate_greedily(model, prompts, max_new_tokens=8, stop_tokens=frozenset({2})):
        assert max(tokens, default=0) < VOCABULARY


def test_answers_are_checked_and_kept_in_the_order_of_the_questions(model, tokenizer, prompts, stops):
    model.model.generation_config.eos_token_id = sorted(stops)
    seen = []
    questions = [
        Question(prompt, lambda text, number=number: seen.append((number, text)) or number % 2 == 0, 100 + number)
        for number, prompt in enumerate(prompts)
    ]
    counted = []
    found = exact_match(model, tokenizer, questions, max_new_tokens=12, batch_size=3, on_answers=counted.append)
    written = generate_greedily(model, prompts, max_new_tokens=12, stop_tokens=stop_tokens(model, tokenizer))
    assert [answer.index for answer in found.answers] == [100 + number for number in range(len(prompts))]
    assert [(list(answer.tokens), answer.stopped) for answer in found.answers] == written
    assert seen == [(number, tokenizer.decode(tokens, skip_special_tokens=True)) for number, (tokens, _) in enumerate(written)]
    assert found.accuracy.value == pytest.approx(4 / 7)
    assert found.accuracy.count == 7
    assert found.correct.tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert counted == [3, 3, 1]


def test_an_answer_that_is_cut_says_so(model, prompts, stops):
    expected = generate_greedily(model, prompts[:1], max_new_tokens=12, stop_tokens=stops)
    assert expected[0][1]
    assert generate_greedily(model, prompts[:1], max_new_tokens=len(expected[0][0]), stop_tokens=stops) == [(expected[0][0], False)]


def test_nothing_to_ask_and_nothing_to_continue_are_refused(model, tokenizer, stops):
    with pytest.raises(DataError, match="no question"):
        exact_match(model, tokenizer, [], max_new_tokens=4)
    with pytest.raises(DataError, match="prompt 1 is empty"):
        generate_greedily(model, [[3], []], max_new_tokens=4, stop_tokens=stops)


def test_the_mode_is_given_back(model, prompts, stops):
    model.train()
    generate_greedily(model, prompts[:1], max_new_tokens=2, stop_tokens=stops)
    assert model.training


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": 5}, {"eos_token_id": [5, 6]}])
@pytest.mark.parametrize("configured", [None, 7, [7, 8]])
def test_the_ends_of_a_model_are_known_before_it_is_loaded(tmp_path, generation, configured):
    save_pair(tmp_path / "model")
    saved, file = (tmp_path / "model" / name for name in ("config.json", "generation_config.json"))
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"eos_token_id": configured}))
    file.unlink(missing_ok=True)
    if generation is not None:
        file.write_text(json.dumps(generation))
    config = LoadingConfig(path=str(tmp_path / "model"))
    tokenizer = load_tokenizer(config)
    assert {*answer_ends(config, tokenizer)} == stop_tokens(CausalLM(load_model(config), 320), tokenizer)
