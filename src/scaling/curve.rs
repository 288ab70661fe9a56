//! The curve of a run: what was noted down along it, and the file that keeps it.

use std::io::Write;
use std::path::Path;

use anyhow::{Context as _, bail};
use fulgur_datasets::atomic::write_atomic;
use fulgur_lightnet::params::file::read_bounded;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::sweep::{Row, kept};

/// What of a log or a curve is read at most.
const LARGEST: u64 = 1 << 28;
/// The part of a run, before a point, over which its training loss is averaged.
const SMOOTHED: f64 = 0.1;
/// Most curves of a folder.
const MOST_CURVES: usize = 10_000;

/// A validation along a run.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// Steps done.
    pub step: u64,
    /// Tokens seen, all epochs together.
    pub tokens: u64,
    /// Floating-point operations of training so far, by section 4.1.
    pub flops: f64,
    /// Held-out loss, nats a token.
    pub loss: f64,
    /// Mean training loss of the last tenth of the steps so far.
    pub train_loss: Option<f64>,
    /// Tokens a second.
    pub tokens_per_s: Option<f64>,
}

/// A finished run.
#[derive(Clone, Debug)]
pub struct Curve {
    /// What came out of it.
    pub row: Row,
    /// Its validations in order.
    pub points: Vec<Point>,
}

/// What the log of a run says.
#[derive(Debug, Default)]
pub(super) struct Logged {
    pub(super) points: Vec<Point>,
    /// Seconds of training.
    pub(super) seconds: f64,
    /// Median of what was logged.
    pub(super) tokens_per_s: Option<f64>,
}

/// Reads `metrics.jsonl` of a run of `tokens` tokens a step that take `flops` operations each.
pub(super) fn logged(path: &Path, tokens: u64, flops: f64) -> anyhow::Result<Logged> {
    let bytes = read_bounded(path, LARGEST)?;
    let text = String::from_utf8_lossy(&bytes);
    let mut found = Logged::default();
    let mut losses: Vec<(u64, f64)> = Vec::new();
    let mut rates: Vec<f64> = Vec::new();
    for line in text.lines() {
        // A line that a crash cut off belongs to nothing that was kept.
        let Ok(line) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        let number = |name: &str| line.get(name).and_then(Value::as_f64).filter(|x| x.is_finite());
        let Some(step) = line.get("step").and_then(Value::as_u64) else {
            continue;
        };
        found.seconds = number("elapsed_s").unwrap_or(found.seconds);
        losses.extend(number("loss").map(|loss| (step, loss)));
        rates.extend(number("tokens_per_s"));
        if let Some(loss) = number("validation/loss") {
            found.points.retain(|point| point.step < step);
            found.points.push(Point {
                step,
                tokens: step * tokens,
                flops: (step * tokens) as f64 * flops,
                loss,
                train_loss: smoothed(&losses, step),
                tokens_per_s: rates.last().copied(),
            });
        }
    }
    rates.sort_by(f64::total_cmp);
    found.tokens_per_s = rates.get(rates.len() / 2).copied();
    Ok(found)
}

/// The mean of what was logged in the last part of the steps up to `step`.
fn smoothed(losses: &[(u64, f64)], step: u64) -> Option<f64> {
    let from = step as f64 * (1.0 - SMOOTHED);
    let near: Vec<f64> = losses
        .iter()
        .filter(|(at, _)| *at as f64 > from)
        .map(|&(_, loss)| loss)
        .collect();
    match near.len() {
        0 => losses.last().map(|&(_, loss)| loss),
        count => Some(near.iter().sum::<f64>() / count as f64),
    }
}

/// Writes the points, one JSON object a line.
pub(super) fn write(path: &Path, points: &[Point]) -> anyhow::Result<()> {
    let mut text = String::new();
    for point in points {
        text.push_str(&serde_json::to_string(point)?);
        text.push('\n');
    }
    write_atomic(path, |file| file.write_all(text.as_bytes())).with_context(|| path.display().to_string())
}

fn read_points(path: &Path) -> anyhow::Result<Vec<Point>> {
    let name = path.display();
    let bytes = read_bounded(path, LARGEST)?;
    let text = String::from_utf8(bytes)
        .ok()
        .with_context(|| format!("{name}: not UTF-8 text"))?;
    let mut points: Vec<Point> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let number = number + 1;
        let point: Point = serde_json::from_str(line).with_context(|| format!("{name}: line {number}"))?;
        let rises = points.last().is_none_or(|before| before.flops < point.flops);
        if !(point.flops > 0.0 && point.loss > 0.0 && rises) {
            bail!(
                "{name}: line {number}: found loss {} after {} operations, expected both above 0, and operations that rise",
                point.loss,
                point.flops
            );
        }
        points.push(point);
    }
    Ok(points)
}

/// All curves in the folder of a study, by name. Runs that gave up have none.
///
/// # Errors
/// There is no curve, or one cannot be read.
pub fn read(dir: &Path) -> anyhow::Result<Vec<Curve>> {
    let name = dir.display();
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| name.to_string())? {
        let path = entry.with_context(|| name.to_string())?.path();
        if path.extension().is_some_and(|ending| ending == "jsonl") {
            files.push(path);
        }
    }
    if files.is_empty() || files.len() > MOST_CURVES {
        bail!(
            "{name}: found {} curves (NAME.jsonl), expected 1 to {MOST_CURVES}, as `fulgur scaling run` writes them",
            files.len()
        );
    }
    files.sort();
    let mut curves = Vec::new();
    for path in files {
        let result = path.with_extension("json");
        let Some(row) = kept(&result, None)? else {
            bail!(
                "{}: no such file, expected it beside {}",
                result.display(),
                path.display()
            );
        };
        curves.push(Curve {
            row,
            points: read_points(&path)?,
        });
    }
    Ok(curves)
}
