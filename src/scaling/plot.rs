//! Plots of a study as SVG files: curves with envelope and laws for each architecture, and all architectures together.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use fulgur_datasets::atomic::write_atomic;

use super::envelope::{Track, Winner};
use super::fit::{Fit, Law};
use super::published::Power;
use crate::report::picture::{Framed, picture};
use crate::report::svg::{Line, Plot, Scale, Stroke};

/// Name of the steps' axis.
const COMPUTE: &str = "compute, PFLOP/s-days";
/// How far a law is drawn beyond the envelope, as a factor of compute.
const BEYOND: f64 = 2.0;
/// Colours of what is no size.
const LAW: usize = 3;
const PUBLISHED: usize = 7;
/// What part of a curve's losses above the envelope's highest is shown.
const ROOM: f64 = 1.15;

/// Files that were written.
pub type Drawn = Vec<PathBuf>;

/// Writes `loss-NAME.svg` for each architecture, and `loss.svg`, `n_opt.svg` and `d_opt.svg` for all of them, into `out`.
///
/// # Errors
/// The folder cannot be written.
pub fn draw(fits: &BTreeMap<String, Fit>, out: &Path) -> anyhow::Result<Drawn> {
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let mut drawn = Vec::new();
    let mut write = |name: String, picture: String| -> anyhow::Result<()> {
        let path = out.join(name);
        write_atomic(&path, |file| file.write_all(picture.as_bytes()))
            .with_context(|| path.display().to_string())?;
        drawn.push(path);
        Ok(())
    };
    for (name, fit) in fits {
        let plot = architecture(name, fit);
        write(
            format!("loss-{name}.svg"),
            frame(&plot, "held-out loss, nats a token"),
        )?;
    }
    let together: [(&str, &str, &str, Pick); 3] = [
        (
            "loss.svg",
            "Loss over compute",
            "held-out loss, nats a token",
            |fit| (fit.loss, fit.published.map(|found| found.loss)),
        ),
        ("n_opt.svg", "Weights of the best size", "weights", |fit| {
            (fit.n_opt, fit.published.map(|found| found.n_opt))
        }),
        ("d_opt.svg", "Tokens of the best size", "tokens", |fit| {
            (fit.d_opt, fit.published.and_then(|found| found.d_opt))
        }),
    ];
    let values: [fn(&Winner) -> f64; 3] = [
        |winner| winner.loss,
        |winner| winner.weights,
        |winner| winner.tokens,
    ];
    for ((file, title, axis, pick), value) in together.into_iter().zip(values) {
        let plot = all(title, fits, pick, value);
        write(file.to_owned(), frame(&plot, axis))?;
    }
    Ok(drawn)
}

fn frame(plot: &Plot, values: &str) -> String {
    picture(&[Framed {
        plot,
        steps: COMPUTE,
        values,
    }])
}

/// A law of a fit, and the published one.
type Pick = fn(&Fit) -> (Option<Law>, Option<Power>);

fn plot(title: String, lines: Vec<Line>) -> Plot {
    Plot {
        title,
        lines,
        logarithmic: true,
        steps: Scale::Logarithmic,
        ..Plot::default()
    }
}

/// Where laws are drawn: over the envelope, and a little beyond.
fn range(winners: &[Winner]) -> Option<(f64, f64)> {
    let (first, last) = (winners.first()?, winners.last()?);
    Some((first.compute / BEYOND, last.compute * BEYOND))
}

fn line_of(power: Power, (low, high): (f64, f64)) -> Vec<(f64, f64)> {
    [low, high].map(|compute| (compute, power.at(compute))).to_vec()
}

/// The published exponent through the middle of ours: other data and another tokenizer leave slopes to compare, not heights.
fn shifted(published: Power, own: Power, (low, high): (f64, f64)) -> Power {
    let middle = (low * high).sqrt();
    Power {
        alpha: published.alpha,
        beta: own.at(middle) / middle.powf(published.alpha),
    }
}

/// An exponent in a legend.
fn exponent(alpha: f64) -> String {
    format!("C^{alpha:.4}")
}

/// The part of a curve that has something to do with the envelope.
fn shown(track: &Track, highest: f64) -> Vec<(f64, f64)> {
    let points = track.points.iter().copied();
    points.filter(|(_, loss)| *loss <= highest * ROOM).collect()
}

fn architecture(name: &str, fit: &Fit) -> Plot {
    let all = fit.envelope.iter().chain(&fit.others);
    let highest = match fit.envelope.first() {
        Some(first) => first.loss,
        None => all.map(|winner| winner.loss).fold(0.0, f64::max),
    };
    let mut lines: Vec<Line> = fit
        .tracks
        .iter()
        .enumerate()
        .map(|(i, track)| Line {
            name: format!("{}, {:.2} M", track.size, track.weights / 1e6),
            stroke: Stroke::Plain,
            // The colours of the laws are left out.
            colour: [0, 1, 2, 4, 5, 6][i % 6],
            points: shown(track, highest),
            faint: Vec::new(),
        })
        .filter(|line| !line.points.is_empty())
        .collect();
    lines.push(Line {
        name: "envelope".to_owned(),
        stroke: Stroke::Dots,
        colour: LAW,
        points: fit
            .envelope
            .iter()
            .map(|winner| (winner.compute, winner.loss))
            .collect(),
        faint: Vec::new(),
    });
    if let (Some(law), Some(range)) = (fit.loss, range(&fit.envelope)) {
        let own = law.power();
        lines.push(Line {
            name: format!("fit, {}", exponent(own.alpha)),
            stroke: Stroke::Plain,
            colour: LAW,
            points: line_of(own, range),
            faint: Vec::new(),
        });
        if let Some(published) = fit.published {
            lines.push(Line {
                name: format!("published slope, {}", exponent(published.loss.alpha)),
                stroke: Stroke::Dashed,
                colour: PUBLISHED,
                points: line_of(shifted(published.loss, own, range), range),
                faint: Vec::new(),
            });
        }
    }
    plot(format!("{name}: held-out loss over compute"), lines)
}

fn all(title: &str, fits: &BTreeMap<String, Fit>, pick: Pick, value: fn(&Winner) -> f64) -> Plot {
    let mut lines = Vec::new();
    for (colour, (name, fit)) in fits.iter().enumerate() {
        let (Some(law), published) = pick(fit) else {
            continue;
        };
        let Some(range) = range(&fit.envelope) else {
            continue;
        };
        let own = law.power();
        lines.push(Line {
            name: String::new(),
            stroke: Stroke::Dots,
            colour,
            points: fit
                .envelope
                .iter()
                .map(|winner| (winner.compute, value(winner)))
                .collect(),
            faint: Vec::new(),
        });
        lines.push(Line {
            name: format!("{name}, {}", exponent(own.alpha)),
            stroke: Stroke::Plain,
            colour,
            points: line_of(own, range),
            faint: Vec::new(),
        });
        if let Some(published) = published {
            lines.push(Line {
                name: format!("published slope, {}", exponent(published.alpha)),
                stroke: Stroke::Dashed,
                colour,
                points: line_of(shifted(published, own, range), range),
                faint: Vec::new(),
            });
        }
    }
    plot(title.to_owned(), lines)
}
