//! Heat maps as a picture of their own: values from 0 to 1 by row and column, several maps side by side.

use std::fmt::Write;

use super::page::escape;

/// Size of a field.
const FIELD: [f64; 2] = [58.0, 34.0];
/// Space before a map, for the names of rows.
const LEFT: f64 = 62.0;
/// Space above it, for titles.
const TOP: f64 = 58.0;
/// Space below it, for the names of columns.
const BOTTOM: f64 = 48.0;
/// Space between maps and at the end.
const GAP: f64 = 22.0;
/// Width of the scale beside the maps, with its numbers.
const SCALE: f64 = 62.0;
/// Fields of the scale.
const STEPS: usize = 32;
/// Colours from 0 to 1, of growing darkness, so that they are told apart in grey too.
const COLOURS: [[f64; 3]; 5] = [
    [247.0, 243.0, 226.0],
    [247.0, 206.0, 132.0],
    [232.0, 128.0, 88.0],
    [158.0, 54.0, 94.0],
    [48.0, 20.0, 76.0],
];
/// Values from here on have light letters.
const DARK: f64 = 0.55;

/// Maps over the same rows and columns.
#[derive(Clone, Debug, Default)]
pub struct HeatMaps {
    /// What is seen.
    pub title: String,
    /// What columns are.
    pub across: String,
    /// Their names.
    pub columns: Vec<String>,
    /// What rows are.
    pub down: String,
    /// Their names.
    pub rows: Vec<String>,
    /// The maps: a title, and values of 0 to 1 by row, then column; none stays white.
    pub maps: Vec<(String, Vec<Vec<Option<f64>>>)>,
}

impl HeatMaps {
    /// The picture, an SVG file.
    #[must_use]
    pub fn draw(&self) -> String {
        let map = [
            FIELD[0] * self.columns.len() as f64,
            FIELD[1] * self.rows.len() as f64,
        ];
        let width = self.maps.len() as f64 * (LEFT + map[0] + GAP) + SCALE;
        let height = TOP + map[1] + BOTTOM;
        let title = escape(&self.title);
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
             role=\"img\" aria-label=\"{title}\" font-family=\"system-ui, sans-serif\" font-size=\"12\" fill=\"#3c3f44\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
             <text x=\"14\" y=\"20\" font-size=\"14\" font-weight=\"600\">{title}</text>\n"
        );
        for (at, (title, values)) in self.maps.iter().enumerate() {
            let left = LEFT + at as f64 * (LEFT + map[0] + GAP);
            self.map(&mut out, left, at == 0, title, values);
        }
        scale(&mut out, width - SCALE, map[1]);
        out.push_str("</svg>\n");
        out
    }

    /// One map whose fields begin at `left`.
    fn map(&self, out: &mut String, left: f64, first: bool, title: &str, values: &[Vec<Option<f64>>]) {
        let (width, height) = (
            FIELD[0] * self.columns.len() as f64,
            FIELD[1] * self.rows.len() as f64,
        );
        let bottom = TOP + height;
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "<text x=\"{left}\" y=\"{}\" font-weight=\"600\">{}</text>",
            TOP - 10.0,
            escape(title)
        );
        for (row, name) in self.rows.iter().enumerate() {
            let y = TOP + FIELD[1] * row as f64;
            let middle = y + FIELD[1] / 2.0 + 4.0;
            let _ = writeln!(
                out,
                "<text x=\"{}\" y=\"{middle}\" text-anchor=\"end\">{}</text>",
                left - 6.0,
                escape(name)
            );
            for column in 0..self.columns.len() {
                let value = values.get(row).and_then(|row| row.get(column)).copied().flatten();
                let Some(value) = value.filter(|value| value.is_finite()) else {
                    continue;
                };
                let x = left + FIELD[0] * column as f64;
                let ink = if value >= DARK { "#ffffff" } else { "#26282b" };
                let _ = writeln!(
                    out,
                    "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{}\"/>\
                     <text x=\"{}\" y=\"{middle}\" text-anchor=\"middle\" fill=\"{ink}\">{:.0}</text>",
                    x + 0.5,
                    y + 0.5,
                    FIELD[0] - 1.0,
                    FIELD[1] - 1.0,
                    colour(value),
                    x + FIELD[0] / 2.0,
                    100.0 * value
                );
            }
        }
        for (column, name) in self.columns.iter().enumerate() {
            let x = left + FIELD[0] * (column as f64 + 0.5);
            let _ = writeln!(
                out,
                "<text x=\"{x}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                bottom + 16.0,
                escape(name)
            );
        }
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            left + width / 2.0,
            bottom + 36.0,
            escape(&self.across)
        );
        if first {
            let (x, y) = (left - LEFT + 16.0, TOP + height / 2.0);
            let _ = writeln!(
                out,
                "<text x=\"{x}\" y=\"{y}\" text-anchor=\"middle\" transform=\"rotate(-90 {x} {y})\">{}</text>",
                escape(&self.down)
            );
        }
    }
}

