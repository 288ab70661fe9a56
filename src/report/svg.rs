//! Line plots as inline SVG: axes with round ticks, a logarithmic one where asked for, thin lines, marks.
//!
//! Colours are classes (`c0` to `c7`, and others), so that the page's style sheet decides them, in light and in dark.

use std::fmt::Write;

/// How many colours there are; lines beyond them begin again.
pub const COLOURS: usize = 8;

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 230.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 8.0;
const BOTTOM: f64 = 24.0;
/// Width of a character of the labels, about.
const CHARACTER: f64 = 7.5;
/// Lines with at most so many points show them as dots.
const DOTS: usize = 48;
/// Parts of an axis between ticks, at most.
const TICKS: usize = 6;
/// Length of the strokes of skipped steps.
const STROKE: f64 = 9.0;
/// Values beyond this are drawn here.
const FURTHEST: f64 = 1e300;

/// How a curve is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stroke {
    /// A line, with dots where points are few.
    #[default]
    Dotted,
    /// A line without dots.
    Plain,
    /// A dashed line.
    Dashed,
    /// Dots without a line.
    Dots,
}

/// One curve.
#[derive(Clone, Debug, Default)]
pub struct Line {
    /// Its name in the legend of [`Plot::picture`]; none where it is empty.
    pub name: String,
    /// How it is drawn.
    pub stroke: Stroke,
    /// Its colour, counted from 0.
    pub colour: usize,
    /// The points of the thin line.
    pub points: Vec<(f64, f64)>,
    /// The points of a faint line behind it.
    pub faint: Vec<(f64, f64)>,
}

/// A plot of curves over steps.
#[derive(Clone, Debug, Default)]
pub struct Plot {
    /// What is seen, for those who cannot see it.
    pub title: String,
    /// The curves.
    pub lines: Vec<Line>,
    /// Whether the values' axis is logarithmic; all values have to be above 0 then.
    pub logarithmic: bool,
    /// Whether the steps' axis is, from the first point to the last; all steps have to be above 0 then.
    pub logarithmic_steps: bool,
    /// Steps from 0 to this are shown, and to the last point if that is later.
    pub until: f64,
    /// Steps of upright lines across the plot.
    pub resumed: Vec<f64>,
    /// Steps of short strokes on the steps' axis.
    pub skips: Vec<f64>,
}

/// A linear or logarithmic scale from values to places.
struct Axis {
    low: f64,
    high: f64,
    logarithmic: bool,
    from: f64,
    to: f64,
}

impl Axis {
    fn place(&self, value: f64) -> f64 {
        let scale = |x: f64| if self.logarithmic { x.log10() } else { x };
        let (low, high) = (scale(self.low), scale(self.high));
        let part = (scale(value.clamp(-FURTHEST, FURTHEST)) - low) / (high - low);
        self.from + part * (self.to - self.from)
    }
}

