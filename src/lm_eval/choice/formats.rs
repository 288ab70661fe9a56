//! Layouts of data sets with choices, and the prompts that the standard harness makes of them.
//!
//! | format | prompt | choices | counts by |
//! |---|---|---|---|
//! | boolq | `PASSAGE\nQuestion: QUESTION?\nAnswer:` | no, yes | acc |
//! | piqa | `Question: GOAL\nAnswer:` | two solutions | acc |
//! | siqa | `Q: CONTEXT QUESTION\nA:` | three answers | acc |
//! | hellaswag | `ACTIVITY: CTX_A Ctx_b`, cleaned | four endings, cleaned | acc_norm |
//! | winogrande | the sentence up to the blank, and an option | what follows the blank | acc |
//! | arc-easy, arc-challenge | `Question: QUESTION\nAnswer:` | those of the question | acc, acc_norm |
//! | openbookqa | `STEM` | those of the question | acc_norm |
//!
//! A space stands between prompt and choice. Columns have the names that they have on the Hugging Face Hub.

use std::path::Path;

use fulgur_datasets::text::{Rows, TextError};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// Most choices of a question.
const MOST: usize = 64;

/// A layout of questions with choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// BoolQ: `passage`, `question`, `answer` or `label`.
    Boolq,
    /// PIQA: `goal`, `sol1`, `sol2`, `label`.
    Piqa,
    /// SIQA: `context`, `question`, `answerA` to `answerC`, `label` from 1.
    Siqa,
    /// HellaSwag: `activity_label`, `ctx_a`, `ctx_b`, `endings`, `label`.
    Hellaswag,
    /// WinoGrande: `sentence` with a blank `_`, `option1`, `option2`, `answer`.
    Winogrande,
    /// ARC, the easy questions: `question`, `choices` of `text` and `label`, `answerKey`.
    #[value(alias = "arc")]
    ArcEasy,
    /// ARC, the others.
    ArcChallenge,
    /// OpenBookQA: `question_stem`, `choices`, `answerKey`.
    Openbookqa,
}

impl Format {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Boolq => "boolq",
            Self::Piqa => "piqa",
            Self::Siqa => "siqa",
            Self::Hellaswag => "hellaswag",
            Self::Winogrande => "winogrande",
            Self::ArcEasy => "arc-easy",
            Self::ArcChallenge => "arc-challenge",
            Self::Openbookqa => "openbookqa",
        }
    }

    /// Whether accuracy by likelihood a byte is what papers report.
    pub fn normalised(self) -> bool {
        matches!(self, Self::Hellaswag | Self::ArcChallenge | Self::Openbookqa)
    }

    /// The questions in a file.
    ///
    /// # Errors
    /// It cannot be read. A row that is none of this layout is told when it comes.
    pub fn questions(self, path: &Path) -> Result<Questions, TextError> {
        Ok(match self {
            Self::Boolq => questions::<Boolq>(path)?,
            Self::Piqa => questions::<Piqa>(path)?,
            Self::Siqa => questions::<Siqa>(path)?,
            Self::Hellaswag => questions::<Hellaswag>(path)?,
            Self::Winogrande => questions::<Winogrande>(path)?,
            Self::ArcEasy | Self::ArcChallenge => questions::<Arc>(path)?,
            Self::Openbookqa => questions::<Openbookqa>(path)?,
        })
    }
}

/// Questions with the numbers of their lines.
pub type Questions = Box<dyn Iterator<Item = Result<(usize, Question), TextError>>>;

/// A question as continuations to choose from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// What each choice stands behind, and the choice without the space in front of it.
    pub choices: Vec<(String, String)>,
    /// Which of them is right.
    pub right: usize,
}

impl Question {
    /// Choices behind the same context.
    fn of(context: &str, choices: Vec<String>, right: usize) -> Self {
        let choices = choices.into_iter().map(|choice| (context.to_owned(), choice));
        Self {
            choices: choices.collect(),
            right,
        }
    }
}