/// The scale of colours from `left` on, as high as the maps.
fn scale(out: &mut String, left: f64, height: f64) {
    let step = height / STEPS as f64;
    for at in 0..STEPS {
        let value = (at as f64 + 0.5) / STEPS as f64;
        let _ = writeln!(
            out,
            "<rect x=\"{left}\" y=\"{:.2}\" width=\"12\" height=\"{:.2}\" fill=\"{}\"/>",
            TOP + height - step * (at + 1) as f64,
            // Without gaps between neighbours.
            step + 0.3,
            colour(value)
        );
    }
    for (value, place) in [(100, 0.0), (50, 0.5), (0, 1.0)] {
        let y = TOP + place * height + 4.0;
        let _ = writeln!(out, "<text x=\"{}\" y=\"{y}\">{value} %</text>", left + 17.0);
    }
}

/// The colour of a value from 0 to 1.
fn colour(value: f64) -> String {
    let place = value.clamp(0.0, 1.0) * (COLOURS.len() - 1) as f64;
    let below = (place as usize).min(COLOURS.len() - 2);
    let part = place - below as f64;
    let [r, g, b] = std::array::from_fn(|channel| {
        let (from, to) = (COLOURS[below][channel], COLOURS[below + 1][channel]);
        (from + part * (to - from)).round() as u8
    });
    format!("#{r:02x}{g:02x}{b:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_have_their_places_colours_and_numbers() {
        let svg = HeatMaps {
            title: "a < b".into(),
            across: "tokens".into(),
            columns: vec!["64".into(), "128".into()],
            down: "depth".into(),
            rows: vec!["0 %".into(), "100 %".into()],
            maps: vec![
                (
                    "one".into(),
                    vec![vec![Some(0.0), Some(1.0)], vec![None, Some(0.5)]],
                ),
                ("two".into(), vec![vec![Some(f64::NAN)]]),
            ],
        }
        .draw();
        assert!(svg.starts_with("<svg xmlns=") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("aria-label=\"a &lt; b\"") && !svg.contains("NaN"));
        // Three fields, the ground and the scale.
        assert_eq!(svg.matches("<rect").count(), 3 + 1 + STEPS);
        assert!(svg.contains("<rect x=\"62.5\" y=\"58.5\" width=\"57\" height=\"33\" fill=\"#f7f3e2\"/>"));
        assert!(svg.contains("<rect x=\"120.5\" y=\"58.5\" width=\"57\" height=\"33\" fill=\"#30144c\"/>"));
        assert!(svg.contains("fill=\"#ffffff\">100</text>") && svg.contains("fill=\"#26282b\">50</text>"));
        assert_eq!(colour(0.125), "#f7e1b3");
        assert_eq!((colour(-1.0), colour(7.0)), (colour(0.0), colour(1.0)));
    }
}
