//! A needle in a haystack: a fact is hidden in a long text, and asked for at its end (spec of the scaling laws, arXiv 2406.16690).
//!
//! ```text
//! haystack .. needle .. haystack  question  ->  number          L tokens up to the answer
//! standard   the needle is a sentence that says the number
//! easy       the question stands in front of that sentence too
//! ```
//!
//! The depth of a needle is the share of the haystack before it, moved back to the end of a sentence. Answers are judged in two ways:
//! what the model writes, by the likeliest tokens, must begin with the number; and the number must be the likeliest of several
//! numbers with as many digits. Small models that cannot copy digits may still tell the right ones from others.
//!
//! The haystack is read once, whatever lengths and depths there are: states in front of needles are forked. Needles of one cell go
//! on together.

use anyhow::bail;
use candle_core::{Result, Tensor};
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::philox::Philox;
use fulgur_lightnet::lm::likelihood::{Continuation, log_likelihoods};
use fulgur_lightnet::lm::tokenizer::LmTokenizer;
use fulgur_lightnet::lm::{MOST_TOGETHER, State};
use serde::Serialize;

use super::figures::{Estimate, Ratio};
use super::{Subject, likeliest, tokens_behind};

/// Tokens behind the number that the model may write first.
const SPARE: usize = 8;
/// How far a needle moves back to the end of a sentence, in tokens.
const SENTENCE: usize = 400;
/// Bytes of a token of the haystack, about; more is read where they are longer.
const BYTES: usize = 8;
/// Places that nobody has written about.
const PLACES: [&str; 16] = [
    "Ardmoor",
    "Belwick",
    "Corvane",
    "Dunhallow",
    "Estermarsh",
    "Fennbridge",
    "Galtry",
    "Hollowmere",
    "Ivelstead",
    "Jarrowfen",
    "Kestrelby",
    "Lorndale",
    "Marrowick",
    "Northolme",
    "Oxmere",
    "Pellwater",
];

/// How hard it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The question stands in front of the needle too.
    Easy,
    /// The needle alone.
    Standard,
}

/// What is hidden where.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tokens up to the answer, of each column.
    pub lengths: Vec<usize>,
    /// Depths, from the beginning to the end.
    pub depths: usize,
    /// How hard it is.
    pub kind: Kind,
    /// Needles of a cell.
    pub samples: usize,
    /// Digits of a number.
    pub digits: u32,
    /// Other numbers to choose from.
    pub others: usize,
    /// Seed of places and numbers.
    pub seed: u64,
}

/// One length and depth.
#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    /// Tokens up to the answer.
    pub length: usize,
    /// Share of the haystack before the needle that was asked for.
    pub depth: f64,
    /// Tokens before the needle.
    pub position: usize,
    /// Tokens between needle and question, in the mean.
    pub distance: f64,
    /// Needles.
    pub n: usize,
    /// Share of needles whose number is written.
    pub written: Estimate,
    /// Share of needles whose number is the likeliest.
    pub likeliest: Estimate,
    /// Place of the number among all by likelihood, from 1, in the mean.
    pub rank: f64,
}

/// A figure over all cells.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Overall {
    /// Plain mean.
    pub mean: f64,
    /// Its standard error.
    pub stderr: Option<f64>,
    /// Mean weighted by the distance between needle and question.
    pub weighted: Option<f64>,
    /// Its standard error.
    pub weighted_stderr: Option<f64>,
}

impl Overall {
    fn of(cells: &[Cell], figure: impl Fn(&Cell) -> Estimate) -> Option<Self> {
        let plain = Estimate::weighed(cells.iter().map(|cell| (figure(cell), 1.0)))?;
        let weighted = Estimate::weighed(cells.iter().map(|cell| (figure(cell), cell.distance)));
        Some(Self {
            mean: plain.mean,
            stderr: plain.stderr,
            weighted: weighted.map(|weighted| weighted.mean),
            weighted_stderr: weighted.and_then(|weighted| weighted.stderr),
        })
    }
}

/// All cells that were done, by length and depth.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// The cells.
    pub cells: Vec<Cell>,
    /// Of written numbers; none without cells.
    pub written: Option<Overall>,
    /// Of likeliest numbers.
    pub likeliest: Option<Overall>,
    /// What guessing gives for the likeliest.
    pub chance: f64,
    /// Whether all cells were done.
    pub finished: bool,
}

