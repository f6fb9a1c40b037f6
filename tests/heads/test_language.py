"""Heads that answer in words: templates, verbalizers, cutting, and what cannot be done."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fit.tiny import WORDS, backbone, plan, task
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from deltatune.backbone.load import Backbone
from deltatune.data.task import Row, Task
from deltatune.errors import TaskError
from deltatune.heads.base import collate
from deltatune.heads.choose import head_for
from deltatune.heads.language import Generation, Verbalized
from deltatune.training.fit import fit_plans

WORDED = dataclasses.replace(task(), template="{text} Label:")


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_a_backbone_that_writes_no_text_says_so(family):
    on = backbone(family)
    message = f"a generation task needs a language model such as smollm2; tiny-{family} writes no text"
    with pytest.raises(TaskError, match=message):
        fit_plans(on, [plan("lora", task("generation"))])


def test_a_decoder_without_its_language_model_head_says_so():
    whole = backbone("llama")
    bare = Backbone(whole.module.base_model, whole.processor, "bare")
    with pytest.raises(
        TaskError, match="a verbalised task needs a language model such as smollm2; bare writes no text"
    ):
        head_for(WORDED, bare, 0)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{body} Label:", r"template '\{body\} Label:' names \['body'\]; the task's rows have \['text'\]"),
        ("{text} {label}", r"names \['label'\]"),
        ("{text Label:", "write {text} for a field, {{ for a brace"),
        ("{} Label:", "write {text} for a field"),
        ("{text!q}", "write {text} for a field"),
        ("{text:d}", "write {text} for a field"),
    ],
)
def test_a_template_that_does_not_fit_the_rows_is_refused(template, said):
    with pytest.raises(TaskError, match=said):
        head_for(dataclasses.replace(task(), template=template), backbone("llama"), 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            {"good": "w1 w2", "bad": "w1 w3"},
            r"verbalizer: '\w+' -> 'w1 w\d' begins like '\w+'; choose words with different",
        ),
        ({"good": " ", "bad": "w1"}, "verbalizer: 'good' -> ' ' is empty"),
    ],
)
def test_labels_whose_words_cannot_be_told_apart_are_refused(words, said):
    with pytest.raises(TaskError, match=said):
        head_for(dataclasses.replace(task(), verbalizer=words), backbone("llama"), 0)


def test_scores_are_the_models_own_logits_of_the_labels_first_tokens():
    words = {"bad": "w10 w11", "fine": "w20", "good": "w30"}
    on = backbone("llama")
    head = head_for(dataclasses.replace(WORDED, verbalizer=words), on, 0)
    assert isinstance(head, Verbalized) and head.labels == ("bad", "fine", "good")
    examples = head.encode(task().train[:6], on, 64)
    batch = collate(examples, on)
    with torch.no_grad():
        scores = head.scores(on.trunk(**batch.inputs).last_hidden_state, batch, on)
        for row, example in zip(task().train[:6], examples, strict=True):
            text = f"{row['text']} Label:"
            logits = on.module(**on.processor(text, return_tensors="pt")).logits[0, -1]
            wanted = logits[on.processor.convert_tokens_to_ids(["w10", "w20", "w30"])]
            assert torch.allclose(scores[examples.index(example)], wanted, atol=1e-4)
            assert example.target == ["bad", "fine", "good"].index(row["label"])


def test_without_words_a_label_is_its_own_word():
    assert head_for(WORDED, backbone("llama"), 0).verbalizer == {"bad": " bad", "fine": " fine", "good": " good"}


def test_the_loss_of_writing_is_that_of_the_model_on_the_answer_and_the_end(monkeypatch):
    on, data = backbone("llama"), task("generation")
    head = head_for(data, on, 0)
    assert isinstance(head, Generation)
    examples = head.encode(data.train[:5], on, 64)
    batch = collate(examples, on)
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    for i, (row, example) in enumerate(zip(data.train[:5], examples, strict=True)):
        source, answer = row["source"].split(), row["target"].split()
        assert on.processor.convert_ids_to_tokens(list(example.ids)) == [*source, *answer, "[SEP]"]
        labels[i, len(source) : len(example.ids)] = torch.tensor(example.ids[len(source) :])
    with torch.no_grad():
        expected = float(on.module(**batch.inputs, labels=labels).loss)
        hidden = on.trunk(**batch.inputs).last_hidden_state
        assert float(head.loss(hidden, batch, on)) == pytest.approx(expected, abs=1e-5)
        monkeypatch.setattr("deltatune.heads.language.CHUNK", 3)
        assert float(head.loss(hidden, batch, on)) == pytest.approx(expected, abs=1e-5)


def test_an_answer_has_room_for_the_longest_of_train_and_half_of_the_limit_at_most():
    on = backbone("llama")
    data = dataclasses.replace(task("generation"), train=[{"source": "w1", "target": " ".join(WORDS[:10])}] * 3)
    head = head_for(data, on, 0)
    assert head.new_tokens == 14 and head.room(64) == (49, 14) and head.room(20) == (9, 10)
    (example,) = head.encode([{"source": " ".join(WORDS), "target": " ".join(WORDS)}], on, 20)
    assert len(example.ids) == 20


@cache
def byte_level() -> Backbone:
    """A language model whose tokens are bytes and a few merges, as those of GPT-2, Llama 3 and SmolLM2 are."""
    made = Tokenizer(BPE())
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    corpus = ["Review: the film was good\nLabel:", "Is the answer true? Summary: a text"] * 5
    trainer = BpeTrainer(
        vocab_size=330, initial_alphabet=ByteLevel.alphabet(), special_tokens=["<end>"], show_progress=False
    )
    made.train_from_iterator(corpus, trainer)
    processor = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
    return Backbone(backbone("llama").module, processor, "bytes")


TEMPLATES = ("Review: {text}\nLabel:", "{text}\nLabel:", "Is {text} true? Answer: ")


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=120), st.sampled_from(TEMPLATES), st.integers(20, 60))
def test_a_long_text_is_cut_and_its_template_is_not(text, template, limit):
    on = byte_level()
    row: Row = {"text": text, "label": "a"}
    (example,) = Verbalized(template, {"a": " a", "b": " b"}).encode([row], on, limit)
    before, after = template.split("{text}")
    said = on.processor.decode(example.ids, clean_up_tokenization_spaces=False)
    assert len(example.ids) <= limit and said.startswith(before) and said.endswith(after)
    kept = said.removeprefix(before).removesuffix(after)
    assert text.startswith(kept)
    if len(on.processor(template.format(text=text))["input_ids"]) <= limit:
        assert kept == text or len(text.encode()) > limit - 20
    else:
        assert len(kept.encode()) >= min(len(text.encode()), 1) or limit < 24


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=80), st.text(max_size=80), st.integers(24, 64), st.integers(1, 40))
def test_a_prompt_and_its_answer_fit_the_limit_with_the_template_whole(source, target, limit, new_tokens):
    on = byte_level()
    head = Generation("Say: {source}\nSummary:", new_tokens)
    row: Row = {"source": source, "target": target}
    (example,), (prompt,) = head.encode([row], on, limit), head.prompts([row], on, limit)
    assert example.ids[: len(prompt.ids)] == prompt.ids
    assert len(example.ids) <= limit and len(prompt.ids) + head.room(limit)[1] <= limit
    said = on.processor.decode(prompt.ids, clean_up_tokenization_spaces=False)
    assert said.startswith("Say: ") and said.endswith("\nSummary:")
    assert example.ids[-1] == on.processor.eos_token_id
    # What is learnt stands one place before what is read, from the last token of the prompt on.
    wanted = [-100] * (len(prompt.ids) - 1) + [*example.ids[len(prompt.ids) :]] + [-100]
    assert example.target == wanted


def test_both_texts_of_a_pair_are_cut():
    on = byte_level()
    row = {"text": "a" * 200, "text_b": "b" * 200, "label": "a"}
    (example,) = Verbalized("{text} / {text_b} same?", {"a": " a", "b": " b"}).encode([row], on, 40)
    said = on.processor.decode(example.ids, clean_up_tokenization_spaces=False)
    assert len(example.ids) <= 40 and said.count("a") > 5 and said.count("b") > 5 and said.endswith(" same?")


def test_a_template_that_leaves_no_room_is_refused():
    on = byte_level()
    with pytest.raises(TaskError, match=r"template .* takes \d+ of 10 tokens; shorten it, or raise max_length"):
        Verbalized("Review of a rather long kind: {text}\nLabel:", {"a": " a"}).encode([{"text": "x"}], on, 10)


def test_written_answers_end_at_the_end_token_and_keep_to_their_room():
    on, data = backbone("llama"), task("generation")
    (trained,) = fit_plans(on, [plan("lora", data)])
    assert isinstance(trained.delta.head, Generation)
    assert all(len(value.split()) <= trained.delta.head.new_tokens for value in trained.test.values)
    assert not any("[SEP]" in value or "[PAD]" in value for value in trained.test.values)


def test_every_accepted_answer_counts():
    rows = [{"source": "w1", "target": "w2", "targets": ["w2", "w3"]}] * 3
    data = Task("many", "generation", "exact_match", rows, rows, rows)
    on = backbone("llama")
    (trained,) = fit_plans(on, [plan("lora", data, steps=1)])
    said = trained.test.values[0]
    taught = [{**row, "targets": ["w2", said]} for row in rows]
    (again,) = fit_plans(on, [plan("lora", dataclasses.replace(data, dev=taught, test=taught), steps=1)])
    assert trained.metrics["test"]["exact_match"] == float(said in ("w2", "w3"))
    assert again.metrics["test"]["exact_match"] == 1.0 or again.test.values[0] != said
