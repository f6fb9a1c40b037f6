"""Chat: which tokens are learnt, packing, scores, and the next answer."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from tests.fit.tiny import QUICK, backbone, furthest, jobs_of, plan, tensors
from tests.heads.paired import rows_of, write

from deltatune.backbone.load import Backbone, load
from deltatune.compose.expression import parse
from deltatune.data.load import load_task
from deltatune.data.metrics import majority, score
from deltatune.data.task import Task
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.errors import TaskError
from deltatune.heads.base import collate
from deltatune.heads.chat import Chat, answered
from deltatune.heads.choose import head_for
from deltatune.studies.verbs import run_plans
from deltatune.training.engine import Engine
from deltatune.training.evaluate import predict
from deltatune.training.job import Plan, batch_of

PLAIN = (
    "{% for m in messages %}{{ 'Label: ' if m.role == 'user' else 'Answer: ' if m.role == 'assistant' else 'fine ' }}"
    "{{ m.content + ' [SEP] ' }}{% if m.role == 'assistant' %}{{ 'good ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'Answer: ' }}{% generation %}"
    "{{ m.content + ' [SEP]' }}{% endgeneration %}{{ ' good ' }}{% else %}"
    "{{ ('Label: ' if m.role == 'user' else 'fine ') + m.content + ' [SEP] ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
)
# As templates do that leave out what was thought before: the last answer is worded otherwise.
FORGETFUL = PLAIN.replace("{{ m.content +", "{{ ('bad ' if loop.last else '') + m.content +")
TALK = [
    {"role": "system", "content": "w80"},
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5 w6"},
]


def talking(template: str | None = PLAIN, dtype: torch.dtype = torch.float32, family: str = "llama") -> Backbone:
    on = backbone(family, dtype)
    on.processor = copy.deepcopy(on.processor)
    on.processor.chat_template = template
    return on


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return load_task(write(tmp_path, "chat"))


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by difference", "by the template's own marks"])
def test_answers_and_their_ends_are_learnt_and_nothing_else(template: str) -> None:
    on = talking(template)
    (example,) = Chat(9).encode([{"messages": TALK}], on, 64)
    words = on.processor.convert_ids_to_tokens(list(example.ids))
    assert " ".join(words) == (
        "fine w80 [SEP] Label: w1 w2 [SEP] Answer: w3 [SEP] good Label: w4 [SEP] Answer: w5 w6 [SEP] good"
    )
    learnt = [on.processor.convert_ids_to_tokens([t])[0] if t != -100 else "" for t in example.target]
    assert [(i, word) for i, word in enumerate(learnt) if word] == [
        (7, "w3"), (8, "[SEP]"), (14, "w5"), (15, "w6"), (16, "[SEP]")
    ]  # fmt: skip
    assert [words[i + 1] for i, word in enumerate(learnt) if word] == [word for word in learnt if word]


def test_marks_tell_answers_that_are_worded_otherwise_later() -> None:
    template = MARKED.replace("{% generation %}", "{{ 'bad ' if loop.last else '' }}{% generation %}")
    on = talking(template)
    ids, answers = answered(TALK, on)
    said = [word for word, says in zip(on.processor.convert_ids_to_tokens(ids), answers, strict=True) if says]
    assert said == ["w3", "[SEP]", "w5", "w6", "[SEP]"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (FORGETFUL, "it words message 3 otherwise in the whole than up to it, .* mark them with"),
        ("{{ raise_exception('roles have to alternate') }}", "begins 'w80': roles have to alternate"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(template: str, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        answered(TALK, talking(template))


def test_a_tokenizer_without_a_template_says_so(task: Task) -> None:
    with pytest.raises(TaskError, match="the tokenizer of tiny-llama has no chat template; take a chat model"):
        head_for(task, talking(None), 0)


def test_the_loss_is_that_of_the_model_on_the_answers(task: Task) -> None:
    on = talking()
    head = head_for(task, on, 0)
    examples = head.encode(task.train[:6], on, 64)
    batch = collate(examples, on)
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    for row, one in enumerate(task.train[:6]):
        ids, answers = answered(one["messages"], on)
        for at, says in enumerate(answers):
            labels[row, at] = ids[at] if says else -100
    with torch.no_grad():
        expected = float(on.module(**batch.inputs, labels=labels).loss)
        hidden = on.trunk(**batch.inputs).last_hidden_state
        assert float(head.loss(hidden, batch, on)) == pytest.approx(expected, abs=1e-5)
        with Adapted(on, [Delta.build(parse("lora"), on)]) as adapted:
            made = predict(adapted, None, head, task.train[:6], 64).values
    assert [row[1] for row in made] == (labels != -100).sum(dim=1).tolist()
    assert score("inverse_perplexity", made, [""] * 6) == pytest.approx(math.exp(-expected), abs=1e-5)
    assert score("inverse_perplexity", [majority(task)] * 3, [""] * 3) == 0.0


# Llama's positions are relative, GPT-2's are not.
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_conversations_have_the_loss_of_each_by_itself(task: Task, family: str) -> None:
    on = talking(family=family)
    (job,) = jobs_of([plan("lora", task, batch=8)], on)
    with torch.no_grad():
        for value in job.delta.layers.parameters():
            value.add_(0.1)
    examples = job.logical_batch(0)
    engine = Engine([job], on)
    packed: list[tuple[int, ...]] = []
    hook = on.trunk.register_forward_pre_hook(
        lambda module, args, kwargs: packed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    together = float(engine.losses([job], [batch_of(job, on)])[0].detach())
    hook.remove()
    assert packed[-1] == (1, sum(len(e.ids) for e in examples)) and len({len(e.ids) for e in examples}) > 2
    total = count = 0.0
    for example in examples:
        number = sum(t != -100 for t in example.target)
        total += number * float(engine.losses([job], [collate([example], on)])[0].detach())
        count += number
    engine.close()
    assert together == pytest.approx(total / count, abs=1e-5)


def test_together_is_alone(task: Task) -> None:
    some = [plan("lora", task), plan("prefix(n=2)", task, 1), plan("lora(dropout=0.2)", task, 2)]
    on = talking(dtype=torch.float64)
    jobs = jobs_of(some, on)
    engine = Engine(jobs, on)
    for _ in range(8):
        engine.step(jobs)
    engine.close()
    for one, job in zip(some, jobs, strict=True):
        on = talking(dtype=torch.float64)
        (lonely,) = jobs_of([one], on)
        engine = Engine([lonely], on)
        for _ in range(8):
            engine.step([lonely])
        engine.close()
        assert job.losses == pytest.approx(lonely.losses, rel=0, abs=1e-6)
        assert furthest(tensors(job), tensors(lonely)) <= 1e-6


def test_it_is_fitted_and_then_answers(task: Task, tmp_path: Path) -> None:
    on = talking()
    settings = dataclasses.replace(QUICK, steps=40, lr=1e-2)
    runs = run_plans(on, [Plan(parse("lora"), task, 0, settings, "lora")], out=tmp_path / "out")
    scores = {row["delta"]: row["test"]["mean"] for row in runs.results[0]["summary"]}
    assert 0 < scores["head-only"] < scores["lora"] < 1 and runs.results[0]["examples"] == []
    delta = Delta.load(str(tmp_path / "out"), on)
    asked = [{"messages": row["messages"][:1]} for row in task.test[:3]]
    with Adapted(on, [delta]) as adapted:
        answers = predict(adapted, delta, delta.head, asked, 64).values
        for row, answer in zip(asked, answers, strict=True):
            ids = on.processor.apply_chat_template(row["messages"], add_generation_prompt=True, return_tensors="pt")
            made = adapted.generate(**ids, max_new_tokens=delta.head.new_tokens, do_sample=False)
            assert answer == on.processor.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        with pytest.raises(TaskError, match="3 of 4 rows ask for an answer and the others have one"):
            predict(adapted, delta, delta.head, [*asked, task.test[3]], 64)


def test_a_long_conversation_keeps_its_end() -> None:
    on = talking()
    head = Chat(4)
    talk = [*TALK, {"role": "user", "content": "w7 w8"}]
    for limit, kept in (
        (30, "fine w80 [SEP] Label: w1 w2"),
        (21, "fine w80 [SEP] Label: w4"),
        (16, "fine w80 [SEP] Label: w7"),
    ):
        (prompt,) = head.prompts([{"messages": talk}], on, limit)
        said = " ".join(on.processor.convert_ids_to_tokens(list(prompt.ids)))
        assert said.startswith(kept) and said.endswith("Label: w7 w8 [SEP] Answer:"), (limit, said)
    (prompt,) = head.prompts([{"messages": [{"role": "user", "content": "w1 " * 30 + "w2"}]}], on, 16)
    assert on.processor.convert_ids_to_tokens(list(prompt.ids)) == [*["w1"] * 8, "w2", "[SEP]", "Answer:"]
    with pytest.raises(TaskError, match="no conversation has an answer within 6 tokens; raise max_length"):
        head.encode([{"messages": TALK}], on, 6)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (
            [{"role": "user", "content": "a"}],
            "line 1: the last message is of the role 'user'; expected the assistant's",
        ),
        ([{"role": "asistant", "content": "a"}], "message 1 has role 'asistant'; nearest: assistant"),
        ([{"from": "gpt", "value": "a"}], "messages has to be a list like"),
        ("not json", "messages has to be a list like"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: object, said: str, tmp_path: Path) -> None:
    import json

    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n" + "".join(json.dumps(r) + "\n" for r in rows_of("chat")))
    with pytest.raises(TaskError, match=said):
        load_task(file)


def test_smollm2_is_taught_its_answers_and_not_the_questions() -> None:
    on = load("smollm2")
    (example,) = Chat(9).encode([{"messages": TALK[1:]}], on, 128)
    said = on.processor.decode([t for t in example.target if t != -100])
    assert said == "w3<|im_end|>w5 w6<|im_end|>"
    batch = collate([example], on)
    labels = torch.tensor([[-100, *example.target[:-1]]])
    with torch.no_grad():
        hidden = on.trunk(**batch.inputs).last_hidden_state
        expected = float(on.module(**batch.inputs, labels=labels).loss)
        assert float(Chat(9).loss(hidden, batch, on)) == pytest.approx(expected, abs=1e-4)
