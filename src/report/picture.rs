//! Plots in one SVG file that stands alone.

use std::fmt::Write;

use super::page::escape;
use super::svg::{COLOURS, HEIGHT, Line, Plot, RIGHT, Stroke, WIDTH};

/// Style of a plot outside of a page, in the colours of the page, light and dark.
const STYLE: &str = "rect{fill:#fff}text{fill:#6a6d72;font:11.5px system-ui,sans-serif}\
.t{fill:#1c1d1f;font-weight:600;font-size:13px}path{fill:none;stroke-linejoin:round;stroke-linecap:round}\
.g{stroke:#e6e6e2}.a{stroke:#6a6d72}.l{stroke-width:1.5}.f{opacity:.32}.h{stroke-dasharray:5 4}\
.l.c0,.f.c0{stroke:#2563c9}.d.c0{fill:#2563c9}.l.c1,.f.c1{stroke:#d2691e}.d.c1{fill:#d2691e}\
.l.c2,.f.c2{stroke:#2e8b57}.d.c2{fill:#2e8b57}.l.c3,.f.c3{stroke:#a0408f}.d.c3{fill:#a0408f}\
.l.c4,.f.c4{stroke:#b8860b}.d.c4{fill:#b8860b}.l.c5,.f.c5{stroke:#008b9a}.d.c5{fill:#008b9a}\
.l.c6,.f.c6{stroke:#c23b4b}.d.c6{fill:#c23b4b}.l.c7,.f.c7{stroke:#6b6f76}.d.c7{fill:#6b6f76}\
@media (prefers-color-scheme:dark){rect{fill:#131517}text{fill:#999da3}.t{fill:#e6e7e8}.g{stroke:#2d3135}.a{stroke:#999da3}\
.l.c0,.f.c0{stroke:#6ea8ff}.d.c0{fill:#6ea8ff}.l.c1,.f.c1{stroke:#ff9d5c}.d.c1{fill:#ff9d5c}\
.l.c2,.f.c2{stroke:#62c98f}.d.c2{fill:#62c98f}.l.c3,.f.c3{stroke:#dd8bd0}.d.c3{fill:#dd8bd0}\
.l.c4,.f.c4{stroke:#e3b74a}.d.c4{fill:#e3b74a}.l.c5,.f.c5{stroke:#4fc8d6}.d.c5{fill:#4fc8d6}\
.l.c6,.f.c6{stroke:#f4808d}.d.c6{fill:#f4808d}.l.c7,.f.c7{stroke:#a5a9b0}.d.c7{fill:#a5a9b0}}";
/// Room above the plot of a picture, for its title and the name of the values' axis.
const HEAD: f64 = 40.0;
/// Room below it for the name of the steps' axis.
const FOOT: f64 = 18.0;
/// Height of a line of the legend, and length of its strokes.
const KEY: f64 = 17.0;
const KEY_STROKE: f64 = 22.0;
/// Width of a picture, more than that of the plot in it.
const MARGIN: f64 = 8.0;

/// A plot with the names of its axes.
#[derive(Debug)]
pub struct Framed<'a> {
    /// The plot.
    pub plot: &'a Plot,
    /// What its steps are.
    pub steps: &'a str,
    /// What its values are.
    pub values: &'a str,
}

/// Plots side by side as a file of its own, each with its title, the names of both axes and a legend of the lines that have a name.
#[must_use]
pub fn picture(plots: &[Framed<'_>]) -> String {
    let (mut wide, mut high, mut inner) = (0.0, 0f64, String::new());
    for plot in plots {
        let (width, height, elements) = plot.elements();
        // Writing to a string cannot fail.
        let _ = writeln!(
            inner,
            "<svg x=\"{wide}\" width=\"{width}\" height=\"{height}\">{elements}</svg>"
        );
        wide += width;
        high = high.max(height);
    }
    let titles: Vec<&str> = plots.iter().map(|plot| plot.plot.title.as_str()).collect();
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {wide} {high}\" width=\"{}\" height=\"{}\" role=\"img\" \
         aria-label=\"{}\">\n<style>{STYLE}</style>\n<rect width=\"100%\" height=\"100%\"/>\n{inner}</svg>\n",
        2.0 * wide,
        2.0 * high,
        escape(&titles.join("; "))
    )
}