/// What is in a row, and what should be.
type Wrong = (String, String);

/// Rows of a data set.
trait Layout: DeserializeOwned + 'static {
    /// The columns, for errors.
    const COLUMNS: &'static str;

    fn question(self) -> Result<Question, Wrong>;
}

fn questions<T: Layout>(path: &Path) -> Result<Questions, TextError> {
    let mut rows = Rows::<T>::open(path, T::COLUMNS)?;
    Ok(Box::new(std::iter::from_fn(move || {
        let row = rows.next()?;
        Some(row.and_then(|(line, row)| {
            let question = row.question().and_then(check);
            let question = question.map_err(|(found, expected)| rows.wrong(found, &expected))?;
            Ok((line, question))
        }))
    })))
}

/// Refuses contexts and choices without text.
fn check(question: Question) -> Result<Question, Wrong> {
    for (number, (context, choice)) in question.choices.iter().enumerate() {
        if context.trim().is_empty() {
            return Err(("an empty prompt".into(), "text".into()));
        }
        if choice.trim().is_empty() {
            return Err((format!("choice {number} empty"), "text".into()));
        }
    }
    if !(2..=MOST).contains(&question.choices.len()) {
        let found = format!("{} choices", question.choices.len());
        return Err((found, format!("2 to {MOST}")));
    }
    Ok(question)
}

/// The number of the right choice, as a number or in a string.
#[derive(Deserialize)]
#[serde(untagged)]
enum Label {
    Number(i64),
    Text(String),
}

impl Label {
    /// The place of the right one of `count` choices, whose numbers begin with `first`.
    fn place(&self, name: &str, first: i64, count: usize) -> Result<usize, Wrong> {
        let (number, text) = match self {
            Self::Number(number) => (Some(*number), number.to_string()),
            Self::Text(text) => (text.trim().parse().ok(), format!("{text:?}")),
        };
        number
            .and_then(|number: i64| usize::try_from(number.checked_sub(first)?).ok())
            .filter(|&place| place < count)
            .ok_or_else(|| {
                let last = first + count as i64 - 1;
                (format!("{name} {text}"), format!("{first} to {last}"))
            })
    }
}

/// Choices beside their labels.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Choices {
    text: Vec<String>,
    label: Vec<String>,
}

