//! Line plots as inline SVG: axes with round ticks, a logarithmic one where asked for, thin lines, marks.
//!
//! Colours are classes (`c0` to `c7`, and others), so that the page's style sheet decides them, in light and in dark.

use std::fmt::Write;

/// How many colours there are; lines beyond them begin again.
pub const COLOURS: usize = 8;

pub(super) const WIDTH: f64 = 420.0;
pub(super) const HEIGHT: f64 = 230.0;
pub(super) const LEFT: f64 = 46.0;
pub(super) const RIGHT: f64 = 12.0;
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

/// How an axis goes from values to places.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scale {
    /// Equal differences take equal room.
    #[default]
    Linear,
    /// Equal ratios do, and powers of ten have labels; all values have to be above 0 then.
    Logarithmic,
    /// The same with powers of two, for lengths: 1K is 1024.
    Doubling,
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
    /// Scale of the steps' axis; unless it is linear, it goes from the first point to the last.
    pub steps: Scale,
    /// Steps from 0 to this are shown, and to the last point if that is later.
    pub until: f64,
    /// Steps of upright lines across the plot.
    pub resumed: Vec<f64>,
    /// Steps of short strokes on the steps' axis.
    pub skips: Vec<f64>,
}

/// A scale from values to places.
struct Axis {
    low: f64,
    high: f64,
    scale: Scale,
    from: f64,
    to: f64,
}

impl Axis {
    fn place(&self, value: f64) -> f64 {
        let scale = |x: f64| match self.scale {
            Scale::Linear => x,
            Scale::Logarithmic | Scale::Doubling => x.log10(),
        };
        let (low, high) = (scale(self.low), scale(self.high));
        let part = (scale(value.clamp(-FURTHEST, FURTHEST)) - low) / (high - low);
        self.from + part * (self.to - self.from)
    }
}

impl Plot {
    /// The plot as an `<svg>` element.
    #[must_use]
    pub fn draw(&self) -> String {
        let (x, y) = (self.steps_axis(), self.values_axis());
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

    fn steps_axis(&self) -> Axis {
        let all = self
            .lines
            .iter()
            .flat_map(|line| &line.points)
            .map(|point| point.0);
        let (mut low, mut high) = (0.0, all.clone().fold(self.until.max(1.0), f64::max));
        let least = all.clone().fold(f64::INFINITY, f64::min);
        let scale = match self.steps {
            scale if least > 0.0 && least.is_finite() => scale,
            _ => Scale::Linear,
        };
        if scale != Scale::Linear {
            let most = all.fold(0.0, f64::max);
            let wide = (most / least).max(2.0).powf(0.02);
            (low, high) = (least / wide, most * wide);
        }
        Axis {
            low,
            high,
            scale,
            from: LEFT,
            to: WIDTH - RIGHT,
        }
    }

    fn values_axis(&self) -> Axis {
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
        let scale = if logarithmic {
            Scale::Logarithmic
        } else {
            Scale::Linear
        };
        Axis {
            low,
            high,
            scale,
            from: HEIGHT - BOTTOM,
            to: TOP,
        }
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
    match axis.scale {
        Scale::Logarithmic => log_ticks(axis.low, axis.high),
        Scale::Doubling => length_ticks(axis.low, axis.high),
        Scale::Linear => {
            let (step, values) = round_ticks(axis.low, axis.high);
            let largest = values
                .iter()
                .fold(0f64, |largest, value| largest.max(value.abs()));
            let label = |value: f64| tick_label(value, step, largest);
            values.into_iter().map(|value| (value, label(value))).collect()
        }
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
    // From here on the power is shorter, and the left margin has no room for more.
    let label = |value: f64| match value >= 1e5 {
        true => format!("{value:e}"),
        false => short(value),
    };
    inside.map(|value| (value, label(value))).collect()
}

/// Powers of two on an axis of lengths, as many as there is room for.
fn length_ticks(low: f64, high: f64) -> Vec<(f64, String)> {
    let (first, last) = (low.log2().ceil() as i32, high.log2().floor() as i32);
    let every = ((last - first) / TICKS as i32 + 1).max(1);
    (first..=last)
        .step_by(every as usize)
        .map(|power| {
            let value = f64::from(power).exp2();
            (value, length(value))
        })
        .collect()
}

/// A length in units of 1024: 1K, 2M.
#[must_use]
pub fn length(value: f64) -> String {
    let units = [(1024f64.powi(3), "G"), (1024f64.powi(2), "M"), (1024.0, "K")];
    match units.into_iter().find(|(unit, _)| value >= *unit) {
        Some((unit, letter)) => format!("{}{letter}", short(value / unit)),
        None => short(value),
    }
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
            scale: match logarithmic {
                true => Scale::Logarithmic,
                false => Scale::Linear,
            },
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
        assert_eq!(labels(4e4, 1.2e6, true), ["50000", "1e5", "2e5", "5e5", "1e6"]);
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
            steps: Scale::Linear,
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
    fn lengths_stand_at_equal_distances_under_powers_of_two() {
        let points = [(1024.0, 1.0), (4096.0, 2.0), (16384.0, 3.0)];
        let line = Line {
            points: points.to_vec(),
            ..Line::default()
        };
        let svg = Plot {
            lines: vec![line],
            steps: Scale::Doubling,
            ..Plot::default()
        }
        .draw();
        let place = |label: &str| -> f64 {
            let before = svg
                .split(&format!("\" y=\"223\" text-anchor=\"middle\">{label}<"))
                .next()
                .unwrap();
            before.rsplit('"').next().unwrap().parse().unwrap()
        };
        assert!(
            (place("4K") - place("1K") - (place("16K") - place("4K"))).abs() < 0.3,
            "{svg}"
        );
        assert!(svg.contains(&format!("cx=\"{:.1}\"", place("4K"))), "{svg}");
        assert_eq!(
            [length(1536.0), length(1048576.0), length(7.0)],
            ["1.5K", "1M", "7"]
        );
        let none = Plot {
            steps: Scale::Doubling,
            ..Plot::default()
        };
        assert!(!none.draw().contains("NaN"));
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
