"""The generator of Pip: a seed fixes the corpus, answers carry the loss, and a run leaves a base that loads."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from treadle_engine.bases.pip_generator.corpus import Document, documents
from treadle_engine.bases.pip_generator.facts import all_facts
from treadle_engine.bases.pip_generator.tokenizer import VOCAB_SIZE, train_tokenizer
from treadle_engine.bases.pip_generator.train import generate, pack


def _documents(count: int, seed: int = 0) -> list[Document]:
    return list(islice(documents(seed, lambda _: 0.05), count))


def test_a_seed_fixes_the_corpus() -> None:
    """The same seed gives the same documents; another seed gives others."""
    assert _documents(200) == _documents(200)
    assert _documents(200) != _documents(200, seed=1)


def test_facts_do_not_contradict_each_other() -> None:
    """No question has two answers."""
    facts = all_facts()
    assert len({fact.question for fact in facts}) == len(facts)


def test_a_tokenizer_gives_text_back_and_keeps_turn_marks_whole() -> None:
    """Any text round-trips, each mark is one token, and the chat template opens the assistant's turn."""
    tokenizer = train_tokenizer(_documents(1000))
    assert len(tokenizer) == VOCAB_SIZE
    text = "Tell me: 12 + 30 = 42?\n caf\u00e9 <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_end|>") == [2]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello!"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"


def test_packed_documents_restart_positions_and_learn_answers_most() -> None:
    """Each document starts at position 0, is whole, and only text and turn ends carry weight."""
    tokenizer = train_tokenizer(_documents(1000))

    def stream() -> Iterator[Document]:
        yield from documents(3, lambda _: 0.0)

    rows = next(pack(stream(), tokenizer))
    assert rows.ids_BL.shape == rows.positions_BL.shape == rows.weights_BL.shape
    steps_BL = rows.positions_BL.diff(dim=1)
    assert bool(((steps_BL == 1) | (rows.positions_BL[:, 1:] == 0)).all())
    weights = {round(weight, 3) for weight in rows.weights_BL.flatten().tolist()}
    assert weights == {0.0, 0.1, 1.0}
    assert bool((rows.weights_BL[rows.ids_BL == 1] == 0.0).all())  # nobody predicts that a turn starts


def test_a_short_run_leaves_a_base_that_loads(tmp_path: Path) -> None:
    """The loss falls, and the folder is a Hugging Face model with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    losses: list[float] = []
    last = generate(tmp_path, 5_000, 0, lambda _step, _num_steps, loss: losses.append(loss))
    assert last < losses[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.num_parameters() == 869_760
    assert len(AutoTokenizer.from_pretrained(tmp_path)) <= VOCAB_SIZE