impl Options {
    /// Whether they mean something.
    ///
    /// # Errors
    /// They do not; the one is named.
    pub fn check(&self) -> anyhow::Result<()> {
        let most = 10usize
            .saturating_pow(self.digits.saturating_sub(1))
            .saturating_mul(9);
        for (name, value, range) in [
            ("depths", self.depths, 1..=1000),
            ("samples", self.samples, 1..=10_000),
            ("digits", self.digits as usize, 1..=15),
            ("others", self.others, 1..=most.saturating_sub(1).min(255)),
            ("number of lengths", self.lengths.len(), 1..=1000),
        ] {
            if !range.contains(&value) {
                bail!("{name} is {value}, expected {} to {}", range.start(), range.end());
            }
        }
        for &length in &self.lengths {
            if !(1..=1 << 24).contains(&length) {
                bail!("length is {length}, expected 1 to {}", 1 << 24);
            }
        }
        Ok(())
    }

    /// Depth of a row.
    fn depth(&self, row: usize) -> f64 {
        match self.depths {
            1 => 0.5,
            depths => row as f64 / (depths - 1) as f64,
        }
    }
}

/// Hides facts in `haystack` and asks for them; `go_on` is told how many tokens have been read and how many there are, and ends it
/// by `false`: then what was done by then is there.
///
/// # Errors
/// Options that mean nothing, a haystack that is too short, a length without room for a needle, a model without tokenizer, or a
/// failing model.
pub fn needle(
    subject: &Subject,
    haystack: &str,
    options: &Options,
    mut go_on: impl FnMut(u64, u64) -> bool,
) -> anyhow::Result<Found> {
    options.check()?;
    let tokenizer = subject.tokenizer()?;
    let longest = options.lengths.iter().copied().max().unwrap_or(0);
    subject.check_memory(longest.saturating_mul(2 * options.samples.min(MOST_TOGETHER) + options.others))?;
    let hay = hay(tokenizer, haystack, longest)?;
    let mut plans = Vec::with_capacity(options.lengths.len() * options.depths);
    for &length in &options.lengths {
        for row in 0..options.depths {
            plans.push(Plan::new(tokenizer, &hay, options, length, options.depth(row))?);
        }
    }
    let all: u64 = plans.iter().map(Plan::tokens).sum::<u64>()
        + plans.iter().map(|plan| plan.position as u64).max().unwrap_or(0);
    let mut order: Vec<usize> = (0..plans.len()).collect();
    order.sort_by_key(|&at| plans[at].position);
    let mut cells: Vec<Option<Cell>> = vec![None; plans.len()];
    let (mut state, mut read, mut done, mut finished) = (subject.model.start(), 0, 0u64, true);
    'cells: for at in order {
        let plan = &plans[at];
        for ids in hay[read..plan.position].chunks(subject.chunk) {
            extend(subject, &[ids], &mut state)?;
            read += ids.len();
            done += ids.len() as u64;
            if !go_on(done, all) {
                finished = false;
                break 'cells;
            }
        }
        let mut told = |tokens: usize| {
            done += tokens as u64;
            go_on(done, all)
        };
        let Some(cell) = plan.ask(subject, tokenizer, &hay, &state, &mut told)? else {
            finished = false;
            break;
        };
        cells[at] = Some(cell);
    }
    let cells: Vec<Cell> = cells.into_iter().flatten().collect();
    Ok(Found {
        written: Overall::of(&cells, |cell| cell.written),
        likeliest: Overall::of(&cells, |cell| cell.likeliest),
        chance: 1.0 / (1 + options.others) as f64,
        cells,
        finished,
    })
}

/// The first `count` tokens of the haystack.
fn hay(tokenizer: &LmTokenizer, haystack: &str, count: usize) -> anyhow::Result<Vec<u32>> {
    let mut bytes = count.saturating_mul(BYTES);
    loop {
        let mut end = bytes.min(haystack.len());
        while !haystack.is_char_boundary(end) {
            end += 1;
        }
        let mut ids = tokenizer.encode(&haystack[..end], true)?;
        // The last tokens of a piece may be others than in the whole.
        if ids.len() > count || end == haystack.len() {
            if ids.len() < count {
                bail!(
                    "the haystack has {} tokens, expected {count}, the longest length",
                    ids.len()
                );
            }
            ids.truncate(count);
            return Ok(ids);
        }
        bytes = bytes.saturating_mul(2);
    }
}

