"""Writes clip_words.txt, clip_words/tokenizer.json and clip_words.json: a small vocabulary of CLIP, and the ids of texts.

Run: pip install open_clip_torch==3.3.0 torch==2.15.0 transformers==5.24.0 ftfy regex && python clip_words.py (seconds)
Reference: SimpleTokenizer of open_clip on clip_words.txt, which has the form of bpe_simple_vocab_16e6.txt; the same vocabulary as
transformers writes it is clip_words/tokenizer.json.

clip_words.json: [text, ids] pairs, the ids between those of start and end; the last two by transformers
"""

import collections
import gzip
import json
import pathlib
import tempfile

from open_clip.tokenizer import SimpleTokenizer, bytes_to_unicode
from transformers import CLIPTokenizer

HERE = pathlib.Path(__file__).parent
SENTENCES = """a dog barks at a small white cat in the garden
the bell of the church rings while two birds sing
an owl hoots at night near the old wooden bridge
waves break on the beach and a gull cries
a man plays the violin as the train passes by
rain falls on the roof of the house it's raining they're running
caf\u00e9 \u00fcber na\u00efve 12 345 6789""".splitlines()

# Pairs that are merged, learnt by counting; a word ends with its own mark.
code = bytes_to_unicode()
words = collections.Counter()
for sentence in SENTENCES:
    for word in sentence.split():
        letters = [code[b] for b in word.encode()]
        words[tuple(letters[:-1]) + (letters[-1] + "</w>",)] += 1
merges = []
while len(merges) < 110:
    pairs = collections.Counter()
    for word, n in words.items():
        for pair in zip(word, word[1:]):
            pairs[pair] += n
    best = max(pairs.items(), key=lambda item: (item[1], item[0]))[0]
    merges.append(best)
    joined = collections.Counter()
    for word, n in words.items():
        new, i = [], 0
        while i < len(word):
            if word[i:i + 2] == best:
                new.append("".join(best))
                i += 2
            else:
                new.append(word[i])
                i += 1
        joined[tuple(new)] += n
    words = joined
text = "#version: of a test\n" + "".join(f"{a} {b}\n" for a, b in merges)
(HERE / "clip_words.txt").write_text(text)

with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "vocabulary.txt.gz")
    path.write_bytes(gzip.compress(text.encode()))
    reference = SimpleTokenizer(bpe_path=str(path), clean="lower")
    texts = [
        "a dog barks", "", "  The   BELL\n\trings!  ", "it's they're can't we'd I'll", "caf\u00e9 \u00dcBER na\u00efve",
        "12 345 6,789.5", "emoji \U0001f415 \U0001f1eb\U0001f1f7 here", "a &amp;amp; b &lt;c&gt; &#39;d&#39; &eacute;",
        "\u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439", "x" * 40, "don't... stop?! (really) -- #tag @home_99",
        "tabs\tand\u00a0spaces\u3000wide", "\u00bd \u2167 \u0665", "!'s '",
    ]
    pairs = [[text, reference.encode(text)] for text in texts]

vocabulary = list(code.values())
vocabulary += [v + "</w>" for v in vocabulary] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, merges=merges)
with tempfile.TemporaryDirectory() as folder:
    tokenizer.save_pretrained(folder)
    (HERE / "clip_words").mkdir(exist_ok=True)
    (HERE / "clip_words" / "tokenizer.json").write_bytes(pathlib.Path(folder, "tokenizer.json").read_bytes())
for text, ids in pairs:
    theirs = tokenizer(text)["input_ids"][1:-1]
    if theirs != ids:
        print("transformers differs:", repr(text), ids, theirs)
# The marks of start and end have other names in open_clip.
for text in ["<|endoftext|> inside", "a<|startoftext|>b"]:
    pairs.append([text, tokenizer(text)["input_ids"][1:-1]])
(HERE / "clip_words.json").write_text(json.dumps(pairs, indent=0) + "\n")
