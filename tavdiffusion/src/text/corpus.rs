//! Sentences to learn from: captions of composed scenes, phrases about things and their sounds, everyday words in new
//! combinations, and the words and meanings of WordNet.
//!
//! The teacher tells what each sentence means; here it only matters that the words of a prompt, or their
//! relatives, occur often enough and in different company. A corpus is a pure function of its sources and the seed.

use std::collections::HashSet;

use fulgur_kernels::philox::Philox;

use super::everyday::{self, entries};
use super::wordnet::{Part, Synset, WordNet};

/// Longest sentence taken from a dictionary, in words.
const LONGEST_GLOSS: usize = 14;
/// Draws that may repeat a known sentence before a source counts as exhausted, for each sentence asked for.
const PATIENCE: usize = 20;

/// A thing by its names, and what it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Noun phrases with article: "a dog", "a puppy", "hands".
    pub nouns: Vec<String>,
    /// Verbs of its sound, as they agree with the nouns and as gerunds: ("barks", "barking").
    pub verbs: Vec<(String, String)>,
}

/// How much a corpus takes of each source, in parts of the whole.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shares {
    /// Captions of composed scenes.
    pub captions: f64,
    /// Phrases about the things of the scenes.
    pub subjects: f64,
    /// Everyday names and sounds in all combinations.
    pub everyday: f64,
    /// Words of WordNet alone or with their meaning.
    pub names: f64,
    /// Nouns, verbs and adjectives of WordNet in new combinations.
    pub combinations: f64,
    /// Definitions and example sentences of WordNet.
    pub glosses: f64,
}

impl Default for Shares {
    fn default() -> Self {
        Self {
            captions: 0.25,
            subjects: 0.15,
            everyday: 0.2,
            names: 0.15,
            combinations: 0.15,
            glosses: 0.1,
        }
    }
}

/// What a corpus is written from.
pub struct Sources<'a> {
    /// Captions by number; the same number gives the same caption.
    pub captions: &'a dyn Fn(u64) -> String,
    /// The things of the scenes.
    pub subjects: &'a [Subject],
    /// The dictionary.
    pub wordnet: &'a WordNet,
    /// Sentences that never occur: prompts that judge the result. Case and punctuation do not count.
    pub reserved: &'a [&'a str],
}

/// Writes about `size` different sentences in random order. Fewer come back when a source runs dry.
pub fn write(sources: &Sources, shares: &Shares, size: usize, seed: u64) -> Vec<String> {
    let lexicon = Lexicon::new(sources.wordnet);
    let everyday = Everyday::new();
    let mut corpus = Corpus {
        seed,
        known: HashSet::new(),
        sentences: Vec::with_capacity(size),
    };
    corpus
        .known
        .extend(sources.reserved.iter().map(|text| plain(text)));
    let part = |share: f64| (share * size as f64).round() as usize;
    let mut number = 0;
    corpus.collect("captions", part(shares.captions), |_| {
        number += 1;
        Some((sources.captions)(number))
    });
    corpus.collect("subjects", part(shares.subjects), |random| {
        everyday.about(sources.subjects, random)
    });
    corpus.collect("everyday", part(shares.everyday), |random| {
        everyday.phrase(random)
    });
    corpus.collect("names", part(shares.names), |random| lexicon.name(random));
    corpus.collect("combinations", part(shares.combinations), |random| {
        lexicon.combination(random)
    });
    corpus.collect("glosses", part(shares.glosses), |random| lexicon.gloss(random));
    let order = Philox::named(seed, "corpus/order").permutation(corpus.sentences.len());
    order
        .into_iter()
        .map(|i| std::mem::take(&mut corpus.sentences[i]))
        .collect()
}

struct Corpus {
    seed: u64,
    known: HashSet<String>,
    sentences: Vec<String>,
}

impl Corpus {
    fn collect(&mut self, source: &str, size: usize, mut draw: impl FnMut(&mut Philox) -> Option<String>) {
        let mut random = Philox::named(self.seed, &format!("corpus/{source}"));
        let end = self.sentences.len() + size;
        for _ in 0..PATIENCE * size {
            if self.sentences.len() == end {
                break;
            }
            if let Some(sentence) = draw(&mut random)
                && self.known.insert(plain(&sentence))
            {
                self.sentences.push(sentence);
            }
        }
    }
}