/// Reads rows of equal length behind `state`, and gives the logits `[B, V]` behind them.
fn extend(subject: &Subject, rows: &[&[u32]], state: &mut State) -> Result<Tensor> {
    let ids = rows.concat();
    let shape = [rows.len(), ids.len() / rows.len().max(1)];
    let ids = Ids::new(&ids, &shape, subject.vocabulary())?;
    subject.model.prefill(&ids, state)
}

/// A fact and the question for it, in tokens.
#[derive(Clone, Debug)]
struct Needle {
    sentence: Vec<u32>,
    /// Ends with a token that the first one of the answers stands behind.
    question: Vec<u32>,
    /// The number and others, each as it stands behind the question.
    answers: Vec<Vec<u32>>,
    number: String,
}

impl Needle {
    fn draw(tokenizer: &LmTokenizer, options: &Options, noise: &mut Philox) -> anyhow::Result<Self> {
        let place = PLACES[noise.below(PLACES.len())];
        let mut numbers: Vec<String> = Vec::with_capacity(1 + options.others);
        let least = 10usize.pow(options.digits - 1);
        while numbers.len() <= options.others {
            let number = (least + noise.below(9 * least)).to_string();
            if !numbers.contains(&number) {
                numbers.push(number);
            }
        }
        let ask = format!("What is the magic number of {place}?");
        let say = format!("The magic number of {place} is");
        let sentence = match options.kind {
            Kind::Easy => format!(" {ask} {say} {}.", numbers[0]),
            Kind::Standard => format!(" {say} {}.", numbers[0]),
        };
        let question = format!("\n{ask} {say}");
        let mut answers = Vec::with_capacity(numbers.len());
        let mut tokens = Vec::new();
        for number in &numbers {
            let Continuation {
                context,
                continuation,
            } = tokens_behind(tokenizer, &question, &format!(" {number}"))?;
            answers.push(continuation);
            tokens = context;
        }
        Ok(Self {
            sentence: tokenizer.encode(&sentence, false)?,
            question: tokens,
            answers,
            number: numbers.swap_remove(0),
        })
    }

    /// Tokens of sentence and question.
    fn len(&self) -> usize {
        self.sentence.len() + self.question.len()
    }
}

/// A cell that is to be done.
#[derive(Debug)]
struct Plan {
    length: usize,
    depth: f64,
    /// Where needles are.
    position: usize,
    needles: Vec<Needle>,
}

impl Plan {
    fn new(
        tokenizer: &LmTokenizer,
        hay: &[u32],
        options: &Options,
        length: usize,
        depth: f64,
    ) -> anyhow::Result<Self> {
        let noise = &mut Philox::named(options.seed, &format!("needle/{length}/{depth}"));
        let needles: Vec<Needle> = (0..options.samples)
            .map(|_| Needle::draw(tokenizer, options, noise))
            .collect::<anyhow::Result<_>>()?;
        let most = needles.iter().map(Needle::len).max().unwrap_or(0);
        let Some(room) = length.checked_sub(most).filter(|&room| room > 0) else {
            bail!("length is {length}, expected more than the {most} tokens of needle and question");
        };
        let position = sentence_end(tokenizer, hay, (depth * room as f64).round() as usize)?;
        Ok(Self {
            length,
            depth,
            position,
            needles,
        })
    }

    /// Tokens that are read for it behind the haystack before it.
    fn tokens(&self) -> u64 {
        (self.needles.len() * (self.length - self.position)) as u64
    }

