"""How predictions are scored.

Every score is a fraction (0 to 1; `matthews`, `pearson` and `spearman` -1 to 1, `r2` up to 1), `bleu` and `chrf` too.
Stated rules:

- A quotient 0/0 counts as 0: a label that is neither present nor predicted has no part in `macro_f1` and
  `macro_recall`; one that is only predicted counts as 0; `entity_f1` is 0 where there is no entity at all.
- A correlation with something constant counts as 0.
- Nothing to score is an error, never a score.
- `entity_f1` counts a predicted entity that agrees exactly in both ends and in type, over all rows together.
- `squad_f1` and `squad_match` take the best of a row's answers, compared as SQuAD's script does.
- Text metrics take the best of a row's accepted answers (`exact_match`, `token_f1`, `rouge_l`), or all of them
  together as sacrebleu does (`bleu`, `chrf`). White space is collapsed; `exact_match` heeds letter case, the others
  and punctuation as their sources do.
- `accuracy_at_1` and `mrr_at_10` rank the different positives of the split for each anchor; below rank 10 counts 0.
- `preference_accuracy` is the share of rows whose chosen answer has the larger reward; equal rewards count as a half.
- `inverse_perplexity` is exp of the mean log-probability of the answers' tokens, over all rows together: the
  geometric mean of their probabilities, so that here, too, more is better.
"""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deltatune.data.spans import squad_f1, squad_match
from deltatune.data.tags import is_bio
from deltatune.data.task import NUMBERS, Kind, Row, Task
from deltatune.errors import TaskError, UnknownName

CLASS_METRICS = ("accuracy", "macro_f1", "micro_f1", "macro_recall", "matthews")
TAG_METRICS = ("entity_f1", "token_accuracy")
SET_METRICS = ("micro_f1", "macro_f1", "subset_accuracy")
NUMBER_METRICS = ("pearson", "spearman", "r2")
TEXT_METRICS = ("exact_match", "token_f1", "rouge_l", "bleu", "chrf")
SPAN_METRICS = ("squad_f1", "squad_match")
RANKED = 10  # how many of a ranking are kept and count

ALSO_CALLED = {"mcc": "matthews", "rouge": "rouge_l", "mrr": "mrr_at_10", "accuracy@1": "accuracy_at_1"}
OF_KIND: Mapping[Kind, tuple[str, ...]] = {
    "classification": CLASS_METRICS,
    "pair_classification": CLASS_METRICS,
    "image_classification": CLASS_METRICS,
    "token_classification": TAG_METRICS,
    "generation": TEXT_METRICS,
    "multi_label": SET_METRICS,
    "regression": NUMBER_METRICS,
    "pair_regression": NUMBER_METRICS,
    "multiple_choice": ("accuracy",),
    "extractive_span": SPAN_METRICS,
    "embedding": ("mrr_at_10", "accuracy_at_1"),
    "preference": ("preference_accuracy",),
    "chat": ("inverse_perplexity",),
}
METRICS = tuple(dict.fromkeys(metric for own in OF_KIND.values() for metric in own))
"""Every metric but the `f1_<label>` form, which is F1 of one label."""

SINGLE: tuple[Kind, ...] = ("classification", "pair_classification", "image_classification", "multiple_choice")
"""Kinds with one answer a row that is not a list."""


def default_metric(kind: Kind, labels: Sequence[str] = ()) -> str:
    """Return the metric of a kind; tags that mark no spans (parts of speech) have `token_accuracy`."""
    if kind == "token_classification" and labels and not is_bio(labels):
        return "token_accuracy"
    return OF_KIND[kind][0]


def check_metric(metric: str, kind: Kind, labels: Sequence[str]) -> str:
    """Return a metric's own name. Raises UnknownName for one that is not known, or not for this kind or label."""
    metric = ALSO_CALLED.get(metric, metric)
    of_labels = [f"f1_{label}" for label in labels] if OF_KIND[kind] is CLASS_METRICS else []
    if metric not in OF_KIND[kind] and metric not in of_labels:
        fix = f"it is no metric of {kind}" if metric in METRICS else ""
        if metric == "f1" and of_labels:
            fix = f"say of which label: {', '.join(of_labels[:4])}"
        raise UnknownName("metric", metric, [*OF_KIND[kind], *of_labels], fix)
    return metric


def score(metric: str, predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[str] = ()) -> float:
    """Return the score of predictions: labels, lists of tags, or texts; a text's reference may be a list of answers.

    Raises UnknownName for a metric, TaskError where there is nothing to score, and ValueError for lengths that differ.
    """
    metric = ALSO_CALLED.get(metric, metric)
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    if not references:
        raise TaskError(f"{metric}: nothing to score; expected one prediction or more")
    if metric in SCORES:
        return float(SCORES[metric](predictions, references))
    label = metric.removeprefix("f1_")
    if label == metric or (labels and label not in labels):
        raise UnknownName("metric", metric, [*METRICS, *(f"f1_{one}" for one in labels)])
    return _f1(*_counts(predictions, references, label))


