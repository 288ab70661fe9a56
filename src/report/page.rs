//! The page itself: figures, plots, samples, recipe.

use std::fmt::Write as _;

use super::curve::{Curve, Point};
use super::samples::{Kind, Sample, Samples};
use super::svg::{COLOURS, Line, Plot, Scale, short};
use super::{LOSS, Run, VALIDATION};

pub(super) const STYLE: &str = include_str!("style.css");
/// Nothing but what is in the page is shown, whatever a name in it says.
pub(super) const POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:";
/// Scalars of every task that are no part of the loss: name and title.
const RATE: &str = "lr";
const NORM: &str = "grad_norm";
const SPEEDS: [(&str, &str); 3] = [
    ("samples_per_s", "Samples/s"),
    ("tokens_per_s", "Tokens/s"),
    ("mfu", "MFU, share of the hardware's peak"),
];
/// With more lines in a plot, only the smooth ones are drawn.
const FAINT_LINES: usize = 3;
/// A range wider than this is drawn on a logarithmic axis.
const DECADE: f64 = 10.0;
/// Plots of validation figures; the table has all of them.
const MOST_FIGURES: usize = 24;

/// Text with the characters that HTML takes for itself written out.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

/// A name of the log, which may break after its underscores.
fn name_text(name: &str) -> String {
    escape(name).replace('_', "_<wbr>")
}

pub(super) fn write(run: &Run) -> String {
    let plan = Plan::of(run);
    let name = escape(&run.name);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\n\
         <title>{name}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
    );
    head(&mut page, run, &plan, &name);
    training(&mut page, run, &plan);
    validation(&mut page, run, &plan);
    if let Some(samples) = &run.samples {
        show(&mut page, samples);
    }
    if let Some(recipe) = &run.recipe {
        put(
            &mut page,
            format!(
                "<details>\n<summary>Recipe</summary>\n<pre>{}</pre>\n</details>\n",
                escape(recipe)
            ),
        );
    }
    notes(&mut page, run);
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

fn put(page: &mut String, text: String) {
    page.push_str(&text);
}

/// What the recipe says about the length of the run.
#[derive(Default)]
struct Plan {
    task: Option<String>,
    steps: u64,
    seconds: f64,
}

impl Plan {
    fn of(run: &Run) -> Self {
        let table = run
            .recipe
            .as_ref()
            .and_then(|text| text.parse::<toml::Table>().ok());
        let Some(table) = table else {
            return Self::default();
        };
        let train = |key: &str| table.get("train")?.get(key);
        let steps = train("max_steps").and_then(toml::Value::as_integer);
        let seconds =
            train("max_seconds").and_then(|value| value.as_float().or(value.as_integer().map(|n| n as f64)));
        Self {
            task: table.get("task").and_then(toml::Value::as_str).map(str::to_owned),
            steps: steps.and_then(|steps| u64::try_from(steps).ok()).unwrap_or(0),
            seconds: seconds.unwrap_or(0.0),
        }
    }

    /// The part of the run that is done, 0 to 1, where its length is known.
    fn progress(&self, run: &Run) -> Option<f64> {
        if run.finished {
            return Some(1.0);
        }
        let part = |done: f64, all: f64| (all > 0.0).then(|| (done / all).clamp(0.0, 1.0));
        let steps = part(run.metrics.step as f64, self.steps as f64);
        let time = part(run.metrics.elapsed_s.unwrap_or(0.0), self.seconds);
        steps.into_iter().chain(time).reduce(f64::max)
    }
}

