//! Answers in words, as SCROLLS asks for them (arXiv 2201.03533): the model goes on with an input, always by the likeliest token, and
//! what it writes is compared with reference answers.
//!
//! A file has an object a line: `{"input": "...", "outputs": ["..."]}`, or `"output"` with one reference, as SCROLLS has it; `id` and
//! `pid` may be there.

use std::path::Path;

use anyhow::{Context as _, bail};
use fulgur_benchmark::metrics::text::TextScores;
use fulgur_datasets::text::Rows;
use fulgur_lightnet::lm::generate::{Continuation, Request, Stop, generate_each};
use fulgur_lightnet::lm::sampling::Sampling;
use fulgur_lightnet::lm::{MOST_TOGETHER, Session};
use serde::{Deserialize, Serialize};

use super::Subject;
use super::figures::{Estimate, Ratio};

/// How answers are written.
#[derive(Clone, Debug)]
pub struct Options {
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Tokens that end an answer.
    pub end: Vec<u32>,
    /// Strings that end an answer.
    pub stop: Vec<String>,
    /// Most inputs.
    pub limit: Option<usize>,
}

/// Means over all inputs, within 0..1.
#[derive(Clone, Debug, Serialize)]
pub struct Answers {
    /// Inputs.
    pub n: usize,
    /// Shared words.
    pub f1: Estimate,
    /// Share of answers that are a reference.
    pub exact_match: Estimate,
    /// Shared words, as summaries count them.
    pub rouge_1: Estimate,
    /// Shared pairs of words.
    pub rouge_2: Estimate,
    /// The longest common subsequence.
    pub rouge_l: Estimate,
    /// Geometric mean of the three.
    pub rouge_mean: Estimate,
    /// Whether all inputs were answered that were to be.
    pub finished: bool,
}

/// An answer with its scores, for those who want to read them.
#[derive(Clone, Debug, Serialize)]
pub struct Answered {
    /// The line of the input.
    pub line: usize,
    /// What the model wrote, without space around it.
    pub answer: String,
    /// What should have been written.
    pub references: Vec<String>,
    /// How much alike they are.
    #[serde(flatten)]
    pub scores: TextScores,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    input: String,
    output: Option<String>,
    outputs: Option<Vec<String>>,
    #[serde(rename = "id")]
    _id: Option<serde_json::Value>,
    #[serde(rename = "pid")]
    _pid: Option<serde_json::Value>,
}

/// Answers the inputs of a file; `each` is given every answer, and ends it by `false`. `go_on` is asked between tokens.
///
/// # Errors
/// A file that is none of this layout or without inputs, an input without tokens, or a failing model.
pub fn answers(
    subject: &Subject,
    path: &Path,
    options: &Options,
    mut go_on: impl FnMut() -> bool,
    mut each: impl FnMut(&Answered) -> bool,
) -> anyhow::Result<Answers> {
    let expected = "{\"input\": \"...\", \"outputs\": [\"...\"]}";
    let mut rows = Rows::<Row>::open(path, expected)?;
    let mut sums = [Ratio::default(); 6];
    let mut finished = true;
    let limit = options.limit.unwrap_or(usize::MAX);
    'all: while finished {
        let mut asked = Vec::new();
        while asked.len() < MOST_TOGETHER.min(limit - sums[0].count())
            && let Some(row) = rows.next()
        {
            let (line, row) = row?;
            let references = match (row.outputs, row.output) {
                (Some(outputs), None) if !outputs.is_empty() => outputs,
                (None, Some(output)) => vec![output],
                _ => return Err(rows.wrong("none or both of output and outputs", expected).into()),
            };
            let ids = subject
                .tokenizer()
                .and_then(|tokenizer| Ok(tokenizer.encode(&row.input, true)?))
                .and_then(|ids| match ids.is_empty() {
                    true => bail!("found an empty input, expected text"),
                    false => Ok(ids),
                })
                .with_context(|| format!("{}: line {line}", path.display()))?;
            asked.push((line, references, ids));
        }
        let (Some((first, ..)), Some((last, ..))) = (asked.first(), asked.last()) else {
            break;
        };
        let lines = match first == last {
            true => format!("line {first}"),
            false => format!("lines {first} to {last}"),
        };
        let inputs: Vec<&[u32]> = asked.iter().map(|(.., ids)| ids.as_slice()).collect();
        let written = write(subject, &inputs, options, &mut go_on)
            .with_context(|| format!("{}: {lines}", path.display()))?;
        for ((line, references, _), answer) in asked.into_iter().zip(written) {
            let Some(answer) = answer else {
                finished = false;
                continue;
            };
            let answered = Answered {
                line,
                scores: TextScores::of(&answer, &references),
                answer,
                references,
            };
            let TextScores {
                f1,
                exact_match,
                rouge_1,
                rouge_2,
                rouge_l,
                rouge_mean,
            } = answered.scores;
            let values = [f1, exact_match, rouge_1, rouge_2, rouge_l, rouge_mean];
            sums.iter_mut()
                .zip(values)
                .for_each(|(sum, value)| sum.add(value, 1.0));
            if !each(&answered) {
                finished = false;
                break 'all;
            }
        }
    }
    let n = sums[0].count();
    let Some([f1, exact_match, rouge_1, rouge_2, rouge_l, rouge_mean]) = estimates(&sums) else {
        if !finished {
            bail!("{}: stopped before the first answer", path.display());
        }
        bail!("{}: found no input, expected some", path.display());
    };
    Ok(Answers {
        n,
        f1,
        exact_match,
        rouge_1,
        rouge_2,
        rouge_l,
        rouge_mean,
        finished,
    })
}

