//! Progress with the time that is left: a bar on a terminal, a line now and then elsewhere, nothing with `-q`.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Pause between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// Before so much is done, as one part of so many, and time has passed, the time that is left is not guessed.
const LEAST_SHARE: u64 = 1000;
const LEAST_TIME: Duration = Duration::from_secs(1);
/// Redraws of the bar in a second.
const BAR_HZ: u8 = 10;

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// A bar that redraws itself.
    Bar,
    /// Lines at intervals, for logs and pipes.
    Lines,
    /// Nothing.
    Silent,
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// Things, named in the plural.
    Items(&'static str),
    /// Bytes, shown in MB.
    #[cfg_attr(
        not(feature = "media"),
        allow(dead_code, reason = "for commands that need media")
    )]
    Bytes,
}

/// Progress of one piece of work; the end of its life is the end of the work.
pub(super) struct Progress {
    label: String,
    unit: Unit,
    began: Instant,
    shown: Shown,
    done: u64,
    total: Option<u64>,
}

enum Shown {
    Bar(ProgressBar),
    Lines { last: Option<(Instant, u64)> },
    Nothing,
}

impl Progress {
    /// Begins; nothing is shown before the first [`Progress::set`].
    pub(super) fn new(style: Style, label: &str, unit: Unit) -> Self {
        let shown = match style {
            Style::Silent => Shown::Nothing,
            Style::Lines => Shown::Lines { last: None },
            Style::Bar => {
                let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(BAR_HZ));
                bar.set_message(label.to_owned());
                Shown::Bar(bar)
            }
        };
        Self {
            label: label.to_owned(),
            unit,
            began: Instant::now(),
            shown,
            done: 0,
            total: None,
        }
    }

    /// Changes the words before the numbers, for work that has more to tell than how much is done.
    pub(super) fn relabel(&mut self, label: String) {
        if let Shown::Bar(bar) = &self.shown {
            bar.set_message(label.clone());
        }
        self.label = label;
    }

    /// Says how much is done, and of how much where that is known.
    pub(super) fn set(&mut self, done: u64, total: Option<u64>) {
        let new_total = total != self.total;
        (self.done, self.total) = (done, total);
        match &mut self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => {
                if new_total || bar.position() == 0 {
                    bar.set_style(bar_style(self.unit, total.is_some()));
                    match total {
                        Some(total) => bar.set_length(total),
                        None => bar.unset_length(),
                    }
                }
                bar.set_position(done);
            }
            Shown::Lines { last } => {
                if last.is_none_or(|(when, _)| when.elapsed() >= LINE_EVERY) {
                    *last = Some((Instant::now(), done));
                    say(&line(&self.label, self.unit, done, total, self.began.elapsed()));
                }
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        match &self.shown {
            Shown::Bar(bar) => bar.finish_and_clear(),
            // The last line tells how far the work came, unless the line before it already did.
            Shown::Lines {
                last: Some((_, said)),
            } if *said != self.done => {
                say(&line(
                    &self.label,
                    self.unit,
                    self.done,
                    self.total,
                    self.began.elapsed(),
                ));
            }
            Shown::Lines { .. } | Shown::Nothing => {}
        }
    }
}

fn say(line: &str) {
    // Work goes on where nobody listens.
    writeln!(io::stderr(), "{line}").ok();
}

fn bar_style(unit: Unit, bounded: bool) -> ProgressStyle {
    let template = match (unit, bounded) {
        (Unit::Items(_), true) => "{msg} [{bar:32}] {pos}/{len}, {eta} left",
        (Unit::Items(_), false) => "{msg} {spinner} {pos}, {elapsed}",
        (Unit::Bytes, true) => "{msg} [{bar:32}] {decimal_bytes}/{decimal_total_bytes}, {eta} left",
        (Unit::Bytes, false) => "{msg} {spinner} {decimal_bytes}, {elapsed}",
    };
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

/// One plain line: what, how much of how much, and the time that is left or was taken.
fn line(label: &str, unit: Unit, done: u64, total: Option<u64>, elapsed: Duration) -> String {
    let (done_text, total_text, name) = match unit {
        Unit::Items(name) => (done.to_string(), total.map(|total| total.to_string()), name),
        Unit::Bytes => (megabytes(done), total.map(megabytes), "MB"),
    };
    let seconds = elapsed.as_secs_f64();
    match (total, total_text) {
        (Some(total), Some(total_text)) if total > 0 => {
            let time = if done >= total {
                format!("{} taken", clock(seconds))
            } else if tells_the_rest(done, total, elapsed) {
                format!("{} left", clock(seconds * (total - done) as f64 / done as f64))
            } else {
                format!("{} so far", clock(seconds))
            };
            format!(
                "{label}: {done_text}/{total_text} {name} ({} %), {time}",
                done.saturating_mul(100) / total
            )
        }
        _ => format!("{label}: {done_text} {name}, {} so far", clock(seconds)),
    }
}

/// Whether what is done foretells the rest: the first moments of a work say nothing about its speed.
fn tells_the_rest(done: u64, total: u64, elapsed: Duration) -> bool {
    done.saturating_mul(LEAST_SHARE) >= total && elapsed >= LEAST_TIME
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

/// Seconds as `8 s`, `2 min 05 s` or `3 h 20 min`.
fn clock(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_much_and_how_long() {
        let clips = Unit::Items("clips");
        let ten = Duration::from_secs(10);
        assert_eq!(
            line("score", clips, 2, Some(8), ten),
            "score: 2/8 clips (25 %), 30 s left"
        );
        assert_eq!(
            line("score", clips, 8, Some(8), ten),
            "score: 8/8 clips (100 %), 10 s taken"
        );
        assert_eq!(
            line("score", clips, 0, Some(8), ten),
            "score: 0/8 clips (0 %), 10 s so far"
        );
        let moment = Duration::from_millis(90);
        assert_eq!(
            line("score", clips, 2, Some(8), moment),
            "score: 2/8 clips (25 %), 0 s so far"
        );
        assert_eq!(
            line("get", Unit::Bytes, 900, Some(58_000_000), ten),
            "get: 0.0/58.0 MB (0 %), 10 s so far"
        );
        assert_eq!(line("score", clips, 3, None, ten), "score: 3 clips, 10 s so far");
        assert_eq!(
            line("get", Unit::Bytes, 1_500_000, Some(3_000_000), ten),
            "get: 1.5/3.0 MB (50 %), 10 s left"
        );
        assert_eq!(line("none", clips, 0, Some(0), ten), "none: 0 clips, 10 s so far");
    }

    #[test]
    fn times_read_well() {
        assert_eq!(clock(7.6), "8 s");
        assert_eq!(clock(125.0), "2 min 05 s");
        assert_eq!(clock(12_000.0), "3 h 20 min");
    }

    #[test]
    fn every_bar_template_is_valid() {
        for unit in [Unit::Items("x"), Unit::Bytes] {
            for bounded in [true, false] {
                let mut progress = Progress::new(Style::Bar, "label", unit);
                progress.set(1, bounded.then_some(2));
                bar_style(unit, bounded);
            }
        }
    }
}