impl Plot {
    /// The plot as an `<svg>` element.
    #[must_use]
    pub fn draw(&self) -> String {
        let (x, y) = (self.steps(), self.values());
        let mut out = format!(
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
            super::page::escape(&self.title)
        );
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        let mut put = |element: String| out.push_str(&element);
        for (value, label) in ticks(&y) {
            let at = y.place(value);
            put(format!("<path class=\"g\" d=\"M{LEFT} {at:.1}H{right}\"/>"));
            put(format!(
                "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                LEFT - 6.0,
                at + 4.0
            ));
        }
        for (value, label) in ticks(&x) {
            let at = x.place(value);
            // The last label must not stick out of the picture.
            let half = label.len() as f64 * CHARACTER / 2.0;
            let middle = at.min(WIDTH - half - 1.0);
            put(format!("<path class=\"g\" d=\"M{at:.1} {TOP}V{bottom}\"/>"));
            put(format!(
                "<text x=\"{middle:.1}\" y=\"{:.0}\" text-anchor=\"middle\">{label}</text>",
                HEIGHT - 7.0
            ));
        }
        put(format!("<path class=\"a\" d=\"M{LEFT} {bottom}H{right}\"/>"));
        let shown = |steps: &[f64]| -> Vec<f64> {
            let inside = steps.iter().filter(|step| (x.low..=x.high).contains(*step));
            inside.map(|step| x.place(*step)).collect()
        };
        for at in shown(&self.resumed) {
            put(format!("<path class=\"r\" d=\"M{at:.1} {TOP}V{bottom}\"/>"));
        }
        for at in shown(&self.skips) {
            put(format!("<path class=\"s\" d=\"M{at:.1} {bottom}v-{STROKE}\"/>"));
        }
        for line in &self.lines {
            let colour = line.colour % COLOURS;
            if !line.faint.is_empty() {
                put(format!(
                    "<path class=\"f c{colour}\" d=\"{}\"/>",
                    path(&line.faint, &x, &y)
                ));
            }
        }
        for line in &self.lines {
            let colour = line.colour % COLOURS;
            let class = if line.stroke == Stroke::Dashed { "l h" } else { "l" };
            if line.stroke != Stroke::Dots {
                put(format!(
                    "<path class=\"{class} c{colour}\" d=\"{}\"/>",
                    path(&line.points, &x, &y)
                ));
            }
            let dots = match line.stroke {
                Stroke::Dotted => line.points.len() <= DOTS,
                Stroke::Dots => true,
                Stroke::Plain | Stroke::Dashed => false,
            };
            if dots {
                let radius = if line.points.len() == 1 { 3.0 } else { 2.0 };
                for point in &line.points {
                    let (cx, cy) = (x.place(point.0), y.place(point.1));
                    put(format!(
                        "<circle class=\"d c{colour}\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"{radius}\"/>"
                    ));
                }
            }
        }
        out.push_str("</svg>");
        out
    }

    fn steps(&self) -> Axis {
        let all = self
            .lines
            .iter()
            .flat_map(|line| &line.points)
            .map(|point| point.0);
        let (mut low, mut high) = (0.0, all.clone().fold(self.until.max(1.0), f64::max));
        let least = all.clone().fold(f64::INFINITY, f64::min);
        let logarithmic = self.logarithmic_steps && least > 0.0 && least.is_finite();
        if logarithmic {
            let most = all.fold(0.0, f64::max);
            let wide = (most / least).max(2.0).powf(0.02);
            (low, high) = (least / wide, most * wide);
        }
        Axis {
            low,
            high,
            logarithmic,
            from: LEFT,
            to: WIDTH - RIGHT,
        }
    }

    fn values(&self) -> Axis {
        let all = self
            .lines
            .iter()
            .flat_map(|line| line.points.iter().chain(&line.faint));
        let range = all.fold(None, |range: Option<(f64, f64)>, (_, value)| {
            let value = value.clamp(-FURTHEST, FURTHEST);
            let (low, high) = range.unwrap_or((value, value));
            Some((low.min(value), high.max(value)))
        });
        let (low, high) = range.unwrap_or((0.0, 1.0));
        let logarithmic = self.logarithmic && low > 0.0;
        let (low, high) = if logarithmic {
            // At least a factor of two, and a little room on both sides.
            let wide = (high / low).max(2.0).powf(0.04).min(1e10);
            ((low / wide).max(f64::MIN_POSITIVE), (high * wide).min(FURTHEST))
        } else if low == high {
            let room = if low == 0.0 { 1.0 } else { low.abs() / 10.0 };
            (low - room, high + room)
        } else {
            // Halved first: the difference of huge values has no number.
            let room = (high / 2.0 - low / 2.0) * 0.1;
            // A range that nearly reaches zero is shown from zero on.
            let floor = if low >= 0.0 && low <= 0.25 * high {
                0.0
            } else {
                low - room
            };
            (floor, high + room)
        };
        Axis {
            low,
            high,
            logarithmic,
            from: HEIGHT - BOTTOM,
            to: TOP,
        }
    }
}