fn head(page: &mut String, run: &Run, plan: &Plan, name: &str) {
    let metrics = &run.metrics;
    let task = plan.task.as_ref().map_or_else(
        || "Training run".to_owned(),
        |task| format!("Training of <b>{}</b>", escape(task)),
    );
    let progress = plan.progress(run);
    let state = match progress {
        _ if run.finished => "finished".to_owned(),
        Some(part) => format!("{:.0} % done", (100.0 * part).floor()),
        None => "not finished".to_owned(),
    };
    put(
        page,
        format!("<p class=\"soft\">{task}, {state}</p>\n<h1>{name}</h1>\n"),
    );
    if let Some(part) = progress {
        let done = if run.finished { " class=\"done\"" } else { "" };
        put(
            page,
            format!(
                "<div class=\"bar\"><i{done} style=\"width:{:.1}%\"></i></div>\n",
                100.0 * part
            ),
        );
    }
    page.push_str("<dl class=\"tiles\">\n");
    let mut tile = |title: &str, value: &str, more: &str| {
        let more = if more.is_empty() {
            String::new()
        } else {
            format!("<small>{more}</small>")
        };
        put(
            page,
            format!("<div><dt>{title}</dt><dd>{value}{more}</dd></div>\n"),
        );
    };
    let of = |all: String| format!("of {all}");
    let steps = if plan.steps > 0 {
        of(grouped(plan.steps))
    } else {
        String::new()
    };
    tile("Steps", &grouped(metrics.step), &steps);
    if let Some(elapsed) = metrics.elapsed_s {
        let all = if plan.seconds > 0.0 {
            of(duration(plan.seconds))
        } else {
            String::new()
        };
        tile("Time of training", &duration(elapsed), &all);
    }
    if let Some(loss) = metrics.curve(LOSS) {
        let lowest = loss.lowest().map(|point| at("lowest", point)).unwrap_or_default();
        tile(
            "Loss",
            &loss.last().map(|(_, loss)| short(loss)).unwrap_or_default(),
            &lowest,
        );
    }
    if let Some((name, step, value)) = run.best() {
        let more = format!("{} at step {}", name_text(name), grouped(step));
        tile("Best validation", &short(value), &more);
    }
    for (name, title) in SPEEDS {
        if let Some((_, value)) = metrics.curve(name).and_then(Curve::last) {
            tile(
                title.split(',').next().unwrap_or(title),
                &short(value),
                "in the last interval",
            );
        }
    }
    if metrics.skipped > 0 {
        tile(
            "Skipped steps",
            &grouped(metrics.skipped),
            "gradients were not finite",
        );
    }
    if !metrics.resumed.is_empty() {
        let steps: Vec<String> = metrics
            .resumed
            .iter()
            .take(4)
            .map(|&step| grouped(step))
            .collect();
        let more = if metrics.resumed.len() > 4 { ", ..." } else { "" };
        let times = match metrics.resumed.len() {
            1 => "once".to_owned(),
            n => format!("{n} times"),
        };
        tile(
            "Resumed",
            &times,
            &format!("after step {}{more}", steps.join(", ")),
        );
    }
    page.push_str("</dl>\n");
}

fn at(word: &str, (step, value): Point) -> String {
    format!("{word} {} at step {}", short(value), grouped(step))
}

/// Plots of what is logged while training.
fn training(page: &mut String, run: &Run, plan: &Plan) {
    let metrics = &run.metrics;
    let known = |name: &str| {
        let own = [LOSS, RATE, NORM].contains(&name) || name.starts_with(VALIDATION);
        own || SPEEDS.iter().any(|(speed, _)| *speed == name)
    };
    let named = |name: &'static str| metrics.curve(name).map(|curve| (name, curve));
    let parts: Vec<(&str, &Curve)> = metrics
        .curves
        .iter()
        .filter(|(name, curve)| !known(name) && !curve.is_empty())
        .map(|(name, curve)| (name.as_str(), curve))
        .collect();
    let mut figures = Vec::new();
    let mut add = |title: &str, curves: &[(&str, &Curve)], style: Style| {
        if !curves.is_empty() {
            figures.push(figure(title, curves, run, plan, style));
        }
    };
    let one = |name: &'static str| named(name).into_iter().collect::<Vec<_>>();
    add("Loss", &one(LOSS), Style::Noisy);
    let pages = parts.len().div_ceil(COLOURS);
    for (i, group) in parts.chunks(COLOURS).enumerate() {
        let title = match pages {
            1 => "Parts of the loss".to_owned(),
            _ => format!("Parts of the loss, {} of {pages}", i + 1),
        };
        add(&title, group, Style::Noisy);
    }
    add("Norm of the gradient", &one(NORM), Style::Noisy);
    add("Learning rate", &one(RATE), Style::Exact);
    for (name, title) in SPEEDS {
        add(title, &one(name), Style::Speed);
    }
    if figures.is_empty() {
        return;
    }
    page.push_str("<h2>Training</h2>\n<div class=\"plots\">\n");
    figures.iter().for_each(|figure| page.push_str(figure));
    page.push_str("</div>\n");
    let mut legend = Vec::new();
    if !metrics.resumed.is_empty() {
        legend.push("<b>dashed</b>: resumed");
    }
    if !metrics.skips.is_empty() {
        legend.push("<b class=\"skip\">strokes on the axis</b>: steps were skipped");
    }
    if !legend.is_empty() {
        put(page, format!("<p class=\"legend\">{}</p>\n", legend.join("; ")));
    }
}

