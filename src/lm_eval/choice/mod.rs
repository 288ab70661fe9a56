//! Questions with choices: the answer is the choice that the model finds the likeliest.
//!
//! ```text
//! acc       argmax of sum log p(choice | context)
//! acc_norm  the same over the bytes of the choice, without the space before it
//! ```
//!
//! Contexts and choices become tokens as in the standard harness: a choice is what context and choice together have beyond the
//! tokens of the context. Of WinoGrande the contexts differ and what follows is the same (the partial method), so that both are
//! one. Of equal choices the first is the answer.

mod formats;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
pub use formats::{Format, Question, Questions};
use fulgur_lightnet::lm::likelihood::{Continuation, log_likelihoods_together, together};
use serde::Serialize;

use super::figures::{Estimate, Ratio};
use super::{Subject, first_largest, tokens_behind};

/// Questions that are looked at together, to ask those of like lengths at once.
const POOL: usize = 512;

/// How questions are put.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Most questions of a file.
    pub limit: Option<usize>,
    /// Whether contexts begin with what the tokenizer puts in front of any text; the standard harness leaves that out.
    pub start: bool,
}

/// How a model did on one file.
#[derive(Clone, Debug, Serialize)]
pub struct Scored {
    /// The layout.
    pub format: Format,
    /// The file.
    pub path: PathBuf,
    /// Questions.
    pub n: usize,
    /// Share of right answers.
    pub acc: f64,
    /// Its standard error.
    pub acc_stderr: Option<f64>,
    /// Share of right answers by bytes.
    pub acc_norm: f64,
    /// Its standard error.
    pub acc_norm_stderr: Option<f64>,
    /// What guessing gives.
    pub chance: f64,
    /// Which of the two papers report.
    pub counts: &'static str,
    /// Whether all questions were asked that were to be.
    pub finished: bool,
}

impl Scored {
    /// The figure that counts.
    pub fn score(&self) -> Estimate {
        let (mean, stderr) = match self.format.normalised() {
            true => (self.acc_norm, self.acc_norm_stderr),
            false => (self.acc, self.acc_stderr),
        };
        Estimate { mean, stderr }
    }
}

/// Asks the questions in a file; `go_on` is told how many are done, and ends it by `false`.
///
/// # Errors
/// A file that is none of this layout, without questions, or with text that the tokenizer has no tokens for; or a failing model.
pub fn score(
    subject: &Subject,
    format: Format,
    path: &Path,
    options: &Options,
    mut go_on: impl FnMut(usize) -> bool,
) -> anyhow::Result<Scored> {
    let (mut acc, mut norm, mut chance) = (Ratio::default(), Ratio::default(), Ratio::default());
    let mut finished = true;
    let limit = options.limit.unwrap_or(usize::MAX);
    let mut questions = format.questions(path)?.take(limit);
    while finished {
        let mut pool = Vec::new();
        for question in questions.by_ref().take(POOL) {
            let (line, question) = question?;
            let asked = in_tokens(subject, &question, options)
                .with_context(|| format!("{}: line {line}", path.display()))?;
            pool.push((line, question, asked));
        }
        if pool.is_empty() {
            break;
        }
        let asked: Vec<&[Continuation]> = pool.iter().map(|(_, _, asked)| asked.as_slice()).collect();
        let model = &subject.model;
        for group in together(model, &asked) {
            let beside: Vec<&[Continuation]> = group.iter().map(|&place| asked[place]).collect();
            let sums = log_likelihoods_together(model, &model.start(), &beside, subject.chunk)
                .with_context(|| path.display().to_string())?;
            for (&place, sums) in group.iter().zip(&sums) {
                let (line, question, _) = &pool[place];
                if let Some(at) = sums.iter().position(|sum| !sum.is_finite()) {
                    bail!(
                        "{}: line {line}: choice {at} has a log-likelihood of {}, expected a finite number",
                        path.display(),
                        sums[at]
                    );
                }
                let right = |values: &[f64]| f64::from(u8::from(first_largest(values) == question.right));
                let bytes = question.choices.iter().map(|(_, choice)| choice.len() as f64);
                let by_bytes: Vec<f64> = sums.iter().zip(bytes).map(|(sum, bytes)| sum / bytes).collect();
                acc.add(right(sums), 1.0);
                norm.add(right(&by_bytes), 1.0);
                chance.add(1.0 / question.choices.len() as f64, 1.0);
            }
            if !go_on(acc.count()) {
                finished = false;
                break;
            }
        }
    }
    let estimates = [acc, norm, chance].map(|ratio| ratio.estimate());
    let [Some(of_acc), Some(of_norm), Some(of_chance)] = estimates else {
        bail!("{}: found no question, expected some", path.display());
    };
    Ok(Scored {
        format,
        path: path.to_owned(),
        n: acc.count(),
        acc: of_acc.mean,
        acc_stderr: of_acc.stderr,
        acc_norm: of_norm.mean,
        acc_norm_stderr: of_norm.stderr,
        chance: of_chance.mean,
        counts: match format.normalised() {
            true => "acc_norm",
            false => "acc",
        },
        finished,
    })
}