impl Framed<'_> {
    /// Width, height and elements.
    fn elements(&self) -> (f64, f64, String) {
        let named: Vec<&Line> = self
            .plot
            .lines
            .iter()
            .filter(|line| !line.name.is_empty())
            .collect();
        let columns = if named.iter().any(|line| line.name.len() > 20) {
            2
        } else {
            3
        };
        let rows = named.len().div_ceil(columns);
        let width = WIDTH + 2.0 * MARGIN;
        let below = HEAD + HEIGHT + FOOT;
        let height = below + rows as f64 * KEY + MARGIN;
        let mut out = format!(
            "<text class=\"t\" x=\"{MARGIN}\" y=\"17\">{}</text>\n<text x=\"{MARGIN}\" y=\"34\">{}</text>\n",
            escape(&self.plot.title),
            escape(self.values),
        );
        let plot = self.plot.draw();
        let inner = format!("<svg x=\"{MARGIN}\" y=\"{HEAD}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" ");
        out.push_str(&plot.replacen("<svg ", &inner, 1));
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "\n<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{}</text>",
            MARGIN + WIDTH - RIGHT,
            HEAD + HEIGHT + 11.0,
            escape(self.steps)
        );
        for (i, line) in named.iter().enumerate() {
            let x = MARGIN + (i % columns) as f64 * (WIDTH / columns as f64);
            let y = below + (i / columns) as f64 * KEY + 9.0;
            let colour = line.colour % COLOURS;
            let _ = match line.stroke {
                Stroke::Dots => write!(
                    out,
                    "<circle class=\"d c{colour}\" cx=\"{:.1}\" cy=\"{y:.1}\" r=\"2.5\"/>",
                    x + KEY_STROKE / 2.0
                ),
                stroke => {
                    let class = if stroke == Stroke::Dashed { "l h" } else { "l" };
                    write!(
                        out,
                        "<path class=\"{class} c{colour}\" d=\"M{x:.1} {y:.1}h{KEY_STROKE}\"/>"
                    )
                }
            };
            let (x, y) = (x + KEY_STROKE + 5.0, y + 4.0);
            let _ = writeln!(
                out,
                "<text x=\"{x:.1}\" y=\"{y:.1}\">{}</text>",
                escape(&line.name)
            );
        }
        (width, height, out)
    }
}

#[cfg(test)]
mod tests {
    use super::super::svg::Scale;
    use super::*;

    #[test]
    fn one_file_holds_all_plots_and_their_keys() {
        let plot = |title: &str, names: &[&str]| Plot {
            title: title.to_owned(),
            lines: names
                .iter()
                .enumerate()
                .map(|(colour, name)| Line {
                    name: (*name).to_owned(),
                    colour,
                    points: vec![(1024.0, 1.0), (2048.0, 2.0)],
                    ..Line::default()
                })
                .collect(),
            steps: Scale::Doubling,
            ..Plot::default()
        };
        let (time, bytes) = (
            plot("time & more", &["a <b>", ""]),
            plot("bytes", &["c", "d", "e", "f"]),
        );
        let frame = |plot| Framed {
            plot,
            steps: "context",
            values: "ms",
        };
        let svg = picture(&[frame(&time), frame(&bytes)]);
        assert!(svg.starts_with("<svg xmlns=") && svg.ends_with("</svg>\n"));
        // The file, two frames, and the plots in them.
        assert_eq!(
            (svg.matches("<svg").count(), svg.matches("</svg>").count()),
            (5, 5)
        );
        assert_eq!(svg.matches("time &amp; more").count(), 3);
        assert!(svg.contains(">a &lt;b&gt;</text>") && svg.contains(">f</text>"));
        // A legend of two lines makes the file higher.
        let height = |svg: &str| {
            svg.split("viewBox=\"0 0 ")
                .nth(1)
                .unwrap()
                .split('"')
                .next()
                .unwrap()
                .split(' ')
                .nth(1)
                .unwrap()
                .parse::<f64>()
                .unwrap()
        };
        assert!(height(&svg) > height(&picture(&[frame(&time)])));
    }
}