def references(kind: Kind, rows: Sequence[Row]) -> list[Any]:
    """Return what `score` compares with: each row's label, tags, positive, or list of accepted answers."""
    if kind == "extractive_span":
        return [[answer["text"] for answer in row["answers"]] for row in rows]
    if kind == "generation":
        return [row.get("targets") or [row["target"]] for row in rows]
    if kind == "preference":
        return ["chosen"] * len(rows)
    if kind == "chat":
        return [row["messages"][-1]["content"] for row in rows]
    field = {
        "token_classification": "tags", "multi_label": "labels", "regression": "value", "pair_regression": "value",
        "embedding": "positive",
    }  # fmt: skip
    return [row[field.get(kind, "label")] for row in rows]


def majority(task: Task) -> Any:
    """Return train's most frequent label, tag or target text; of equally frequent ones the first in sorted order.

    Of numbers it is the mean; of sets of labels those that at least half of the rows have, or the most frequent one.

    No other constant scores higher in any class metric or in `exact_match` on train, but for `f1_<label>`, where it is
    that label. Tags repeat it for each token. Of preferences it is no preference, of conversations that nothing said
    was thought possible.
    """
    if task.kind in ("preference", "chat"):
        return 0.0 if task.kind == "preference" else [-math.inf, 1]
    if task.metric.startswith("f1_"):
        return task.metric.removeprefix("f1_")
    answers = references(task.kind, task.train)
    if task.kind in NUMBERS:
        return sum(answers) / len(answers)
    if task.kind == "multi_label":
        often = Counter(label for labels in answers for label in labels)
        most = min(often, key=lambda one: (-often[one], one))
        return sorted(label for label in often if often[label] >= len(answers) / 2) or [most]
    if task.kind == "embedding":
        often = Counter(answers)
        return sorted(often, key=lambda one: (-often[one], one))[:RANKED]
    counts = Counter(answers if task.kind in SINGLE else [one for several in answers for one in several])
    return min(counts, key=lambda one: (-counts[one], one))


def constant(prediction: Any, task: Task, rows: Sequence[Row]) -> list[Any]:
    """Return `prediction` for each of `rows`, for each token where rows have tags."""
    if task.kind == "token_classification":
        return [[prediction] * len(row["tokens"]) for row in rows]
    return [prediction] * len(rows)


def _accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)


def _counts(predictions: Sequence[str], references: Sequence[str], label: str) -> tuple[int, int, int]:
    """Return how often a label is rightly predicted, predicted and present."""
    right = sum(p == r == label for p, r in zip(predictions, references, strict=True))
    return right, sum(p == label for p in predictions), sum(r == label for r in references)


def _f1(right: int, predicted: int, present: int) -> float:
    return 2 * right / (predicted + present) if predicted + present else 0.0


def _macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average="macro", zero_division=0.0))


def _macro_recall(predictions: Sequence[str], references: Sequence[str]) -> float:
    from sklearn.metrics import recall_score

    present = sorted(set(references))
    return float(recall_score(references, predictions, labels=present, average="macro", zero_division=0.0))


