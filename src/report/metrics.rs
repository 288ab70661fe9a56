//! `metrics.jsonl` as curves, read line by line: however long the run was, memory stays small.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::{Map, Value};

use super::ReportError;
use super::curve::Curve;

/// Longer lines are none of ours.
const LONGEST_LINE: u64 = 1 << 20;
/// Curves that are kept; the names beyond them are counted.
const MOST_CURVES: usize = 96;
/// Places that are kept where steps were skipped, or where the run was resumed.
const MOST_MARKS: usize = 500;
const STEP: &str = "step";
const ELAPSED: &str = "elapsed_s";
const SKIPPED: &str = "skipped";

/// What a run noted down.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// Curves by name, in the order in which the names appeared.
    pub curves: Vec<(String, Curve)>,
    /// The highest step.
    pub step: u64,
    /// Seconds of training at the last line.
    pub elapsed_s: Option<f64>,
    /// Steps that were skipped, all in all.
    pub skipped: u64,
    /// Steps of the lines before which some were skipped.
    pub skips: Vec<u64>,
    /// Steps from which the run was taken up again.
    pub resumed: Vec<u64>,
    /// Lines in the middle of the file that are none of a run.
    pub unreadable: u64,
    /// Whether the last line breaks off: the program was killed, or is writing it just now.
    pub cut_off: bool,
    /// Values whose names came after all places for curves were taken.
    pub crowded: u64,
}

impl Metrics {
    /// Reads the file.
    ///
    /// # Errors
    /// The file cannot be read, or no line of it is one of a run.
    pub fn read(path: &Path) -> Result<Self, ReportError> {
        let io = |source| ReportError::Io {
            path: path.to_owned(),
            source,
        };
        let mut lines = BufReader::with_capacity(1 << 18, File::open(path).map_err(io)?);
        let mut metrics = Self::default();
        let (mut line, mut taken) = (Vec::new(), 0u64);
        while let Some(whole) = next_line(&mut lines, &mut line).map_err(io)? {
            match serde_json::from_slice::<Map<String, Value>>(&line) {
                Ok(object) if metrics.take(&object) => taken += 1,
                _ if !whole => metrics.cut_off = true,
                _ if line.iter().all(u8::is_ascii_whitespace) => {}
                _ => metrics.unreadable += 1,
            }
        }
        if taken == 0 {
            let reason = match metrics.unreadable {
                0 => "nothing is logged yet".to_owned(),
                lines => format!("none of its {lines} lines is one of a run"),
            };
            return Err(ReportError::NoRun {
                path: path.to_owned(),
                reason,
            });
        }
        Ok(metrics)
    }

    /// The curve of this name, where there is one with points.
    #[must_use]
    pub fn curve(&self, name: &str) -> Option<&Curve> {
        let found = self.curves.iter().find(|(known, _)| known == name);
        found.map(|(_, curve)| curve).filter(|curve| !curve.is_empty())
    }

    /// Notes that the run was taken up again after `step` steps.
    pub fn resume(&mut self, step: u64) {
        if let Err(place) = self.resumed.binary_search(&step)
            && self.resumed.len() < MOST_MARKS
        {
            self.resumed.insert(place, step);
        }
    }

    /// Takes in one line; false where it has no step.
    fn take(&mut self, line: &Map<String, Value>) -> bool {
        let Some(step) = line.get(STEP).and_then(Value::as_u64) else {
            return false;
        };
        if step < self.step {
            // A log in which steps begin again: what was noted about them before is void.
            self.curves.iter_mut().for_each(|(_, curve)| curve.rewind(step));
            self.skips.retain(|&at| at < step);
            self.resume(step.saturating_sub(1));
        }
        self.step = step;
        for (name, value) in line {
            match name.as_str() {
                STEP => {}
                ELAPSED => self.elapsed_s = value.as_f64().or(self.elapsed_s),
                SKIPPED => self.note_skipped(step, value.as_f64().unwrap_or(0.0)),
                _ => self.put(name, step, value),
            }
        }
        true
    }

    fn note_skipped(&mut self, step: u64, count: f64) {
        let count = count as u64;
        if count > self.skipped && self.skips.len() < MOST_MARKS {
            self.skips.push(step);
        }
        self.skipped = count;
    }

    fn put(&mut self, name: &str, step: u64, value: &Value) {
        let number = match value {
            // The log writes what is infinite or undefined as null.
            Value::Null => f64::NAN,
            Value::Number(number) => number.as_f64().unwrap_or(f64::NAN),
            _ => return,
        };
        let place = self.curves.iter().position(|(known, _)| known == name);
        let place = place.unwrap_or(self.curves.len());
        if place == MOST_CURVES {
            self.crowded += 1;
            return;
        }
        if place == self.curves.len() {
            self.curves.push((name.to_owned(), Curve::default()));
        }
        self.curves[place].1.push(step, number);
    }
}

