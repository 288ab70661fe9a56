//! Plots in one SVG file that stands alone, in the style of the page.

use std::fmt::Write;

use super::page::escape;
use super::svg::{COLOURS, HEIGHT, Plot, WIDTH};

const STYLE: &str = include_str!("style.css");
/// Room above a plot for its caption, and below all of them for the keys.
const CAPTION: f64 = 26.0;
const KEYS: f64 = 26.0;
const MARGIN: f64 = 8.0;
/// Width of a character of the keys, about, and of the stroke before them.
const CHARACTER: f64 = 7.0;
const STROKE: f64 = 26.0;

/// Plots side by side, each under its caption, with what the colours stand for below them.
#[must_use]
pub fn picture(plots: &[(&str, Plot)], keys: &[String]) -> String {
    let width = MARGIN + plots.len() as f64 * (WIDTH + MARGIN);
    let lines = key_lines(keys, width);
    let bottom = CAPTION + HEIGHT;
    let height = bottom + KEYS * lines.len() as f64 + MARGIN;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">\n\
         <style>{STYLE}</style>\n<rect width=\"{width}\" height=\"{height}\" fill=\"var(--card)\"/>\n",
        escape(
            &plots
                .iter()
                .map(|(caption, _)| *caption)
                .collect::<Vec<_>>()
                .join("; ")
        )
    );
    // Writing to a string cannot fail.
    for (place, (caption, plot)) in plots.iter().enumerate() {
        let left = MARGIN + place as f64 * (WIDTH + MARGIN);
        let _ = writeln!(
            out,
            "<text x=\"{:.0}\" y=\"18\">{}</text>\n<g transform=\"translate({left:.0} {CAPTION})\">{}</g>",
            left + 6.0,
            escape(caption),
            plot.elements()
        );
    }
    for (row, line) in lines.iter().enumerate() {
        let y = bottom + KEYS * (row as f64 + 0.7);
        for &(colour, left) in line {
            let _ = writeln!(
                out,
                "<path class=\"l c{}\" d=\"M{left:.0} {:.0}h18\"/><text x=\"{:.0}\" y=\"{y:.0}\">{}</text>",
                colour % COLOURS,
                y - 4.0,
                left + STROKE,
                escape(&keys[colour])
            );
        }
    }
    out.push_str("</svg>\n");
    out
}

/// The numbers of the keys of each line, with their places.
fn key_lines(keys: &[String], width: f64) -> Vec<Vec<(usize, f64)>> {
    let mut lines = vec![Vec::new()];
    let mut left = 2.0 * MARGIN;
    for (number, key) in keys.iter().enumerate() {
        let wide = STROKE + CHARACTER * key.chars().count() as f64 + 2.0 * MARGIN;
        if left + wide > width && left > 2.0 * MARGIN {
            lines.push(Vec::new());
            left = 2.0 * MARGIN;
        }
        if let Some(line) = lines.last_mut() {
            line.push((number, left));
        }
        left += wide;
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::super::svg::Line;
    use super::*;

    #[test]
    fn one_file_holds_all_plots_and_their_keys() {
        let plot = |colour| Plot {
            lines: vec![Line {
                colour,
                points: vec![(1024.0, 1.0), (2048.0, 2.0)],
                faint: Vec::new(),
            }],
            doubling: true,
            ..Plot::default()
        };
        let keys: Vec<String> = (0..9)
            .map(|number| format!("model <{number}> of a long name"))
            .collect();
        let svg = picture(&[("time & more", plot(0)), ("bytes", plot(1))], &keys);
        assert!(svg.starts_with("<svg xmlns=") && svg.ends_with("</svg>\n"));
        assert_eq!((svg.matches("<svg").count(), svg.matches("<g ").count()), (1, 2));
        assert!(svg.contains("time &amp; more") && svg.contains("model &lt;8&gt;"));
        // Keys that would stick out begin a line.
        assert!(key_lines(&keys, 864.0).len() > 1);
        assert_eq!(key_lines(&keys, 864.0).concat().len(), 9);
    }
}