/// Style of a plot outside of a page.
const STYLE: &str = "rect{fill:#fff}text{fill:#6a6d72;font:11.5px system-ui,sans-serif}\
.t{fill:#1c1d1f;font-weight:600;font-size:13px}path{fill:none;stroke-linejoin:round;stroke-linecap:round}\
.g{stroke:#e6e6e2}.a{stroke:#6a6d72}.l{stroke-width:1.5}.f{opacity:.32}.h{stroke-dasharray:5 4}\
.l.c0,.f.c0{stroke:#2563c9}.d.c0{fill:#2563c9}.l.c1,.f.c1{stroke:#d2691e}.d.c1{fill:#d2691e}\
.l.c2,.f.c2{stroke:#2e8b57}.d.c2{fill:#2e8b57}.l.c3,.f.c3{stroke:#a0408f}.d.c3{fill:#a0408f}\
.l.c4,.f.c4{stroke:#b8860b}.d.c4{fill:#b8860b}.l.c5,.f.c5{stroke:#008b9a}.d.c5{fill:#008b9a}\
.l.c6,.f.c6{stroke:#c23b4b}.d.c6{fill:#c23b4b}.l.c7,.f.c7{stroke:#6b6f76}.d.c7{fill:#6b6f76}";
/// Room above the plot of a picture, for its title and the name of the values' axis.
const HEAD: f64 = 40.0;
/// Room below it for the name of the steps' axis.
const FOOT: f64 = 18.0;
/// Height of a line of the legend, and length of its strokes.
const KEY: f64 = 17.0;
const KEY_STROKE: f64 = 22.0;
/// Width of a picture, more than that of the plot in it.
const MARGIN: f64 = 8.0;

impl Plot {
    /// The plot as a file of its own, with its title, the names of both axes and a legend of the lines that have a name.
    #[must_use]
    pub fn picture(&self, steps: &str, values: &str) -> String {
        let named: Vec<&Line> = self.lines.iter().filter(|line| !line.name.is_empty()).collect();
        let columns = if named.iter().any(|line| line.name.len() > 24) {
            2
        } else {
            3
        };
        let rows = named.len().div_ceil(columns);
        let width = WIDTH + 2.0 * MARGIN;
        let below = HEAD + HEIGHT + FOOT;
        let height = below + rows as f64 * KEY + MARGIN;
        let escape = super::page::escape;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{}\" height=\"{}\">\n\
             <style>{STYLE}</style>\n<rect width=\"100%\" height=\"100%\"/>\n\
             <text class=\"t\" x=\"{MARGIN}\" y=\"17\">{}</text>\n<text x=\"{MARGIN}\" y=\"34\">{}</text>\n",
            2.0 * width,
            2.0 * height,
            escape(&self.title),
            escape(values),
        );
        let plot = self.draw();
        let inner = format!("<svg x=\"{MARGIN}\" y=\"{HEAD}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" ");
        out.push_str(&plot.replacen("<svg ", &inner, 1));
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "\n<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{}</text>",
            MARGIN + WIDTH - RIGHT,
            HEAD + HEIGHT + 11.0,
            escape(steps)
        );
        for (i, line) in named.iter().enumerate() {
            let x = MARGIN + LEFT + (i % columns) as f64 * ((WIDTH - LEFT) / columns as f64);
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
        out.push_str("</svg>\n");
        out
    }
}

fn path(points: &[(f64, f64)], x: &Axis, y: &Axis) -> String {
    let mut d = String::with_capacity(points.len() * 12);
    for (i, point) in points.iter().enumerate() {
        let letter = if i == 0 { 'M' } else { 'L' };
        // Writing to a string cannot fail.
        let _ = write!(d, "{letter}{:.1} {:.1}", x.place(point.0), y.place(point.1));
    }
    d
}

/// Round values on an axis with their labels, from low to high.
fn ticks(axis: &Axis) -> Vec<(f64, String)> {
    if axis.logarithmic {
        log_ticks(axis.low, axis.high)
    } else {
        let (step, values) = round_ticks(axis.low, axis.high);
        let largest = values
            .iter()
            .fold(0f64, |largest, value| largest.max(value.abs()));
        let label = |value: f64| tick_label(value, step, largest);
        values.into_iter().map(|value| (value, label(value))).collect()
    }
}