def _sets(average: str) -> Callable[[Sequence[Sequence[str]], Sequence[Sequence[str]]], float]:
    def f1(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
        counts: dict[str, list[int]] = {}
        for predicted, present in zip(predictions, references, strict=True):
            for label in {*predicted, *present}:
                given, there = label in predicted, label in present
                for place, one in enumerate((given and there, given, there)):
                    counts.setdefault(label, [0, 0, 0])[place] += one
        if average == "micro":
            return _f1(*(sum(column) for column in zip(*counts.values(), strict=True))) if counts else 0.0
        return sum(_f1(*one) for one in counts.values()) / len(counts) if counts else 0.0

    return f1


def _by_shape(single: Any, several: Any) -> Callable[[Sequence[Any], Sequence[Any]], float]:
    """One name for two metrics: of labels, and of sets of labels."""

    def either(predictions: Sequence[Any], references: Sequence[Any]) -> float:
        return float((several if isinstance(references[0], list) else single)(predictions, references))

    return either


def _subset_accuracy(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    return _accuracy([sorted(p) for p in predictions], [sorted(r) for r in references])


def _pearson(predictions: Sequence[float], references: Sequence[float]) -> float:
    import numpy as np

    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    return float(np.corrcoef(predictions, references)[0, 1])


def _spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
    from scipy.stats import rankdata

    return _pearson(rankdata(predictions), rankdata(references))


def _r2(predictions: Sequence[float], references: Sequence[float]) -> float:
    from sklearn.metrics import r2_score

    return float(r2_score(references, predictions)) if len(references) > 1 else 0.0


def _matthews(predictions: Sequence[str], references: Sequence[str]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions))


def _entity_f1(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    from seqeval.metrics import f1_score

    _same_lengths(predictions, references)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on 0/0, for which our rule is stated
        return float(f1_score([list(r) for r in references], [list(p) for p in predictions], zero_division=0))


def _token_accuracy(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    _same_lengths(predictions, references)
    return _accuracy([t for row in predictions for t in row], [t for row in references for t in row])


def _same_lengths(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> None:
    for number, (p, r) in enumerate(zip(predictions, references, strict=True), 1):
        if len(p) != len(r):
            raise ValueError(f"row {number}: {len(p)} predicted tags for {len(r)} tokens")


def _rank(predictions: Sequence[Sequence[str]], references: Sequence[str]) -> list[float]:
    """Return one over the place at which each reference stands in its ranking, 0 where it does not."""
    rows = zip(predictions, references, strict=True)
    return [1 / (list(p[:RANKED]).index(r) + 1) if r in p[:RANKED] else 0.0 for p, r in rows]


def _reciprocal_rank(predictions: Sequence[Sequence[str]], references: Sequence[str]) -> float:
    return sum(_rank(predictions, references)) / len(references)


def _first(predictions: Sequence[Sequence[str]], references: Sequence[str]) -> float:
    return _accuracy([p[0] if p else None for p in predictions], references)


def _preferred(predictions: Sequence[float], references: Sequence[Any]) -> float:
    return sum((margin > 0) + 0.5 * (margin == 0) for margin in predictions) / len(references)


def _inverse_perplexity(predictions: Sequence[Sequence[float]], references: Sequence[Any]) -> float:
    tokens = sum(row[1] for row in predictions)
    return math.exp(sum(row[0] for row in predictions) / tokens) if tokens else 0.0


def _answers(reference: str | Sequence[str]) -> list[str]:
    return [reference] if isinstance(reference, str) else list(reference)


def _best(compare: Callable[[str, str], float]) -> Callable[[Sequence[str], Sequence[Any]], float]:
    def mean_of_best(predictions: Sequence[str], references: Sequence[Any]) -> float:
        rows = zip(predictions, references, strict=True)
        return sum(max(compare(p, answer) for answer in _answers(r)) for p, r in rows) / len(references)

    return mean_of_best


def _words(text: str) -> list[str]:
    """Return lower-case words without punctuation, in any script that separates words."""
    return "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text.lower()).split()


def _exact(prediction: str, answer: str) -> float:
    return float(prediction.split() == answer.split())


def _token_f1(prediction: str, answer: str) -> float:
    """F1 of the bags of words, as in SQuAD but with its articles kept; two texts without a word agree."""
    p, a = _words(prediction), _words(answer)
    return _f1(sum((Counter(p) & Counter(a)).values()), len(p), len(a)) if p or a else 1.0


def _rouge_l(prediction: str, answer: str) -> float:
    """F1 of the longest common subsequence (Lin 2004, sentence level, no stemming); two texts without a word agree."""
    p, a = _words(prediction), _words(answer)
    row = [0] * (len(a) + 1)
    for word in p:
        diagonal = 0
        for j, other in enumerate(a, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return _f1(row[-1], len(p), len(a)) if p or a else 1.0


def _sacrebleu(name: str) -> Callable[[Sequence[str], Sequence[Any]], float]:
    def corpus_score(predictions: Sequence[str], references: Sequence[Any]) -> float:
        import sacrebleu

        answers = [_answers(r) for r in references]
        # One list for each place among the answers; None where a row has fewer.
        columns = [[a[i] if i < len(a) else None for a in answers] for i in range(max(map(len, answers)))]
        return float(getattr(sacrebleu, f"corpus_{name}")(list(predictions), columns).score) / 100

    return corpus_score


SCORES: Mapping[str, Callable[[Sequence[Any], Sequence[Any]], float]] = {
    "accuracy": _accuracy,
    # Of one label of the whole list for each row, micro F1 is accuracy.
    "micro_f1": _by_shape(_accuracy, _sets("micro")),
    "macro_f1": _by_shape(_macro_f1, _sets("macro")),
    "subset_accuracy": _subset_accuracy,
    "pearson": _pearson,
    "spearman": _spearman,
    "r2": _r2,
    "macro_recall": _macro_recall,
    "matthews": _matthews,
    "entity_f1": _entity_f1,
    "token_accuracy": _token_accuracy,
    "exact_match": _best(_exact),
    "token_f1": _best(_token_f1),
    "rouge_l": _best(_rouge_l),
    "squad_f1": _best(squad_f1),
    "squad_match": _best(squad_match),
    "bleu": _sacrebleu("bleu"),
    "chrf": _sacrebleu("chrf"),
    "mrr_at_10": _reciprocal_rank,
    "accuracy_at_1": _first,
    "preference_accuracy": _preferred,
    "inverse_perplexity": _inverse_perplexity,
}