/// A sentence without case and punctuation, by which it is recognised.
pub fn plain(text: &str) -> String {
    let words = text
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect::<Vec<_>>().join(" ")
}

fn pick<'a, T>(items: &'a [T], random: &mut Philox) -> Option<&'a T> {
    if items.is_empty() {
        None
    } else {
        items.get(random.below(items.len()))
    }
}

/// The tables of everyday words.
struct Everyday {
    nouns: Vec<&'static str>,
    sounds: Vec<&'static str>,
    moves: Vec<&'static str>,
    ways: Vec<&'static str>,
    manners: Vec<&'static str>,
    places: Vec<&'static str>,
    qualities: Vec<&'static str>,
}

impl Everyday {
    fn new() -> Self {
        Self {
            nouns: entries(everyday::NOUNS),
            sounds: entries(everyday::SOUNDS),
            moves: entries(everyday::MOVES),
            ways: entries(everyday::WAYS),
            manners: entries(everyday::MANNERS),
            places: entries(everyday::PLACES),
            qualities: entries(everyday::QUALITIES),
        }
    }

    fn phrase(&self, random: &mut Philox) -> Option<String> {
        let noun = pick(&self.nouns, random)?;
        let verb = pick(&self.sounds, random)?;
        let (one, finite, going) = (article(noun), third_person(verb), gerund(verb));
        Some(match random.below(12) {
            0 => one,
            1 => format!("{noun} {going}"),
            2 => format!("{} {noun}", article(pick(&self.qualities, random)?)),
            3 => format!("{one} {finite} {}", pick(&self.manners, random)?),
            4 => format!("{one} {finite} {}", pick(&self.places, random)?),
            5 => format!("the {noun} is {going}"),
            6 => format!(
                "{one} {} {}",
                third_person(pick(&self.moves, random)?),
                pick(&self.ways, random)?
            ),
            7 => format!("{one} {} and {finite}", third_person(pick(&self.moves, random)?)),
            8 => format!("{} {noun} {finite}", article(pick(&self.qualities, random)?)),
            9 => format!("{one} and {}", article(pick(&self.nouns, random)?)),
            _ => format!("{one} {finite}"),
        })
    }

    fn about(&self, subjects: &[Subject], random: &mut Philox) -> Option<String> {
        let subject = pick(subjects, random)?;
        let noun = pick(&subject.nouns, random)?;
        let (finite, going) = pick(&subject.verbs, random)?;
        let bare = without_article(noun);
        Some(match random.below(12) {
            0 => noun.clone(),
            1 => format!("{going} {bare}"),
            2 => format!("the sound of {noun}"),
            3 => format!("the {bare} {finite}"),
            4 => format!("{noun}, {going} {}", pick(&self.manners, random)?),
            5 => format!("{noun} {finite} {}", pick(&self.manners, random)?),
            6 => format!("i hear {noun} {going}"),
            7 => format!("{noun} {finite} {}", pick(&self.places, random)?),
            8 => format!("a picture of {noun}"),
            9 => format!("the {} {bare} {finite}", pick(&self.qualities, random)?),
            _ => format!("{noun} {finite}"),
        })
    }
}

/// Words of the dictionary that can be drawn, the common ones more often.
struct Lexicon<'a> {
    nouns: Weighted<'a>,
    verbs: Weighted<'a>,
    adjectives: Weighted<'a>,
    meanings: Weighted<'a>,
}

impl<'a> Lexicon<'a> {
    fn new(wordnet: &'a WordNet) -> Self {
        // Lexicographer files of things that can be seen or heard, and of what they do.
        const THINGS: [u8; 8] = [5, 6, 8, 11, 13, 17, 19, 20];
        const PEOPLE: u8 = 18;
        const DEEDS: [u8; 6] = [29, 32, 35, 36, 38, 39];
        let of = |keep: &dyn Fn(&Synset) -> bool| Weighted::new(wordnet.synsets.iter().filter(|s| keep(s)));
        Self {
            nouns: of(&|s| {
                s.part == Part::Noun && (THINGS.contains(&s.file) || (s.file == PEOPLE && s.count > 0))
            }),
            verbs: of(&|s| s.part == Part::Verb && DEEDS.contains(&s.file)),
            adjectives: of(&|s| s.part == Part::Adjective && s.count > 0),
            meanings: of(&|_| true),
        }
    }

