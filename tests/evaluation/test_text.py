"""Text metrics: by hand, against SQuAD's rule and plain formulas, and what must hold for any text."""

import re
import string
import unicodedata
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from fedmide.evaluation.intervals import draws
from fedmide.evaluation.text import TextScores, exact_match, normalize, score_texts, token_f1

words = st.sampled_from(["heart", "Heart", "lung", "the", "An", "a", "x-ray", "no", ".", "1.5"])
sentences = st.lists(words, max_size=8).map(" ".join)


def scored(predictions: Sequence[str], references: Sequence[str]) -> TextScores:
    """All metrics, with intervals that are good for nothing."""
    return score_texts(predictions, references, resamples=1, seed=0)


def squad_normalize(text: str) -> str:
    """The published rule, for ASCII text: lower, punctuation out, articles out, spaces collapsed."""
    without = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without).split())


@given(st.text(alphabet=string.ascii_letters + string.digits + string.punctuation + " \t\n") | sentences)
def test_normalizing_ascii_is_squads(text: str) -> None:
    assert normalize(text) == squad_normalize(text)


@given(st.text())
def test_normalizing_twice_changes_nothing_and_forms_are_one(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert normalize(unicodedata.normalize("NFD", text)) == once == normalize(unicodedata.normalize("NFC", text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Cafe\u0301", "caf\u00e9"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("“Yes” — the…", "yes"),
        ("the theatre", "theatre"),
        ("\u00a0a\u2003b\n", "b"),
        ("37 °C", "37 °c"),
        ("", ""),
    ],
)
def test_normalizing_by_hand(text: str, expected: str) -> None:
    assert normalize(text) == expected


def test_signs_are_lost_as_the_module_documents() -> None:
    assert exact_match("1.5", "15") == 1.0
    assert exact_match("HER2+", "HER2-") == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("heart heart lung", "heart lung lung", 2 / 3),
        ("heart", "heart failure now", 0.5),
        ("lung", "heart", 0.0),
        ("", "heart", 0.0),
        ("heart", "the", 0.0),
        ("", "The.", 1.0),
    ],
)
def test_token_f1_by_hand(prediction: str, reference: str, expected: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(expected)


@given(sentences, sentences)
def test_token_f1_is_symmetric_and_1_only_for_the_same_words(first: str, second: str) -> None:
    value = token_f1(first, second)
    assert value == token_f1(second, first)
    assert 0.0 <= value <= 1.0
    assert (value == 1.0) == (sorted(normalize(first).split()) == sorted(normalize(second).split()))
    assert exact_match(first, second) <= value


def test_rouge_by_hand() -> None:
    scores = scored(["the cat sat on the mat"], ["the cat on the mat sat"])
    assert scores.rouge1[0] == pytest.approx(1.0)
    assert scores.rouge2[0] == pytest.approx(3 / 5)  # the cat, on the, the mat of 5 pairs each
    assert scores.rouge_l[0] == pytest.approx(5 / 6)  # the cat on the mat


def test_rouge_stems() -> None:
    assert scored(["fractures"], ["fractured"]).rouge1[0] == 1.0


def test_rouge_drops_other_letters_as_the_module_documents() -> None:
    scores = scored(["naïve", "αβγ"], ["na ve", "αβγ"])
    assert scores.rouge1.tolist() == [1.0, 0.0]
    assert scores.exact_match.tolist() == [0.0, 1.0]


def test_intervals_of_bleu_and_chrf_are_those_of_a_slow_bootstrap() -> None:
    texts = ["a b c d e", "a b c d x y z", "k l m n o p", "q r s t u", "a c e g"]
    references = ["a b c d e", "a b c d e f g", "k l m n x p", "q r s t", "a b c d"]
    scores = score_texts(texts, references, 200, seed=3)
    (drawn,) = draws(5, 200, seed=3)
    for metric, found in ((BLEU(force=True), scores.bleu), (CHRF(), scores.chrf)):
        values = [
            metric.corpus_score([texts[row] for row in rows], [[references[row] for row in rows]]).score
            for rows in drawn
        ]
        assert found.value == metric.corpus_score(texts, [references]).score
        assert (found.low, found.high) == pytest.approx(np.percentile(values, (2.5, 97.5)))
        assert found.low < found.value < found.high
    alone = score_texts(texts[1:2], references[1:2], 200, seed=3)
    for each in (alone.bleu, alone.chrf):
        assert (each.low, each.high) == (pytest.approx(each.value), pytest.approx(each.value))


def test_empty_predictions_score_nothing() -> None:
    scores = scored(["", ""], ["acute heart failure", "no"])
    assert list(scores.per_record()) == ["rouge1", "rouge2", "rouge_l", "exact_match", "token_f1"]
    assert all(values.tolist() == [0.0, 0.0] for values in scores.per_record().values())
    assert (scores.bleu.value, scores.chrf.value) == (0.0, 0.0)


def test_the_references_themselves_score_full_marks() -> None:
    texts = ["the heart is not enlarged today.", "both lungs are clear on this film ."]
    scores = scored(texts, texts)
    assert all(values.tolist() == [1.0, 1.0] for values in scores.per_record().values())
    assert scores.bleu.value == pytest.approx(100.0)
    assert scores.chrf.value == pytest.approx(100.0)


def test_bleu_by_its_formula() -> None:
    # 10 words each; of 10, 9, 8, 7 n-grams 9, 8, 7, 6 are matched; the lengths are equal: no brevity penalty.
    scores = scored(["a b c d e f g h i j"], ["a b c d e f g h i k"])
    assert scores.bleu.value == pytest.approx(100 * (9 / 10 * 8 / 9 * 7 / 8 * 6 / 7) ** 0.25)


def test_bleu_is_of_the_corpus_and_not_a_mean() -> None:
    pairs = [("a b c d e", "a b c d e"), ("a b c d x y z", "a b c d e f g")]
    whole = scored([text for text, _ in pairs], [reference for _, reference in pairs]).bleu.value
    # matched of possible, orders 1 to 4, summed over both before dividing
    assert whole == pytest.approx(100 * ((9 / 12) * (7 / 10) * (5 / 8) * (3 / 6)) ** 0.25)


def test_bleu_of_one_word_answers_is_0_as_the_module_documents() -> None:
    scores = scored(["yes"], ["yes"])
    assert (scores.bleu.value, scores.chrf.value) == (0.0, pytest.approx(100.0))


def test_the_protocol_names_what_was_used() -> None:
    protocol = scored(["a"], ["b"]).protocol
    assert set(protocol) == {"rouge", "bleu", "chrf", "exact_match", "token_f1"}
    assert "stemmer on" in protocol["rouge"]
    assert re.search(r"rouge-score \d+\.\d+", protocol["rouge"])
    assert re.fullmatch(r"sacrebleu nrefs:1\|.*tok:13a\|.*version:.+", protocol["bleu"])
    assert re.fullmatch(r"sacrebleu nrefs:1\|.*nc:6\|nw:0\|.*version:.+", protocol["chrf"])


@settings(max_examples=20, deadline=None)  # the first example imports nltk
@given(st.lists(st.tuples(sentences | st.text(max_size=12), sentences | st.text(max_size=12)), min_size=1, max_size=5))
def test_any_texts_give_values_in_range_whatever_the_order(pairs: list[tuple[str, str]]) -> None:
    scores = scored([text for text, _ in pairs], [reference for _, reference in pairs])
    turned = scored([text for text, _ in pairs[::-1]], [reference for _, reference in pairs[::-1]])
    for name, values in scores.per_record().items():
        assert values.dtype == np.float64
        assert values.shape == (len(pairs),)
        assert ((values >= 0) & (values <= 1)).all()
        assert values.tolist() == turned.per_record()[name].tolist()[::-1]
    assert 0.0 <= scores.bleu.value <= 100.0 + 1e-9
    assert 0.0 <= scores.chrf.value <= 100.0 + 1e-9


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_lists_that_do_not_pair_are_refused(predictions: list[str], references: list[str]) -> None:
    with pytest.raises(ValueError, match="predictions"):
        scored(predictions, references)