/// Figures on held-out data, as a table and as plots.
fn validation(page: &mut String, run: &Run, plan: &Plan) {
    let figures: Vec<_> = run.validations().collect();
    if figures.is_empty() {
        return;
    }
    page.push_str(
        "<h2>Validation</h2>\n<div class=\"wide\"><table>\n\
         <tr><th>figure</th><th>last</th><th>lowest</th><th>highest</th></tr>\n",
    );
    let cell = |point: Option<Point>| {
        point.map_or_else(
            || "<td></td>".to_owned(),
            |(step, value)| format!("<td>{}<small>at {}</small></td>", short(value), grouped(step)),
        )
    };
    for (name, curve) in &figures {
        let last = curve.last().map(|(_, value)| short(value)).unwrap_or_default();
        put(
            page,
            format!(
                "<tr><th>{}</th><td>{last}</td>{}{}</tr>\n",
                name_text(name),
                cell(curve.lowest()),
                cell(curve.highest())
            ),
        );
    }
    page.push_str("</table></div>\n");
    let drawn: Vec<_> = figures.iter().filter(|(_, curve)| curve.count() > 1).collect();
    if drawn.is_empty() {
        return;
    }
    page.push_str("<div class=\"plots\">\n");
    for (name, curve) in drawn.into_iter().take(MOST_FIGURES) {
        page.push_str(&figure(name, &[(name, curve)], run, plan, Style::Exact));
    }
    page.push_str("</div>\n");
}

/// How a plot shows its curves.
#[derive(Clone, Copy, PartialEq)]
enum Style {
    /// Smoothed before the raw curve, on a logarithmic axis where the range is wide.
    Noisy,
    /// Smoothed before the raw curve.
    Speed,
    /// As it is.
    Exact,
}

fn figure(title: &str, curves: &[(&str, &Curve)], run: &Run, plan: &Plan, style: Style) -> String {
    let bound = |of: fn(&Curve) -> Option<Point>| {
        curves
            .iter()
            .filter_map(move |(_, curve)| of(curve))
            .map(|(_, value)| value)
    };
    let low = bound(Curve::lowest).fold(f64::INFINITY, f64::min);
    let high = bound(Curve::highest).fold(f64::NEG_INFINITY, f64::max);
    let line = |(colour, (_, curve)): (usize, &(&str, &Curve))| {
        let smooth = style != Style::Exact;
        Line {
            colour,
            points: if smooth { curve.smoothed() } else { curve.points() },
            faint: if smooth && curves.len() <= FAINT_LINES {
                curve.points()
            } else {
                Vec::new()
            },
            ..Line::default()
        }
    };
    let steps = |steps: &[u64]| steps.iter().map(|&step| step as f64).collect();
    let plot = Plot {
        title: format!("{title} over steps, from {} to {}", short(low), short(high)),
        lines: curves.iter().enumerate().map(line).collect(),
        logarithmic: style == Style::Noisy && low > 0.0 && high / low > DECADE,
        steps: Scale::Linear,
        until: if run.finished { 0.0 } else { plan.steps as f64 },
        resumed: steps(&run.metrics.resumed),
        skips: if style == Style::Noisy {
            steps(&run.metrics.skips)
        } else {
            Vec::new()
        },
    };
    let last = match curves {
        [(_, curve)] => curve
            .last()
            .map(|(_, value)| format!("<span>{}</span>", short(value))),
        _ => None,
    };
    let mut keys = String::new();
    if curves.len() > 1 {
        keys.push_str("<ul class=\"keys\">");
        for (colour, (name, _)) in curves.iter().enumerate() {
            // Writing to a string cannot fail.
            let _ = write!(
                keys,
                "<li><i class=\"c{}\"></i>{}</li>",
                colour % COLOURS,
                escape(name)
            );
        }
        keys.push_str("</ul>");
    }
    format!(
        "<figure><figcaption>{}{}</figcaption>{keys}{}</figure>\n",
        name_text(title),
        last.unwrap_or_default(),
        plot.draw()
    )
}