    /// Asks for all needles behind the state of the haystack before them; none if told to end.
    fn ask(
        &self,
        subject: &Subject,
        tokenizer: &LmTokenizer,
        hay: &[u32],
        before: &State,
        told: &mut impl FnMut(usize) -> bool,
    ) -> anyhow::Result<Option<Cell>> {
        let (mut written, mut right) = (Ratio::default(), Ratio::default());
        let (mut ranks, mut distances) = (0, 0);
        for needles in self.needles.chunks(MOST_TOGETHER) {
            let rows: Vec<Vec<u32>> = needles
                .iter()
                .map(|needle| {
                    let rest = &hay[self.position..self.length - needle.len()];
                    distances += rest.len();
                    [&needle.sentence[..], rest, &needle.question].concat()
                })
                .collect();
            let width = self.length - self.position;
            let mut state = before.select(&vec![0; rows.len()])?;
            // The last token is read with the answers.
            let most = (subject.chunk / rows.len()).max(1);
            for from in (0..width - 1).step_by(most) {
                let to = (from + most).min(width - 1);
                let part: Vec<&[u32]> = rows.iter().map(|row| &row[from..to]).collect();
                extend(subject, &part, &mut state)?;
                if !told((to - from) * rows.len()) {
                    return Ok(None);
                }
            }
            let last: Vec<u32> = rows.iter().map(|row| row[width - 1]).collect();
            for (row, needle) in needles.iter().enumerate() {
                let own = match state.batch() {
                    Some(_) => state.select(&[row as u32])?,
                    None => state.clone(),
                };
                let rank = rank(subject, &own, last[row], needle)?;
                right.add(f64::from(u8::from(rank == 1)), 1.0);
                ranks += rank;
            }
            let answers = needles.iter().flat_map(|needle| &needle.answers);
            let count = answers.map(Vec::len).max().unwrap_or(0) + SPARE;
            let texts = write(subject, tokenizer, state, last, count)?;
            for (text, needle) in texts.iter().zip(needles) {
                written.add(f64::from(u8::from(is_number(text, &needle.number))), 1.0);
            }
            if !told(rows.len()) {
                return Ok(None);
            }
        }
        let n = self.needles.len();
        let (Some(written), Some(likeliest)) = (written.estimate(), right.estimate()) else {
            return Ok(None);
        };
        Ok(Some(Cell {
            length: self.length,
            depth: self.depth,
            position: self.position,
            distance: distances as f64 / n as f64,
            n,
            written,
            likeliest,
            rank: ranks as f64 / n as f64,
        }))
    }
}

/// The end of the last sentence before `position`, or there if there is none nearby.
fn sentence_end(tokenizer: &LmTokenizer, hay: &[u32], position: usize) -> anyhow::Result<usize> {
    for at in (position.saturating_sub(SENTENCE)..position).rev() {
        let text = tokenizer.decode(&hay[at..=at])?;
        if text.trim_end().ends_with(['.', '!', '?']) {
            return Ok(at + 1);
        }
    }
    Ok(position)
}

/// Place of the number among all answers by likelihood, from 1; those as likely as it count as likelier.
fn rank(subject: &Subject, state: &State, last: u32, needle: &Needle) -> anyhow::Result<usize> {
    let asked: Vec<Continuation> = needle
        .answers
        .iter()
        .map(|answer| Continuation {
            context: vec![last],
            continuation: answer.clone(),
        })
        .collect();
    let sums = log_likelihoods(&subject.model, state, &asked, subject.chunk)?;
    if let Some(sum) = sums.iter().find(|sum| !sum.is_finite()) {
        bail!("an answer has a log-likelihood of {sum}, expected a finite number");
    }
    Ok(1 + sums[1..].iter().filter(|&&sum| sum >= sums[0]).count())
}

/// What the model writes behind each row of `state` and its last token: `count` times the likeliest.
fn write(
    subject: &Subject,
    tokenizer: &LmTokenizer,
    mut state: State,
    mut last: Vec<u32>,
    count: usize,
) -> anyhow::Result<Vec<String>> {
    let mut ids = vec![Vec::with_capacity(count); last.len()];
    for _ in 0..count {
        let logits = subject.model.step(&last, &mut state)?;
        last = likeliest(&logits, tokenizer.rows())?;
        ids.iter_mut().zip(&last).for_each(|(ids, &id)| ids.push(id));
    }
    ids.iter().map(|ids| Ok(tokenizer.decode(ids)?)).collect()
}

