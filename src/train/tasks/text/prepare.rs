//! Writes what the text task learns from: the corpus, the vocabulary, and the teacher's vectors.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use candle_core::{DType, Device};
use fulgur_datasets::scenes::{Composer, Options, Split};
use fulgur_datasets::things::{Thing, Things};
use fulgur_lightnet::encoders::bert::SentenceEncoder;
use fulgur_tavdiffusion::text::TextTokenizer;
use fulgur_tavdiffusion::text::corpus::{self, Shares, Sources, Subject};
use fulgur_tavdiffusion::text::teacher::Lessons;
use fulgur_tavdiffusion::text::wordnet::WordNet;

use super::judge::{Candidate, PROMPTS};
use super::{Settings, paths, write_text};
use crate::train::TaskResult;
use crate::train::tasks::check_stop;

/// Sentences of the corpus that the vocabulary is learnt from, for each that the teacher reads.
const VOCABULARY_FACTOR: usize = 4;
/// Sentences that the teacher reads at once.
const BATCH: usize = 64;
/// Every so many captions one in the plainest words.
const CANONICAL_ONE_IN: u64 = 4;
/// Seconds between two lines about the progress.
const REPORT_SECONDS: f64 = 10.0;
/// Entry of the notes with the names of the things.
pub(super) const THINGS_NOTE: &str = "things";

/// Writes `lessons.safetensors` and `tokenizer.json` into `settings.lessons`.
///
/// # Errors
/// A source is missing; the folder cannot be written; `stop` is set, and then nothing is written.
pub(super) fn prepare(settings: &Settings, seed: u64, stop: &AtomicBool) -> TaskResult<()> {
    let things = Things::load(&settings.things).map_err(fetch("stamps"))?;
    let wordnet = WordNet::load(&settings.wordnet).map_err(fetch("wordnet"))?;
    let teacher = SentenceEncoder::load(&settings.teacher, &Device::Cpu).map_err(fetch("minilm"))?;
    std::fs::create_dir_all(&settings.lessons)
        .map_err(|error| format!("{}: {error}", settings.lessons.display()))?;

    let (sentences, vocabulary, notes) = write_corpus(things, &wordnet, settings, seed)?;
    let tokenizer = TextTokenizer::train(&vocabulary, settings.model.vocab_size)?;
    let mut lessons = ask(&teacher, &sentences, stop)?;
    lessons.notes.insert("seed".into(), seed.to_string());
    lessons
        .notes
        .insert("teacher".into(), settings.teacher.display().to_string());
    lessons.notes.insert(THINGS_NOTE.into(), notes);
    let (lessons_path, tokenizer_path) = paths(&settings.lessons);
    write_text(&tokenizer_path, &tokenizer.to_json()?)?;
    lessons.save(&lessons_path)?;
    Ok(())
}

/// Adds the command that brings a missing source.
fn fetch<E: std::fmt::Display>(name: &'static str) -> impl Fn(E) -> String {
    move |error| format!("{error} (fulgur data fetch {name})")
}

/// Sentences for the teacher, sentences for the vocabulary, and the names of the things as JSON.
fn write_corpus(
    things: Things,
    wordnet: &WordNet,
    settings: &Settings,
    seed: u64,
) -> TaskResult<(Vec<String>, Vec<String>, String)> {
    let names: Vec<(String, Subject)> = things
        .iter()
        .map(|thing| (thing.id.clone(), subject(thing)))
        .collect();
    let subjects: Vec<Subject> = names.iter().map(|(_, subject)| subject.clone()).collect();
    let composer = Composer::new(
        things,
        &[],
        Options {
            seed,
            ..Options::default()
        },
    )?;
    let captions = |number: u64| {
        let caption = composer.scene(Split::Train, number).caption;
        if number.is_multiple_of(CANONICAL_ONE_IN) {
            caption.canonical
        } else {
            caption.text
        }
    };
    let reserved: Vec<&str> = PROMPTS.iter().map(|(prompt, _)| *prompt).collect();
    let sources = Sources {
        captions: &captions,
        subjects: &subjects,
        wordnet,
        reserved: &reserved,
    };
    let shares = Shares::default();
    let sentences = corpus::write(&sources, &shares, settings.sentences, seed);
    let vocabulary = corpus::write(&sources, &shares, VOCABULARY_FACTOR * settings.sentences, seed);
    let notes: Vec<_> = names
        .iter()
        .map(|(id, subject)| (id, &subject.nouns, &subject.verbs))
        .collect();
    Ok((sentences, vocabulary, serde_json::to_string(&notes)?))
}

fn subject(thing: &Thing) -> Subject {
    let words = &thing.words;
    let verbs = std::iter::once(&words.verb).chain(&words.other_verbs);
    Subject {
        nouns: std::iter::once(&words.noun)
            .chain(&words.other_nouns)
            .cloned()
            .collect(),
        verbs: verbs
            .map(|verb| (verb.finite.clone(), verb.gerund.clone()))
            .collect(),
    }
}

/// The things that [`prepare`] noted down.
///
/// # Errors
/// The notes are missing or of another shape.
pub(super) fn candidates(lessons: &Lessons) -> TaskResult<Vec<Candidate>> {
    type Entry = (String, Vec<String>, Vec<(String, String)>);
    let notes = lessons
        .notes
        .get(THINGS_NOTE)
        .ok_or("lessons: no things noted, expected their names")?;
    let entries: Vec<Entry> =
        serde_json::from_str(notes).map_err(|error| format!("lessons: things: {error}"))?;
    let candidate = |(id, nouns, verbs)| Candidate {
        id,
        subject: Subject { nouns, verbs },
    };
    Ok(entries.into_iter().map(candidate).collect())
}

/// The teacher's vectors of `sentences`, in their order.
fn ask(teacher: &SentenceEncoder, sentences: &[String], stop: &AtomicBool) -> TaskResult<Lessons> {
    // Sentences of like length share a batch, so that little padding is computed.
    let mut order: Vec<usize> = (0..sentences.len()).collect();
    order.sort_by_key(|&i| sentences[i].len());
    let mut vectors: Vec<Vec<f32>> = vec![Vec::new(); sentences.len()];
    // The first line comes at once: the work takes minutes.
    let (start, mut reported) = (Instant::now(), f64::NEG_INFINITY);
    for (number, batch) in order.chunks(BATCH).enumerate() {
        check_stop(stop, "the teacher was asked")?;
        let texts: Vec<&str> = batch.iter().map(|&i| sentences[i].as_str()).collect();
        let rows = teacher.encode(&texts)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        for (&index, row) in batch.iter().zip(rows) {
            vectors[index] = row;
        }
        let seconds = start.elapsed().as_secs_f64();
        if seconds > reported + REPORT_SECONDS {
            reported = seconds;
            let done = number * BATCH + batch.len();
            let rate = done as f64 / seconds;
            eprintln!(
                "teacher: {done} of {} sentences, {rate:.0} a second",
                sentences.len()
            );
        }
    }
    let mut lessons = Lessons::new(vectors.first().map_or(0, Vec::len));
    for (sentence, vector) in sentences.iter().zip(&vectors) {
        lessons.push(sentence, vector);
    }
    Ok(lessons)
}

#[cfg(all(test, feature = "media"))]
mod tests {
    use super::*;

    #[test]
    fn the_fetched_set_holds_what_is_read_of_wordnet() {
        for file in WordNet::FILES {
            assert!(fulgur_datasets::sets::wordnet::KEPT.contains(&file), "{file}");
        }
    }
}