    fn name(&self, random: &mut Philox) -> Option<String> {
        let (word, synset) = self.nouns.draw(random)?;
        match random.below(3) {
            0 => Some(article(word)),
            1 => Some(word.to_owned()),
            _ => short(&synset.gloss).then(|| format!("{word}: {}", synset.gloss)),
        }
    }

    fn combination(&self, random: &mut Philox) -> Option<String> {
        let (noun, _) = self.nouns.draw(random)?;
        let (verb, _) = self.verbs.draw(random)?;
        let (adjective, _) = self.adjectives.draw(random)?;
        let (finite, going) = (third_person(verb), gerund(verb));
        Some(match random.below(6) {
            0 => format!("{} {noun}", article(adjective)),
            1 => format!("{going} {noun}"),
            2 => format!("{} is {going}", article(noun)),
            3 => format!("{} {noun} {finite}", article(adjective)),
            4 => format!("the sound of {} {going}", article(noun)),
            _ => format!("{} {finite}", article(noun)),
        })
    }

    fn gloss(&self, random: &mut Philox) -> Option<String> {
        let (_, synset) = self.meanings.draw(random)?;
        let text = match random.below(synset.examples.len() + 1) {
            0 => &synset.gloss,
            i => &synset.examples[i - 1],
        };
        (short(text) && text.contains(' ')).then(|| text.to_lowercase())
    }
}

/// Meanings with running sums of weights.
struct Weighted<'a> {
    synsets: Vec<&'a Synset>,
    sums: Vec<f32>,
}

impl<'a> Weighted<'a> {
    fn new(synsets: impl Iterator<Item = &'a Synset>) -> Self {
        let synsets: Vec<_> = synsets
            .filter(|synset| synset.words.iter().any(|word| usable(word)))
            .collect();
        let mut sum = 0.0;
        let weight = |synset: &&Synset| {
            // Words never met in running text still get a small share: prompts are full of them.
            sum += 0.25 + (1.0 + synset.count as f32).ln();
            sum
        };
        let sums = synsets.iter().map(weight).collect();
        Self { synsets, sums }
    }

    fn draw(&self, random: &mut Philox) -> Option<(&'a str, &'a Synset)> {
        let goal = random.uniform() * self.sums.last()?;
        let synset = *self.synsets.get(self.sums.partition_point(|&sum| sum <= goal))?;
        let words: Vec<&str> = synset
            .words
            .iter()
            .map(String::as_str)
            .filter(|word| usable(word))
            .collect();
        Some((pick(&words, random)?, synset))
    }
}

/// True for words in plain lower-case letters, of at most two parts.
fn usable(word: &str) -> bool {
    word.chars()
        .all(|c| c.is_ascii_lowercase() || c == ' ' || c == '-')
        && word.split(' ').count() <= 2
}

fn short(text: &str) -> bool {
    text.split(' ').count() <= LONGEST_GLOSS
}

fn without_article(noun: &str) -> &str {
    noun.strip_prefix("a ")
        .or_else(|| noun.strip_prefix("an "))
        .unwrap_or(noun)
}

/// "a dog", "an owl", "a unicorn".
fn article(noun: &str) -> String {
    let vowel = noun.starts_with(['a', 'e', 'i', 'o', 'u'])
        && !["uni", "eu", "use", "one"].iter().any(|p| noun.starts_with(p));
    format!("{} {noun}", if vowel { "an" } else { "a" })
}

/// Inflects the first word of a verb phrase: "take off" becomes "takes off".
fn inflect(verb: &str, ending: impl Fn(&str) -> String) -> String {
    match verb.split_once(' ') {
        Some((first, rest)) => format!("{} {rest}", ending(first)),
        None => ending(verb),
    }
}