/// The choices of a question with what stands before them.
fn in_tokens(subject: &Subject, question: &Question, options: &Options) -> anyhow::Result<Vec<Continuation>> {
    let tokenizer = subject.tokenizer()?;
    let start = match options.start {
        true => tokenizer.encode("", true)?,
        false => Vec::new(),
    };
    let mut asked = Vec::with_capacity(question.choices.len());
    for (context, choice) in &question.choices {
        let mut tokens = tokens_behind(tokenizer, context, &format!(" {choice}"))?;
        tokens.context.splice(0..0, start.iter().copied());
        asked.push(tokens);
    }
    Ok(asked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lm_eval::tests::{random, scored};
    use fulgur_lightnet::lm::likelihood::log_likelihoods;

    /// A model of bytes whose logits are `weight` for `like` and 0 for all others.
    fn liking(like: u8, weight: f32) -> Subject {
        scored(|_, next| if next == usize::from(like) { weight } else { 0.0 })
    }

    fn ask(subject: &Subject, format: Format, rows: &[&str], options: &Options) -> anyhow::Result<Scored> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.jsonl");
        std::fs::write(&path, rows.join("\n")).unwrap();
        score(subject, format, &path, options, |_| true)
    }

    /// The likeliest bytes are known, and so is every sum.
    #[test]
    fn sums_and_sums_by_bytes_choose_what_they_should() {
        let subject = liking(b'x', 3.0);
        let question = Question {
            choices: [("c", "xy"), ("c", "x"), ("c", "xxxxxx")]
                .map(|(a, b)| (a.to_owned(), b.to_owned()))
                .into(),
            right: 0,
        };
        let asked = in_tokens(&subject, &question, &Options::default()).unwrap();
        let model = &subject.model;
        let sums = log_likelihoods(model, &model.start(), &asked, subject.chunk).unwrap();
        // The eps of the norm takes a little off the 3.
        let norm = (3f64.exp() + 255.0).ln();
        for (sum, (likes, bytes)) in sums.iter().zip([(1.0, 3.0), (1.0, 2.0), (6.0, 7.0)]) {
            assert!((sum - (3.0 * likes - norm * bytes)).abs() < 5e-3, "{sums:?}");
        }
        // By sums the shortest, by bytes the one with the largest share of x.
        let row =
            |label: usize| format!(r#"{{"goal": "g", "sol1": "xxxxxx", "sol2": "x", "label": {label}}}"#);
        let rows = [row(0), row(1), row(1), row(1)];
        let rows: Vec<&str> = rows.iter().map(String::as_str).collect();
        let found = ask(&subject, Format::Piqa, &rows, &Options::default()).unwrap();
        assert_eq!(
            (found.n, found.acc, found.acc_norm, found.chance),
            (4, 0.75, 0.25, 0.5)
        );
        let stderr = (0.75f64 * 0.25 / 3.0).sqrt();
        assert!((found.acc_stderr.unwrap() - stderr).abs() < 1e-12);
        assert_eq!((found.counts, found.score().mean), ("acc", 0.75));
        let limited = Options {
            limit: Some(1),
            ..Options::default()
        };
        let found = ask(&subject, Format::Piqa, &rows, &limited).unwrap();
        assert_eq!((found.n, found.acc, found.acc_stderr), (1, 0.0, None));
    }

    /// Contexts that differ go through the model apart: what follows the blank is what counts.
    #[test]
    fn winogrande_asks_for_what_follows() {
        let subject = liking(b'z', 3.0);
        let row = r#"{"sentence": "zz _ was", "option1": "zzzz", "option2": "a", "answer": "1"}"#;
        // Both are equally likely here, of which the first is the answer, though its option is the likelier one.
        let other = row.replace("\"1\"", "\"2\"");
        let found = ask(&subject, Format::Winogrande, &[row, &other], &Options::default()).unwrap();
        assert_eq!((found.acc, found.acc_norm), (0.5, 0.5));
    }

    /// More questions than are looked at together, of all lengths: what each alone answers.
    #[test]
    fn many_questions_are_answered_as_each_alone() {
        let subject = random(4);
        let rows: Vec<String> = (0..POOL + 9)
            .map(|at| {
                let [goal, one, two] = [(at * 7) % 60, (at * 3) % 11, (at * 5) % 13]
                    .map(|count| format!("{at}{}", "owl ".repeat(count)));
                format!(
                    r#"{{"goal": "{goal}", "sol1": "a{one}", "sol2": "b{two}", "label": {}}}"#,
                    at % 2
                )
            })
            .collect();
        let some: Vec<&str> = rows.iter().map(String::as_str).collect();
        let found = ask(&subject, Format::Piqa, &some, &Options::default()).unwrap();
        let alone: Vec<Scored> = (some.iter())
            .map(|row| ask(&subject, Format::Piqa, &[row], &Options::default()).unwrap())
            .collect();
        let right = |of: fn(&Scored) -> f64| alone.iter().map(of).sum::<f64>() / alone.len() as f64;
        assert_eq!(found.n, alone.len());
        assert!((found.acc - right(|one| one.acc)).abs() < 1e-12);
        assert!((found.acc_norm - right(|one| one.acc_norm)).abs() < 1e-12);
        assert!(found.acc > 0.2 && found.acc < 0.8, "{}", found.acc);
        // Who is interrupted has the figures of what was done.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.jsonl");
        std::fs::write(&path, rows.join("\n")).unwrap();
        let mut calls = 0;
        let stopped = score(&subject, Format::Piqa, &path, &Options::default(), |_| {
            calls += 1;
            calls < 3
        });
        let stopped = stopped.unwrap();
        assert!(
            !stopped.finished && (3..POOL).contains(&stopped.n),
            "{}",
            stopped.n
        );
    }

    #[test]
    fn what_cannot_be_asked_is_told() {
        let subject = liking(b'x', 1.0);
        let line = ask(&subject, Format::Piqa, &[], &Options::default())
            .unwrap_err()
            .to_string();
        assert!(line.contains("q.jsonl: found no question"), "{line}");
        let broken = liking(b'x', f32::NAN);
        let row = r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}"#;
        let line = format!(
            "{:#}",
            ask(&broken, Format::Piqa, &[row], &Options::default()).unwrap_err()
        );
        assert!(
            line.contains("q.jsonl: line 1: choice 0 has a log-likelihood of NaN"),
            "{line}"
        );
        let none = Subject {
            tokenizer: None,
            ..liking(b'x', 1.0)
        };
        let line = format!(
            "{:#}",
            ask(&none, Format::Piqa, &[row], &Options::default()).unwrap_err()
        );
        assert!(line.contains("found no tokenizer.json"), "{line}");
    }
}