fn estimates<const N: usize>(sums: &[Ratio; N]) -> Option<[Estimate; N]> {
    let all: Option<Vec<Estimate>> = sums.iter().map(Ratio::estimate).collect();
    all?.try_into().ok()
}

/// What the model writes behind each of `inputs`, all at once; none for those that were not finished when it was told to end.
fn write(
    subject: &Subject,
    inputs: &[&[u32]],
    options: &Options,
    go_on: &mut impl FnMut() -> bool,
) -> anyhow::Result<Vec<Option<String>>> {
    let Subject {
        model,
        tokenizer,
        chunk,
        ..
    } = subject;
    let tokens = inputs.iter().map(|ids| ids.len() + options.max_tokens);
    subject.check_memory(tokens.sum())?;
    let mut sessions = Vec::with_capacity(inputs.len());
    for ids in inputs {
        let (mut session, mut stopped) = (Session::new(model), false);
        session.read(model, ids, *chunk, |_| {
            stopped = !go_on();
            !stopped
        })?;
        if stopped {
            return Ok(vec![None; inputs.len()]);
        }
        sessions.push(session);
    }
    let request = Request {
        max_tokens: options.max_tokens,
        sampling: Sampling {
            temperature: 0.0,
            ..Sampling::default()
        },
        end: options.end.clone(),
        stop: options.stop.clone(),
        samples: 1,
        together: MOST_TOGETHER,
    };
    let texts = generate_each(model, tokenizer.as_ref(), &mut sessions, &request, |_, _| go_on())?;
    let finished = |text: Continuation| (text.stop != Stop::Interrupted).then(|| text.text.trim().to_owned());
    Ok(texts.into_iter().map(finished).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lm_eval::tests::following;

    fn options() -> Options {
        Options {
            max_tokens: 40,
            end: Vec::new(),
            stop: vec!["\n".into()],
            limit: None,
        }
    }

    fn ask(rows: &[&str], options: &Options) -> anyhow::Result<(Answers, Vec<Answered>)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, rows.join("\n")).unwrap();
        let mut all = Vec::new();
        let each = |answered: &Answered| {
            all.push(answered.clone());
            all.len() < 9
        };
        let found = answers(&following("?an owl\n!bel\n"), &path, options, || true, each)?;
        Ok((found, all))
    }

    /// The model writes what it always writes behind a sign, up to the end of the line.
    #[test]
    fn what_is_written_is_compared_with_the_references() {
        let rows = [
            r#"{"input": "what hoots?", "outputs": ["a dog", "Owl."], "id": "x"}"#,
            r#"{"input": "what rings!", "output": "the bel and the owl", "pid": 3}"#,
        ];
        let (found, all) = ask(&rows, &options()).unwrap();
        let texts: Vec<&str> = all.iter().map(|answered| answered.answer.as_str()).collect();
        assert_eq!(texts, ["an owl", "bel"]);
        assert_eq!((found.n, found.finished, all[1].line), (2, true, 2));
        // bel | bel and owl
        let f1 = 2.0 * 1.0 / 4.0;
        assert!((found.f1.mean - (1.0 + f1) / 2.0).abs() < 1e-12);
        assert_eq!(found.exact_match.mean, 0.5);
        assert!((found.f1.stderr.unwrap() - (1.0 - f1) / 2.0).abs() < 1e-12);
        let one = Options {
            limit: Some(1),
            ..options()
        };
        assert_eq!(ask(&rows, &one).unwrap().0.n, 1);
        let short = Options {
            max_tokens: 2,
            ..options()
        };
        assert_eq!(ask(&rows, &short).unwrap().1[0].answer, "an");
        let ended = Options {
            end: vec![u32::from(b'l')],
            ..options()
        };
        assert_eq!(ask(&rows, &ended).unwrap().1[0].answer, "an ow");
    }

    /// More inputs than are answered at once: each is answered as alone, in its place.
    #[test]
    fn many_inputs_are_answered_as_each_alone() {
        let rows: Vec<String> = (0..MOST_TOGETHER + 5)
            .map(|at| {
                let (sign, output) = if at % 3 == 0 {
                    ('!', "bel")
                } else {
                    ('?', "an owl")
                };
                format!(
                    r#"{{"input": "{}{sign}", "output": "{output}"}}"#,
                    "x".repeat(1 + at % 4)
                )
            })
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, rows.join("\n")).unwrap();
        let subject = following("?an owl\n!bel\n");
        let mut lines = Vec::new();
        let all = answers(
            &subject,
            &path,
            &options(),
            || true,
            |answered| {
                assert_eq!(answered.references, std::slice::from_ref(&answered.answer));
                lines.push(answered.line);
                true
            },
        );
        let all = all.unwrap();
        assert_eq!(
            (all.n, all.exact_match.mean, all.finished),
            (rows.len(), 1.0, true)
        );
        assert!(lines.into_iter().eq(1..=rows.len()));
        let limited = Options {
            limit: Some(MOST_TOGETHER + 2),
            ..options()
        };
        let found = answers(&subject, &path, &limited, || true, |_| true).unwrap();
        assert_eq!(found.n, MOST_TOGETHER + 2);
        // Stopped in the midst of the second lot: those of the first count.
        let mut answered = 0;
        let stopped = std::cell::Cell::new(false);
        let found = answers(
            &subject,
            &path,
            &options(),
            || !stopped.get(),
            |_| {
                answered += 1;
                stopped.set(answered == MOST_TOGETHER);
                true
            },
        );
        let found = found.unwrap();
        assert_eq!((found.n, found.finished), (MOST_TOGETHER, false));
    }

    #[test]
    fn what_is_no_input_is_told_in_one_line() {
        for (row, words) in [
            ("", "a.jsonl: found no input"),
            (
                r#"{"input": "", "outputs": ["x"]}"#,
                "line 1: found an empty input",
            ),
            (r#"{"input": "x", "outputs": []}"#, "line 1: found none or both"),
            (r#"{"input": "x"}"#, "line 1: found none or both"),
            (
                r#"{"input": "x", "outputs": ["x"], "output": "x"}"#,
                "line 1: found none or both",
            ),
            (
                r#"{"input": "x", "output": "x", "url": 1}"#,
                "unknown field `url`",
            ),
            (r#"{"input": 1, "output": "x"}"#, "expected a string"),
        ] {
            let line = format!("{:#}", ask(&[row], &options()).unwrap_err());
            assert!(line.contains(words) && !line.contains('\n'), "{line}");
        }
    }
}