/// Multiples of 1, 2 or 5 times a power of ten within the range, and the distance between them.
fn round_ticks(low: f64, high: f64) -> (f64, Vec<f64>) {
    let rough = (high / TICKS as f64 - low / TICKS as f64).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(rough.log10().floor());
    let factors = [1.0, 2.0, 5.0, 10.0].into_iter();
    let step = factors
        .map(|factor| factor * power)
        .find(|step| *step >= rough * 0.999)
        .unwrap_or(rough);
    let (first, last) = ((low / step).ceil(), (high / step).floor());
    // An axis so far from zero that neighbouring ticks are the same number has none.
    let count = if last - first <= TICKS as f64 {
        (last - first) as usize + 1
    } else {
        0
    };
    let values = (0..count).map(|i| (first + i as f64) * step);
    (
        step,
        values
            .map(|value| if value == 0.0 { 0.0 } else { value })
            .collect(),
    )
}

/// Powers of ten, or where there are few of them, their multiples too.
fn log_ticks(low: f64, high: f64) -> Vec<(f64, String)> {
    let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let decades = high.log10() - low.log10();
    let factors: &[f64] = match decades {
        d if d > 3.0 => &[1.0],
        d if d > 1.2 => &[1.0, 2.0, 5.0],
        _ => &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0],
    };
    let every = ((decades / TICKS as f64).ceil() as i32).max(1);
    let powers = (first..=last).filter(|power| power % every == 0);
    let all = powers.flat_map(|power| factors.iter().map(move |&factor| (factor, power)));
    let value = |(factor, power): (f64, i32)| format!("{factor}e{power}").parse().unwrap_or(f64::NAN);
    let values: Vec<f64> = all.map(value).collect();
    let inside = values.into_iter().filter(|value| (low..=high).contains(value));
    inside.map(|value| (value, short(value))).collect()
}

/// A tick's value with as many digits as tell it from its neighbours at distance `step`.
fn tick_label(value: f64, step: f64, largest: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    if !(1e-3..1e12).contains(&largest) {
        let digits = (value.abs().log10() + 1e-9).floor() - (step.log10() + 1e-9).floor();
        return format!("{value:.*e}", digits.clamp(0.0, 6.0) as usize);
    }
    let (unit, letter) = match largest {
        x if x >= 1e9 => (1e9, "G"),
        x if x >= 1e6 => (1e6, "M"),
        x if x >= 1e4 => (1e3, "k"),
        _ => (1.0, ""),
    };
    let decimals = (-((step / unit).log10() + 1e-9).floor()).clamp(0.0, 9.0) as usize;
    format!("{:.decimals$}{letter}", value / unit)
}

/// A number in few characters: four significant digits, or a power of ten.
#[must_use]
pub fn short(value: f64) -> String {
    let size = value.abs();
    if size == 0.0 || !value.is_finite() {
        return format!("{value}");
    }
    if !(1e-3..1e6).contains(&size) {
        let text = format!("{value:.3e}");
        let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{power}", trimmed(digits));
    }
    let decimals = (3.0 - size.log10().floor()).clamp(0.0, 6.0) as usize;
    trimmed(&format!("{value:.decimals$}")).to_owned()
}