impl Choices {
    /// The place of the choice with the label `key`.
    fn place(&self, key: &str) -> Result<usize, Wrong> {
        if self.text.len() != self.label.len() {
            let found = format!("{} texts and {} labels", self.text.len(), self.label.len());
            return Err((found, "as many".into()));
        }
        let key = key.trim();
        let found = self.label.iter().position(|label| label == key);
        found.ok_or_else(|| (format!("answerKey {key:?}"), format!("one of {:?}", self.label)))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Boolq {
    passage: String,
    question: String,
    answer: Option<bool>,
    label: Option<Label>,
    #[serde(rename = "title")]
    _title: Option<String>,
    #[serde(rename = "idx")]
    _idx: Option<i64>,
}

impl Layout for Boolq {
    const COLUMNS: &'static str = "BoolQ's columns passage, question, answer";

    fn question(self) -> Result<Question, Wrong> {
        let right = match (self.answer, &self.label) {
            (Some(answer), _) => usize::from(answer),
            (None, Some(label)) => label.place("label", 0, 2)?,
            (None, None) => return Err(("no answer".into(), "answer, true or false".into())),
        };
        let context = format!("{}\nQuestion: {}?\nAnswer:", self.passage, self.question);
        Ok(Question::of(&context, vec!["no".into(), "yes".into()], right))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Piqa {
    goal: String,
    sol1: String,
    sol2: String,
    label: Label,
    #[serde(rename = "id")]
    _id: Option<String>,
}

impl Layout for Piqa {
    const COLUMNS: &'static str = "PIQA's columns goal, sol1, sol2, label";

    fn question(self) -> Result<Question, Wrong> {
        let right = self.label.place("label", 0, 2)?;
        let context = format!("Question: {}\nAnswer:", self.goal);
        Ok(Question::of(&context, vec![self.sol1, self.sol2], right))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Siqa {
    context: String,
    question: String,
    #[serde(rename = "answerA")]
    a: String,
    #[serde(rename = "answerB")]
    b: String,
    #[serde(rename = "answerC")]
    c: String,
    label: Label,
}

impl Layout for Siqa {
    const COLUMNS: &'static str = "SIQA's columns context, question, answerA, answerB, answerC, label";

    fn question(self) -> Result<Question, Wrong> {
        let right = self.label.place("label", 1, 3)?;
        let context = format!("Q: {} {}\nA:", self.context, self.question);
        Ok(Question::of(&context, vec![self.a, self.b, self.c], right))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Hellaswag {
    activity_label: String,
    ctx_a: String,
    ctx_b: String,
    endings: Vec<String>,
    label: Label,
    #[serde(rename = "ctx")]
    _ctx: Option<String>,
    #[serde(rename = "ind")]
    _ind: Option<i64>,
    #[serde(rename = "source_id")]
    _source_id: Option<String>,
    #[serde(rename = "split")]
    _split: Option<String>,
    #[serde(rename = "split_type")]
    _split_type: Option<String>,
}

impl Layout for Hellaswag {
    const COLUMNS: &'static str = "HellaSwag's columns activity_label, ctx_a, ctx_b, endings, label";

    fn question(self) -> Result<Question, Wrong> {
        let right = self.label.place("label", 0, self.endings.len())?;
        let context = format!(
            "{}: {} {}",
            self.activity_label,
            self.ctx_a,
            capitalised(&self.ctx_b)
        );
        let endings = self.endings.iter().map(|ending| cleaned(ending));
        Ok(Question::of(&cleaned(&context), endings.collect(), right))
    }
}

/// The first letter large, all others small.
fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    let Some(first) = letters.next() else {
        return String::new();
    };
    first.to_uppercase().collect::<String>() + &letters.as_str().to_lowercase()
}

/// WikiHow's marks out of a text of HellaSwag: ` [title]` ends a sentence, other brackets go with what is in them.
fn cleaned(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let mut kept = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(open) = rest.find('[') {
        // Brackets close on the same line, or stay.
        let close = rest[open..].find([']', '\n']).map(|at| open + at);
        match close.filter(|&close| rest.as_bytes()[close] == b']') {
            Some(close) => {
                kept.push_str(&rest[..open]);
                rest = &rest[close + 1..];
            }
            None => {
                kept.push_str(&rest[..=open]);
                rest = &rest[open + 1..];
            }
        }
    }
    kept.push_str(rest);
    kept.replace("  ", " ")
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Winogrande {
    sentence: String,
    option1: String,
    option2: String,
    answer: Label,
    #[serde(rename = "qID")]
    _id: Option<String>,
}

impl Layout for Winogrande {
    const COLUMNS: &'static str = "WinoGrande's columns sentence, option1, option2, answer";

    fn question(self) -> Result<Question, Wrong> {
        let Some((before, behind)) = self.sentence.split_once('_') else {
            return Err((
                format!("sentence {:?}", self.sentence),
                "a blank, _, in it".into(),
            ));
        };
        let right = self.answer.place("answer", 1, 2)?;
        let behind = behind.trim();
        let choices =
            [self.option1, self.option2].map(|option| (format!("{before}{option}"), behind.to_owned()));
        Ok(Question {
            choices: choices.into(),
            right,
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Arc {
    question: String,
    choices: Choices,
    #[serde(rename = "answerKey")]
    key: String,
    #[serde(rename = "id")]
    _id: Option<String>,
}

impl Layout for Arc {
    const COLUMNS: &'static str = "ARC's columns question, choices with text and label, answerKey";

    fn question(self) -> Result<Question, Wrong> {
        let right = self.choices.place(&self.key)?;
        let context = format!("Question: {}\nAnswer:", self.question);
        Ok(Question::of(&context, self.choices.text, right))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Openbookqa {
    question_stem: String,
    choices: Choices,
    #[serde(rename = "answerKey")]
    key: String,
    #[serde(rename = "id")]
    _id: Option<String>,
    #[serde(rename = "fact1")]
    _fact: Option<String>,
    #[serde(rename = "humanScore")]
    _score: Option<f64>,
    #[serde(rename = "clarity")]
    _clarity: Option<f64>,
    #[serde(rename = "turkIdAnonymized")]
    _turk: Option<String>,
}

impl Layout for Openbookqa {
    const COLUMNS: &'static str =
        "OpenBookQA's columns question_stem, choices with text and label, answerKey";

    fn question(self) -> Result<Question, Wrong> {
        let right = self.choices.place(&self.key)?;
        Ok(Question::of(&self.question_stem, self.choices.text, right))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(format: Format, row: &str) -> Result<Question, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.jsonl");
        std::fs::write(&path, format!("\n{row}\n")).unwrap();
        let mut all = format.questions(&path).map_err(|error| error.to_string())?;
        let (line, question) = all.next().unwrap().map_err(|error| error.to_string())?;
        assert_eq!((line, all.next().is_none()), (2, true));
        Ok(question)
    }

    fn same(context: &str, choices: &[&str], right: usize) -> Question {
        let choices = choices.iter().map(|&choice| choice.to_owned()).collect();
        Question::of(context, choices, right)
    }

    /// One row of each layout as the Hub has it, and the prompt that the standard harness makes of it.
    #[test]
    fn prompts_are_those_of_the_standard_harness() {
        let cases = [
            (
                Format::Boolq,
                r#"{"question": "do owls hoot", "answer": true, "passage": "Owls hoot.", "title": "Owl"}"#,
                same("Owls hoot.\nQuestion: do owls hoot?\nAnswer:", &["no", "yes"], 1),
            ),
            (
                Format::Boolq,
                r#"{"question": "do owls bark", "passage": "Owls hoot.", "idx": 3, "label": 0}"#,
                same("Owls hoot.\nQuestion: do owls bark?\nAnswer:", &["no", "yes"], 0),
            ),
            (
                Format::Piqa,
                r#"{"goal": "Ring a bell", "sol1": "strike it", "sol2": "eat it", "label": 0}"#,
                same("Question: Ring a bell\nAnswer:", &["strike it", "eat it"], 0),
            ),
            (
                Format::Siqa,
                r#"{"context": "Ann rang.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"}"#,
                same("Q: Ann rang. Why?\nA:", &["x", "y", "z"], 2),
            ),
            (
                Format::Hellaswag,
                r#"{"ind": 4, "activity_label": "Ringing", "ctx_a": "A man [header] How [title] Hold it.", "ctx_b": "he RINGS", "ctx": "..",
                "endings": ["a bell. [substeps] twice.", "b", "c", "d"], "source_id": "s", "split": "val", "split_type": "x", "label": "1"}"#,
                same(
                    "Ringing: A man How. Hold it. He rings",
                    &["a bell. twice.", "b", "c", "d"],
                    1,
                ),
            ),
            (
                Format::ArcEasy,
                r#"{"id": "A", "question": "What rings?", "choices": {"text": ["owl", "bell", "rain"], "label": ["A", "B", "C"]}, "answerKey": "B"}"#,
                same("Question: What rings?\nAnswer:", &["owl", "bell", "rain"], 1),
            ),
            (
                Format::ArcChallenge,
                r#"{"id": "A", "question": "What rings?", "choices": {"text": ["owl", "bell"], "label": ["1", "2"]}, "answerKey": "1"}"#,
                same("Question: What rings?\nAnswer:", &["owl", "bell"], 0),
            ),
            (
                Format::Openbookqa,
                r#"{"id": "7", "question_stem": "A bell", "choices": {"text": ["barks", "rings"], "label": ["A", "B"]}, "answerKey": " B"}"#,
                same("A bell", &["barks", "rings"], 1),
            ),
            (
                Format::Winogrande,
                r#"{"sentence": "The bell beat the owl as _ was loud.", "option1": "the bell", "option2": "the owl", "answer": "1"}"#,
                Question {
                    choices: vec![
                        ("The bell beat the owl as the bell".into(), "was loud.".into()),
                        ("The bell beat the owl as the owl".into(), "was loud.".into()),
                    ],
                    right: 0,
                },
            ),
        ];
        for (format, row, wanted) in cases {
            // One row a line.
            let row = row.replace('\n', " ");
            assert_eq!(read(format, &row).unwrap(), wanted, "{format:?}");
        }
    }

    #[test]
    fn marks_of_wikihow_go() {
        for (text, wanted) in [
            (
                " How to ring [title] Hold it. [step] Ring.",
                "How to ring. Hold it. Ring.",
            ),
            ("a [b [c] d] e", "a d] e"),
            ("no [end", "no [end"),
            ("no [end\n] here", "no [end\n] here"),
            ("[x][y] z", "z"),
            ("\u{e9} [\u{e9}] \u{e9}", "\u{e9} \u{e9}"),
        ] {
            assert_eq!(cleaned(text).trim_start(), wanted);
        }
        assert_eq!(capitalised("\u{e9}COLE Du"), "\u{c9}cole du");
        assert_eq!(capitalised(""), "");
    }

    #[test]
    fn rows_that_are_none_are_told_in_one_line() {
        for (format, row, words) in [
            (
                Format::Piqa,
                r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 2}"#,
                "found label 2, expected 0 to 1",
            ),
            (
                Format::Piqa,
                r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": -1}"#,
                "found label -1, expected 0 to 1",
            ),
            (
                Format::Piqa,
                r#"{"goal": "g", "sol1": "a", "sol2": "b"}"#,
                "missing field `label`",
            ),
            (
                Format::Piqa,
                r#"{"goal": "g", "sol1": "a", "sol2": "", "label": 1}"#,
                "found choice 1 empty",
            ),
            (
                Format::Piqa,
                r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 0, "url": 1}"#,
                "unknown field `url`",
            ),
            (
                Format::Siqa,
                r#"{"context": "c", "question": "q", "answerA": "x", "answerB": "y", "answerC": "z", "label": ""}"#,
                "found label \"\", expected 1 to 3",
            ),
            (
                Format::Boolq,
                r#"{"passage": "p", "question": "q"}"#,
                "found no answer, expected answer, true or false",
            ),
            (
                Format::Boolq,
                r#"{"passage": "p", "question": 3, "answer": true}"#,
                "expected a string",
            ),
            (
                Format::Hellaswag,
                r#"{"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": [], "label": 0}"#,
                "found label 0",
            ),
            (
                Format::Hellaswag,
                r#"{"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["x"], "label": 0}"#,
                "found 1 choices, expected 2 to 64",
            ),
            (
                Format::Winogrande,
                r#"{"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}"#,
                "expected a blank, _, in it",
            ),
            (
                Format::Winogrande,
                r#"{"sentence": "ends in _", "option1": "a", "option2": "b", "answer": "1"}"#,
                "found choice 0 empty",
            ),
            (
                Format::Winogrande,
                r#"{"sentence": "a _ b", "option1": "a", "option2": "b", "answer": ""}"#,
                "found answer \"\", expected 1 to 2",
            ),
            (
                Format::ArcEasy,
                r#"{"question": "q", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}"#,
                "found 2 texts and 1 labels",
            ),
            (
                Format::ArcEasy,
                r#"{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "E"}"#,
                "found answerKey \"E\"",
            ),
            (
                Format::Openbookqa,
                r#"{"question_stem": " ", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}"#,
                "found an empty prompt, expected text",
            ),
            (Format::Openbookqa, "words", "expected value"),
        ] {
            let line = read(format, row).unwrap_err();
            assert!(
                line.contains("q.jsonl: line 2: ") && line.contains(words),
                "{line}"
            );
            assert_eq!(line.lines().count(), 1, "{line}");
        }
    }
}
