"""Writes text_golden.json: ROUGE of pairs of texts by the package rouge-score 0.1.2, without stemming.

    pip install rouge-score==0.1.2 && python text_golden.py
"""

import json
import pathlib
import random

from rouge_score import rouge_scorer

WORDS = "the a bell rings as rain falls on 12 roofs and owls hoot, far away".split()
PAIRS = [
    ("The cat sat on the mat.", "the cat was found under the mat"),
    ("A bell rings", "A bell rings"),
    ("", "words"),
    ("words", ""),
    ("well-known e-mail, 3.14", "well known email 3 14"),
    ("na\u00efve caf\u00e9 \u2014 \u0130stanbul", "naive caf istanbul"),
    ("one\ntwo\tthree", "ONE two  three four"),
    ("\u212aelvin don't_stop", "kelvin don t stop"),
]


def main():
    random.seed(1)
    draw = lambda: " ".join(random.choices(WORDS, k=random.randint(1, 30)))
    pairs = PAIRS + [(draw(), draw()) for _ in range(24)]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    cases = []
    for answer, reference in pairs:
        scores = scorer.score(reference, answer)
        figures = {name: score.fmeasure for name, score in scores.items()}
        cases.append({"answer": answer, "reference": reference, **figures})
    path = pathlib.Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