/// Whether a text begins with the number, and no other digits stand behind it.
fn is_number(text: &str, number: &str) -> bool {
    let rest = text.trim_start().strip_prefix(number);
    rest.is_some_and(|rest| !rest.starts_with(|letter: char| letter.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lm_eval::tests::following;

    const HAY: &str =
        "The rain falls on the roofs of the town. An owl hoots, far away. Who rings the bell? Nobody! ";

    fn options() -> Options {
        Options {
            lengths: vec![256, 200],
            depths: 3,
            kind: Kind::Standard,
            samples: 5,
            digits: 3,
            others: 4,
            seed: 7,
        }
    }

    fn plans(options: &Options) -> Vec<Plan> {
        let bytes = LmTokenizer::bytes();
        let hay = hay(&bytes, &HAY.repeat(9), 256).unwrap();
        let all = options
            .lengths
            .iter()
            .flat_map(|&length| (0..options.depths).map(move |row| (length, row)));
        all.map(|(length, row)| Plan::new(&bytes, &hay, options, length, options.depth(row)).unwrap())
            .collect()
    }

    /// Needles stand behind a sentence, at the depth asked for or a little before it.
    #[test]
    fn needles_are_where_they_belong() {
        for kind in [Kind::Easy, Kind::Standard] {
            let options = Options { kind, ..options() };
            for plan in plans(&options) {
                let room = plan.length - plan.needles.iter().map(Needle::len).max().unwrap();
                let wanted = (plan.depth * room as f64).round() as usize;
                assert!(plan.position <= wanted && wanted - plan.position < 60);
                let text = HAY.repeat(9);
                let behind = text[..plan.position].ends_with(['.', '!', '?']);
                // The first sentence has 40 bytes.
                assert!(behind || (plan.position == wanted && wanted < 40));
                for needle in &plan.needles {
                    let text = |ids: &[u32]| LmTokenizer::bytes().decode(ids).unwrap();
                    let (sentence, question) = (text(&needle.sentence), text(&needle.question));
                    assert!(sentence.ends_with(&format!(" is {}.", needle.number)));
                    assert!(
                        question.starts_with("\nWhat is the magic number of ") && question.ends_with(" is")
                    );
                    let asks = sentence.contains(question.split_once('?').unwrap().0.trim());
                    assert_eq!(asks, kind == Kind::Easy);
                    assert_eq!(text(&needle.answers[0]), format!(" {}", needle.number));
                    let mut answers = needle.answers.clone();
                    answers.sort();
                    answers.dedup();
                    assert!(answers.len() == 5 && answers.iter().all(|answer| answer.len() == 4));
                }
            }
        }
        // Without an end of a sentence nearby, it stays.
        let words: Vec<u32> = "word ".repeat(200).bytes().map(u32::from).collect();
        assert_eq!(sentence_end(&LmTokenizer::bytes(), &words, 700).unwrap(), 700);
    }

    /// Every figure from the whole text of each needle, read alone and at once.
    #[test]
    fn forks_are_as_whole_texts_read_alone() {
        let options = options();
        let subject = Subject {
            chunk: 37,
            ..crate::lm_eval::tests::random(11)
        };
        let text = HAY.repeat(9);
        let mut last = (0, 0);
        let found = needle(&subject, &text, &options, |done, all| {
            last = (done, all);
            true
        })
        .unwrap();
        assert!(found.finished && found.chance == 0.2 && last.0 == last.1);
        let plans = plans(&options);
        assert_eq!(found.cells.len(), plans.len());
        for (cell, plan) in found.cells.iter().zip(&plans) {
            assert_eq!(
                (cell.length, cell.position, cell.n),
                (plan.length, plan.position, 5)
            );
            let (mut ranks, mut firsts) = (0, 0.0);
            for needle in &plan.needles {
                let rest = &text.as_bytes()[plan.position..plan.length - needle.len()];
                let rest: Vec<u32> = rest.iter().map(|&byte| byte.into()).collect();
                let front: Vec<u32> = text.bytes().take(plan.position).map(u32::from).collect();
                let whole = [&front[..], &needle.sentence, &rest, &needle.question].concat();
                assert_eq!(whole.len(), plan.length);
                let sums: Vec<f64> = needle
                    .answers
                    .iter()
                    .map(|answer| {
                        let ids = [&whole[..], answer].concat();
                        let ids = Ids::new(&ids, &[1, ids.len()], 256).unwrap();
                        let logits = subject.model.logits(&ids).unwrap().squeeze(0).unwrap();
                        let rows: Vec<Vec<f32>> = logits.to_vec2().unwrap();
                        let rows = rows[whole.len() - 1..].iter().zip(answer);
                        rows.map(|(row, &id)| {
                            let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
                            f64::from(row[id as usize]) - sum.ln()
                        })
                        .sum()
                    })
                    .collect();
                let rank = 1 + sums[1..].iter().filter(|&&sum| sum >= sums[0]).count();
                ranks += rank;
                firsts += f64::from(u8::from(rank == 1));
            }
            assert!((cell.rank - ranks as f64 / 5.0).abs() < 1e-9, "{cell:?} {ranks}");
            assert!((cell.likeliest.mean - firsts / 5.0).abs() < 1e-9);
            assert_eq!(cell.written.mean, 0.0);
        }
        let likeliest = found.likeliest.unwrap();
        let mean = |weight: &dyn Fn(&Cell) -> f64| {
            let sum: f64 = found
                .cells
                .iter()
                .map(|cell| weight(cell) * cell.likeliest.mean)
                .sum();
            sum / found.cells.iter().map(weight).sum::<f64>()
        };
        assert!((likeliest.mean - mean(&|_| 1.0)).abs() < 1e-12);
        assert!((likeliest.weighted.unwrap() - mean(&|cell| cell.distance)).abs() < 1e-12);
    }

    /// A model that always writes one number finds the needle where that is the number, and only there.
    #[test]
    fn written_numbers_are_found() {
        let options = options();
        let plans = plans(&options);
        let distinct = |number: &&String| number.chars().all(|digit| number.matches(digit).count() == 1);
        let numbers = plans
            .iter()
            .flat_map(|plan| &plan.needles)
            .map(|needle| &needle.number);
        let number = numbers.clone().find(distinct).unwrap();
        let subject = following(&format!("s {number}. "));
        let found = needle(&subject, &HAY.repeat(9), &options, |_, _| true).unwrap();
        let (mut all, mut best) = (0, 0.0);
        for (cell, plan) in found.cells.iter().zip(&plans) {
            let right = plan
                .needles
                .iter()
                .filter(|needle| needle.number == *number)
                .count();
            assert_eq!(cell.written.mean, right as f64 / 5.0);
            assert!(cell.likeliest.mean >= cell.written.mean);
            all += right;
            best += 5.0 * cell.written.mean;
        }
        assert!(all > 0 && (best - all as f64).abs() < 1e-9);
        assert!(is_number(" 123. And", "123") && is_number("123", "123"));
        assert!(!is_number(" 1234", "123") && !is_number(" is 123", "123") && !is_number("12", "123"));
    }

    #[test]
    fn what_means_nothing_is_refused() {
        let text = HAY.repeat(9);
        let subject = crate::lm_eval::tests::random(1);
        let ask = |change: &dyn Fn(&mut Options)| {
            let mut options = options();
            change(&mut options);
            needle(&subject, &text, &options, |_, _| true)
                .unwrap_err()
                .to_string()
        };
        assert!(ask(&|o| o.depths = 0).contains("depths is 0"));
        assert!(ask(&|o| o.samples = 0).contains("samples is 0"));
        assert!(ask(&|o| o.digits = 0).contains("digits is 0"));
        assert!(ask(&|o| o.digits = 16).contains("digits is 16"));
        assert!(ask(&|o| (o.digits, o.others) = (1, 9)).contains("others is 9, expected 1 to 8"));
        assert!(ask(&|o| o.lengths = vec![]).contains("number of lengths is 0"));
        assert!(ask(&|o| o.lengths = vec![0]).contains("length is 0"));
        assert!(ask(&|o| o.lengths = vec![90]).contains("length is 90, expected more than the"));
        assert!(ask(&|o| o.lengths = vec![5000]).contains("the haystack has 837 tokens, expected 5000"));
        let stopped = needle(&subject, &text, &options(), |done, _| done < 600).unwrap();
        assert!(!stopped.finished && stopped.cells.len() < 6);
    }
}