fn third_person(verb: &str) -> String {
    inflect(verb, |word| {
        let before = word
            .len()
            .checked_sub(2)
            .and_then(|at| word.as_bytes().get(at))
            .copied()
            .unwrap_or(b'a');
        if let Some(stem) = word.strip_suffix('y')
            && !b"aeiou".contains(&before)
        {
            format!("{stem}ies")
        } else if ["s", "x", "z", "ch", "sh", "o"]
            .iter()
            .any(|end| word.ends_with(end))
        {
            format!("{word}es")
        } else {
            format!("{word}s")
        }
    })
}

fn gerund(verb: &str) -> String {
    inflect(verb, |word| {
        let vowel = |c: &u8| b"aeiouy".contains(c);
        let bytes = word.as_bytes();
        if let Some(stem) = word.strip_suffix("ie") {
            return format!("{stem}ying");
        }
        if let Some(stem) = word.strip_suffix('e')
            && bytes.len() > 2
            && !stem.ends_with(['e', 'o', 'y'])
        {
            return format!("{stem}ing");
        }
        let vowels = bytes.iter().filter(|c| vowel(c)).count();
        let doubled = vowels == 1
            && matches!(bytes, [.., a, b, c] if !vowel(a) && vowel(b) && !vowel(c) && !b"wx".contains(c));
        match bytes.last() {
            Some(&last) if doubled => format!("{word}{}ing", char::from(last)),
            _ => format!("{word}ing"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn synset(part: Part, file: u8, word: &str, gloss: &str) -> Synset {
        let words = vec![word.to_owned()];
        Synset {
            part,
            file,
            words,
            gloss: gloss.into(),
            examples: vec![format!("some {word}s are loud")],
            count: 3,
        }
    }

    fn wordnet() -> WordNet {
        let animals =
            ["weasel", "otter", "newt", "unicorn"].map(|word| synset(Part::Noun, 5, word, "a small animal"));
        let verbs = ["bark", "hop", "die"].map(|word| synset(Part::Verb, 38, word, "do something"));
        let adjectives = [synset(Part::Adjective, 0, "odd", "not even")];
        WordNet {
            synsets: [&animals[..], &verbs, &adjectives].concat(),
        }
    }

    fn corpus(seed: u64, reserved: &[&str]) -> Vec<String> {
        let subjects = [Subject {
            nouns: vec!["a dog".into(), "a puppy".into()],
            verbs: vec![
                ("barks".into(), "barking".into()),
                ("woofs".into(), "woofing".into()),
            ],
        }];
        let captions = |number| format!("a dog barks {number} times");
        let wordnet = wordnet();
        let sources = Sources {
            captions: &captions,
            subjects: &subjects,
            wordnet: &wordnet,
            reserved,
        };
        write(&sources, &Shares::default(), 400, seed)
    }

    #[test]
    fn sentences_are_different_reproducible_and_never_reserved() {
        let sentences = corpus(1, &["A puppy woofs!", "a dog"]);
        assert_eq!(sentences, corpus(1, &["A puppy woofs!", "a dog"]));
        assert_ne!(sentences, corpus(2, &[]));
        let plain: HashSet<String> = sentences.iter().map(|text| plain(text)).collect();
        assert_eq!(plain.len(), sentences.len());
        assert!(!plain.contains("a puppy woofs") && !plain.contains("a dog"));
        assert!(plain.contains("a dog woofs") || plain.contains("the dog woofs"));
        for part in ["barks 7 times", "otter", "a small animal"] {
            assert!(sentences.iter().any(|text| text.contains(part)), "{part}");
        }
        assert!((300..=400).contains(&sentences.len()), "{}", sentences.len());
    }

    #[test]
    fn words_are_inflected() {
        for (verb, finite, going) in [
            ("bark", "barks", "barking"),
            ("fly", "flies", "flying"),
            ("play", "plays", "playing"),
            ("hiss", "hisses", "hissing"),
            ("hop", "hops", "hopping"),
            ("whine", "whines", "whining"),
            ("die", "dies", "dying"),
            ("see", "sees", "seeing"),
            ("take off", "takes off", "taking off"),
            ("growl", "growls", "growling"),
            ("go", "goes", "going"),
        ] {
            assert_eq!(
                (third_person(verb).as_str(), gerund(verb).as_str()),
                (finite, going)
            );
        }
        assert_eq!(
            [article("owl"), article("unicorn"), article("dog")],
            ["an owl", "a unicorn", "a dog"]
        );
    }
}