/// Without zeros at the end of the decimals.
fn trimmed(digits: &str) -> &str {
    if digits.contains('.') {
        digits.trim_end_matches('0').trim_end_matches('.')
    } else {
        digits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(low: f64, high: f64, logarithmic: bool) -> Vec<String> {
        let axis = Axis {
            low,
            high,
            logarithmic,
            from: 0.0,
            to: 1.0,
        };
        ticks(&axis).into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn ticks_are_round_and_their_labels_short() {
        assert_eq!(
            labels(0.0, 1000.0, false),
            ["0", "200", "400", "600", "800", "1000"]
        );
        assert_eq!(labels(0.0, 60_000.0, false).last().unwrap(), "60k");
        assert_eq!(labels(-0.12, 0.31, false), ["-0.1", "0", "0.1", "0.2", "0.3"]);
        assert_eq!(labels(0.0, 1e-3 * 0.9, false)[1], "2e-4");
        assert_eq!(
            labels(0.0, 2.5e6, false),
            ["0", "0.5M", "1.0M", "1.5M", "2.0M", "2.5M"]
        );
        assert_eq!(labels(2.9995, 3.00045, false).len(), 5);
        assert_eq!(labels(0.02, 30.0, true), ["0.1", "1", "10"]);
        assert_eq!(labels(0.5, 12.0, true), ["0.5", "1", "2", "5", "10"]);
        assert_eq!(labels(0.9, 2.2, true), ["1", "1.5", "2"]);
        let many = labels(1e-30, 1e30, true);
        assert!((3..=8).contains(&many.len()), "{many:?}");
        // Neither of these has room for ticks; both must end.
        labels(1.0, 1.0 + f64::EPSILON, false);
        labels(-FURTHEST, FURTHEST, false);
    }

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0"),
            (0.25, "0.25"),
            (1.0 / 3.0, "0.3333"),
            (12.3456, "12.35"),
            (1234.6, "1235"),
            (0.000_123_456, "1.235e-4"),
            (3e-4, "3e-4"),
            (-2_500_000.0, "-2.5e6"),
            (999_999.0, "999999"),
        ];
        for (value, text) in cases {
            assert_eq!(short(value), text);
        }
    }

    fn plot(points: &[(f64, f64)], logarithmic: bool) -> String {
        let line = Line {
            colour: 9,
            points: points.to_vec(),
            ..Line::default()
        };
        Plot {
            title: "a < b".to_owned(),
            lines: vec![line],
            logarithmic,
            logarithmic_steps: false,
            until: 100.0,
            resumed: vec![50.0, 700.0],
            skips: vec![25.0],
        }
        .draw()
    }

    #[test]
    fn lines_and_marks_are_where_they_belong() {
        let svg = plot(&[(0.0, 0.0), (100.0, 10.0)], false);
        // From the lower left to the right, with room of a twentieth above.
        let top = TOP + (HEIGHT - BOTTOM - TOP) * 0.5 / 10.5;
        let line = format!("class=\"l c1\" d=\"M46.0 206.0L408.0 {top:.1}\"");
        assert!(svg.contains(&line), "{line}\n{svg}");
        assert!(svg.contains("aria-label=\"a &lt; b\"") && svg.ends_with("</svg>"));
        assert_eq!(svg.matches("class=\"r\"").count(), 1);
        assert!(svg.contains("class=\"r\" d=\"M227.0 ") && svg.contains("class=\"s\" d=\"M136.5 "));
        assert_eq!(svg.matches("<circle").count(), 2);
        // Each decade takes as much room as the next.
        let svg = plot(&[(0.0, 1.0), (50.0, 10.0), (100.0, 100.0)], true);
        let d = svg.split("class=\"l c1\" d=\"M").nth(1).unwrap();
        let places: Vec<f64> = d[..d.find('"').unwrap()]
            .split('L')
            .map(|pair| pair.split_once(' ').unwrap().1.parse().unwrap())
            .collect();
        assert!(
            (places[0] + places[2] - 2.0 * places[1]).abs() < 0.15,
            "{places:?}"
        );
    }

    #[test]
    fn odd_values_give_finite_places() {
        let cases: [&[(f64, f64)]; 6] = [
            &[],
            &[(3.0, 7.0)],
            &[(0.0, 0.0), (1.0, 0.0)],
            &[(0.0, -f64::MAX), (1.0, f64::MAX)],
            &[(0.0, 5e-324), (1.0, f64::MAX)],
            &[(0.0, 1e-310), (9e18, 1e-310)],
        ];
        for points in cases {
            for logarithmic in [false, true] {
                let svg = plot(points, logarithmic);
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{points:?}: {svg}");
            }
        }
    }
}
