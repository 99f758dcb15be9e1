"""Similarity of generated responses to their references: ROUGE, BLEU, chrF, exact match and token F1.

This module only compares texts; decoding happens elsewhere. Three properties of the metrics matter for their figures:

* rouge-score keeps only ASCII letters and digits, after lower-casing: "naïve" counts as "na" and "ve", "α" as
  nothing. A text without ASCII letters or digits scores 0 even against itself.
* BLEU is 0 if no response has four tokens, even for correct responses. For one-word answers read exact match.
* Normalizing as SQuAD does drops signs: "1.5" equals "15" and "HER2+" equals "HER2-".
"""

import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmide.evaluation.intervals import FloatArray, Interval, draws, ends

ARTICLES = frozenset({"a", "an", "the"})


@dataclass(frozen=True, slots=True, eq=False)
class TextScores:
    """The figures of one client's generated responses.

    The arrays hold one value in [0, 1] per record, in the records' order. Reports show their means. `bleu` and `chrf`
    are of all records together, in [0, 100] as sacrebleu returns them.
    """

    rouge1: FloatArray
    rouge2: FloatArray
    rouge_l: FloatArray
    exact_match: FloatArray
    token_f1: FloatArray
    bleu: Interval
    chrf: Interval
    protocol: Mapping[str, str]

    def per_record(self) -> dict[str, FloatArray]:
        """The averaged metrics by name, for means and their intervals."""
        names = ("rouge1", "rouge2", "rouge_l", "exact_match", "token_f1")
        return {name: getattr(self, name) for name in names}


def normalize(text: str) -> str:
    """The text in NFC, case folded, without punctuation and English articles, with one space between words.

    Punctuation is removed, not replaced by a space, as in SQuAD's scorer. Punctuation means ASCII's, which includes
    signs such as + and <, and every character in a punctuation category of Unicode.

    >>> normalize("  The X-ray: “normal”. ")
    'xray normal'
    """
    folded = unicodedata.normalize("NFD", text).casefold()
    kept = "".join(character for character in folded if not _is_punctuation(character))
    words = unicodedata.normalize("NFC", kept).split()
    return " ".join(word for word in words if word not in ARTICLES)


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if both texts are equal after normalizing, else 0.0.

    >>> exact_match("The heart.", "heart")
    1.0
    """
    return float(normalize(prediction) == normalize(reference))


def token_f1(prediction: str, reference: str) -> float:
    """The harmonic mean of precision and recall over normalized words, counted with repetition.

    If a text has no words left: 1.0 if neither has any, else 0.0.

    >>> token_f1("acute heart failure", "the heart failure")
    0.8
    """
    predicted, expected = normalize(prediction).split(), normalize(reference).split()
    if not predicted or not expected:
        return float(predicted == expected)
    common = (Counter(predicted) & Counter(expected)).total()
    return 2.0 * common / (len(predicted) + len(expected))


def score_texts(predictions: Sequence[str], references: Sequence[str], resamples: int, seed: int) -> TextScores:
    """Every metric of the predictions against the reference at the same position.

    The intervals of BLEU and chrF come from this many `resamples` of the records. Empty predictions are allowed.
    Raises ValueError if the two sequences differ in length, or if they are empty.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    if not predictions:
        raise ValueError("there are no predictions to score")
    rouge, rouge_protocol = _rouge(predictions, references)
    corpus, corpus_protocol = _corpus(predictions, references, resamples, seed)
    pairs = list(zip(predictions, references, strict=True))
    return TextScores(
        rouge1=rouge["rouge1"],
        rouge2=rouge["rouge2"],
        rouge_l=rouge["rougeL"],
        exact_match=np.array([exact_match(*pair) for pair in pairs], dtype=np.float64),
        token_f1=np.array([token_f1(*pair) for pair in pairs], dtype=np.float64),
        bleu=corpus["bleu"],
        chrf=corpus["chrf"],
        protocol={**rouge_protocol, **corpus_protocol, **_normalized_protocol()},
    )


def _rouge(predictions: Sequence[str], references: Sequence[str]) -> tuple[dict[str, FloatArray], dict[str, str]]:
    """ROUGE F1 by rouge-score's names, each an array with one value per record, and the protocol."""
    from rouge_score.rouge_scorer import RougeScorer  # the import takes more than a second, because of nltk

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    values = {kind: np.array([score[kind].fmeasure for score in scores], dtype=np.float64) for kind in kinds}
    versions = f"rouge-score {version('rouge-score')}, nltk {version('nltk')}"
    return values, {"rouge": f"F1, Porter stemmer on, ASCII letters and digits only, {versions}"}


def _corpus(
    predictions: Sequence[str], references: Sequence[str], resamples: int, seed: int
) -> tuple[dict[str, Interval], dict[str, str]]:
    """BLEU and chrF over all records, and sacrebleu's signatures."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # force: no warning if responses end in a full stop after a space.
    metrics = {"bleu": BLEU(force=True), "chrf": CHRF()}
    found = {name: _interval(metric, predictions, references, resamples, seed) for name, metric in metrics.items()}
    # A signature counts the references, so it is complete only after scoring.
    return found, {name: f"sacrebleu {metric.get_signature()}" for name, metric in metrics.items()}


def _interval(
    metric: Any, predictions: Sequence[str], references: Sequence[str], resamples: int, seed: int
) -> Interval:
    """A metric of sacrebleu with its interval.

    sacrebleu's own bootstrap raises a TypeError if a resample scores 0 (2.6.0). So this function sums
    sacrebleu's counts of n-grams per record, which have no public name.
    """

    def score(of: npt.NDArray[np.int64]) -> float:
        return float(metric._compute_score_from_stats(of.sum(axis=0).tolist()).score)

    counts = np.array(metric._extract_corpus_statistics(predictions, [references]), dtype=np.int64)
    low, high = ends(np.array([score(counts[rows]) for drawn in draws(len(counts), resamples, seed) for rows in drawn]))
    return Interval(score(counts), low, high)


def _normalized_protocol() -> dict[str, str]:
    rule = "NFC, case folded, punctuation and English articles removed, whitespace collapsed"
    return {
        "exact_match": f"{rule}, Unicode {unicodedata.unidata_version}",
        "token_f1": f"words after the rule of exact match, Unicode {unicodedata.unidata_version}",
    }