fn show(page: &mut String, samples: &Samples) {
    put(
        page,
        format!(
            "<h2>Samples <small>of step {}</small></h2>\n<div class=\"samples\">\n",
            grouped(samples.step)
        ),
    );
    for Sample {
        name,
        kind,
        bytes,
        address,
    } in &samples.files
    {
        let name = escape(name);
        let content = match (kind, address) {
            (_, None) => format!(
                "<p class=\"soft\">{:.1} MB, left out of this page</p>",
                *bytes as f64 / 1e6
            ),
            (Kind::Picture, Some(address)) => format!("<img src=\"{address}\" alt=\"{name}\">"),
            (Kind::Sound, Some(address)) => {
                format!("<audio controls preload=\"metadata\" src=\"{address}\"></audio>")
            }
        };
        put(
            page,
            format!("<figure><figcaption>{name}</figcaption>{content}</figure>\n"),
        );
    }
    page.push_str("</div>\n");
}

/// What a reader should know about the curves and about what is missing.
fn notes(page: &mut String, run: &Run) {
    let metrics = &run.metrics;
    let undefined: u64 = metrics.curves.iter().map(|(_, curve)| curve.undefined).sum();
    let counted = [
        (
            undefined,
            "logged value(s) were infinite or undefined and are not drawn",
        ),
        (metrics.unreadable, "line(s) of metrics.jsonl could not be read"),
        (
            metrics.crowded,
            "value(s) have names beyond the number of curves that a page shows",
        ),
    ];
    let mut notes: Vec<String> = counted
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, words)| format!("{} {words}", grouped(*count)))
        .collect();
    if metrics.cut_off {
        notes.push("The last line of metrics.jsonl breaks off; it is left out".to_owned());
    }
    notes.push(
        "Faint lines are what was logged, thinned to lowest and highest values where there is much of it; the lines \
         before them are averages around each step"
            .to_owned(),
    );
    put(
        page,
        format!(
            "<ul class=\"notes\"><li>{}.</li></ul>\n",
            notes.join(".</li><li>")
        ),
    );
}

/// A count with a comma every three digits.
pub(crate) fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A time in the two units that matter.
fn duration(seconds: f64) -> String {
    if seconds < 60.0 {
        return format!("{} s", short((seconds * 10.0).round() / 10.0));
    }
    let whole = seconds.round() as u64;
    let (days, hours, minutes) = (whole / 86_400, whole / 3600 % 24, whole / 60 % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes} min {} s", whole % 60),
        (0, _) => format!("{hours} h {minutes} min"),
        _ => format!("{} d {hours} h", grouped(days)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_times_are_readable() {
        let counts = [0, 999, 1000, 12_345, 1_234_567].map(grouped);
        assert_eq!(counts, ["0", "999", "1,000", "12,345", "1,234,567"]);
        let times = [0.0, 12.34, 59.99, 60.0, 200.4, 3725.0, 90_000.0].map(duration);
        assert_eq!(
            times,
            [
                "0 s",
                "12.3 s",
                "60 s",
                "1 min 0 s",
                "3 min 20 s",
                "1 h 2 min",
                "1 d 1 h"
            ]
        );
        assert_eq!(
            escape("<a href='x'>&\"</a>"),
            "&lt;a href=&#39;x&#39;&gt;&amp;&quot;&lt;/a&gt;"
        );
    }
}