/// The next line without its end, of which at most [`LONGEST_LINE`] bytes are kept; false where the end is missing.
fn next_line(lines: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<Option<bool>> {
    line.clear();
    if lines.by_ref().take(LONGEST_LINE).read_until(b'\n', line)? == 0 {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
        return Ok(Some(true));
    }
    if (line.len() as u64) < LONGEST_LINE {
        return Ok(Some(false));
    }
    // The rest of a line that is too long is passed over in pieces.
    line.clear();
    line.extend(b"too long");
    loop {
        let rest = lines.fill_buf()?;
        if rest.is_empty() {
            return Ok(Some(false));
        }
        let end = rest.iter().position(|&byte| byte == b'\n');
        let passed = end.map_or(rest.len(), |end| end + 1);
        lines.consume(passed);
        if end.is_some() {
            return Ok(Some(true));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8]) -> Result<Metrics, ReportError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, text).unwrap();
        Metrics::read(&path)
    }

    #[test]
    fn lines_become_curves_in_the_order_of_their_names() {
        let text = br#"{"step": 10, "elapsed_s": 1.5, "loss": 2.0, "part": 1.5, "lr": 0.001}
{"step": 20, "elapsed_s": 3.0, "loss": null, "part": 1.0, "note": "a word", "skipped": 2}
{"step": 20, "elapsed_s": 3.0, "validation/error": 0.5}
{"step": 30, "elapsed_s": 4.5, "loss": 1.0, "part": 0.5, "skipped": 2}
"#;
        let metrics = read(text).unwrap();
        let names: Vec<&str> = metrics.curves.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["loss", "part", "lr", "validation/error"]);
        assert_eq!((metrics.step, metrics.elapsed_s), (30, Some(4.5)));
        let loss = metrics.curve("loss").unwrap();
        assert_eq!(loss.points(), [(10.0, 2.0), (30.0, 1.0)]);
        assert_eq!(loss.undefined, 1);
        assert_eq!((metrics.skipped, metrics.skips.as_slice()), (2, &[20][..]));
        assert!(metrics.resumed.is_empty() && !metrics.cut_off && metrics.unreadable == 0);
    }

    #[test]
    fn what_is_damaged_is_passed_over_and_counted() {
        let mut text =
            b"{\"step\": 1, \"loss\": 3.0}\nnonsense\n[1, 2]\n{\"loss\": 1.0}\n\n\xff\xfe\n".to_vec();
        text.extend(vec![b'x'; 3 << 20]);
        text.extend(b"\n{\"step\": 2, \"loss\": 2.0}\n{\"step\": 3, \"lo");
        let metrics = read(&text).unwrap();
        assert_eq!(metrics.curve("loss").unwrap().points(), [(1.0, 3.0), (2.0, 2.0)]);
        assert_eq!((metrics.unreadable, metrics.cut_off), (5, true));
        // A last line that only lacks its end is a line.
        let metrics = read(b"{\"step\": 1, \"loss\": 3.0}").unwrap();
        assert!(!metrics.cut_off && metrics.step == 1);
        // So is a file that ends inside a line that is too long.
        let mut text = b"{\"step\": 1, \"loss\": 3.0}\n".to_vec();
        text.extend(vec![b'x'; 2 << 20]);
        assert!(read(&text).unwrap().cut_off);
    }

    #[test]
    fn a_file_without_a_line_of_a_run_is_refused() {
        for (text, words) in [
            (&b""[..], "nothing is logged yet"),
            (b"{\"step\": 1", "nothing is logged yet"),
            (b"a\nb\n", "none of its 2 lines"),
        ] {
            let message = read(text).unwrap_err().to_string();
            assert!(
                message.contains(words) && message.contains("metrics.jsonl"),
                "{message}"
            );
        }
    }

    #[test]
    fn steps_that_begin_again_replace_the_earlier_ones() {
        let mut text = String::new();
        for (step, loss) in [(1, 9.0), (2, 8.0), (3, 7.0), (4, 1.0), (3, 6.0), (4, 5.0)] {
            text += &format!("{{\"step\": {step}, \"loss\": {loss}}}\n");
        }
        let metrics = read(text.as_bytes()).unwrap();
        let expected = [(1.0, 9.0), (2.0, 8.0), (3.0, 6.0), (4.0, 5.0)];
        assert_eq!(metrics.curve("loss").unwrap().points(), expected);
        assert_eq!(metrics.resumed, [2]);
    }

    #[test]
    fn names_without_end_are_bounded() {
        let mut text = String::new();
        for step in 1..=200 {
            text += &format!("{{\"step\": {step}, \"name{step}\": 1.0}}\n");
        }
        let metrics = read(text.as_bytes()).unwrap();
        assert_eq!(
            (metrics.curves.len(), metrics.crowded),
            (MOST_CURVES, 200 - MOST_CURVES as u64)
        );
    }
}
