//! A page of clips with their figures: pictures, waveforms, and rows that sort by each figure without any script.
//!
//! Every row knows its place in each order; choosing an order is choosing one of these places in the style sheet.

use std::fmt::Write as _;

use fulgur_datasets::media::{Sound, Video};
use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, RgbImage, imageops};

use super::page::{POLICY, STYLE as PAGE_STYLE, escape};
use super::samples::base64;
use super::svg::short;

const STYLE: &str = include_str!("clips.css");
/// Frames of a row, and their height in pixels.
const FRAMES: usize = 4;
const HEIGHT: u32 = 96;
const QUALITY: u8 = 70;
/// Widest frame in heights: a hair of a picture would make a long row.
const WIDEST: f64 = 3.0;
/// Columns of a waveform.
const COLUMNS: usize = 240;
/// Rows with pictures; the figures of all others are shown too.
const MOST_PICTURES: usize = 1000;
/// Rows of a page.
const MOST_ROWS: usize = 20_000;
/// Orders that a page offers.
const MOST_COLUMNS: usize = 16;

/// What is seen and heard of a clip.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Look {
    /// JPEG files of frames, evenly spaced.
    pub frames: Vec<Vec<u8>>,
    /// Lowest and highest sample of parts of the sound.
    pub wave: Vec<(f32, f32)>,
}

impl Look {
    /// That of a decoded clip.
    #[must_use]
    pub fn of(video: Option<&Video>, sound: Option<&Sound>) -> Self {
        Self {
            frames: video.map(frames).unwrap_or_default(),
            wave: sound.map(wave).unwrap_or_default(),
        }
    }
}

fn frames(video: &Video) -> Vec<Vec<u8>> {
    let count = FRAMES.min(video.frame_count);
    let last = video.frame_count.saturating_sub(1);
    let place = |i: usize| if count > 1 { i * last / (count - 1) } else { 0 };
    let width = (video.width as f64 / video.height as f64).min(WIDEST) * f64::from(HEIGHT);
    let width = (width.round() as u32).max(1);
    let one = |i: usize| {
        let sides = (
            u32::try_from(video.width).ok()?,
            u32::try_from(video.height).ok()?,
        );
        let picture = RgbImage::from_raw(sides.0, sides.1, video.frame(place(i)).to_vec())?;
        let small = imageops::thumbnail(&picture, width, HEIGHT);
        let mut bytes = Vec::new();
        JpegEncoder::new_with_quality(&mut bytes, QUALITY)
            .encode(small.as_raw(), width, HEIGHT, ExtendedColorType::Rgb8)
            .ok()?;
        Some(bytes)
    };
    (0..count).filter_map(one).collect()
}

fn wave(sound: &Sound) -> Vec<(f32, f32)> {
    let mono = sound.mono().samples;
    let columns = COLUMNS.min(mono.len());
    (0..columns)
        .map(|i| {
            let part = &mono[i * mono.len() / columns..(i + 1) * mono.len() / columns];
            let bound = |start: f32, of: fn(f32, f32) -> f32| part.iter().copied().fold(start, of);
            (bound(0.0, f32::min).max(-1.0), bound(0.0, f32::max).min(1.0))
        })
        .collect()
}

/// One clip.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// What it was made from.
    pub prompt: Option<String>,
    /// How it looks and sounds.
    pub look: Look,
    /// A figure, or none, for each column.
    pub values: Vec<Option<f64>>,
    /// What is to be said about it.
    pub notes: Vec<String>,
}

/// A figure that clips have.
#[derive(Clone, Debug, PartialEq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Whether the lowest is the best.
    pub lower_is_better: bool,
}

/// All of a page.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gallery {
    /// Its title.
    pub title: String,
    /// Figures of all clips: name, value, and what they are of.
    pub summary: Vec<(String, Option<f64>, String)>,
    /// Figures of single clips.
    pub columns: Vec<Column>,
    /// The clips.
    pub rows: Vec<Row>,
}

impl Gallery {
    /// The page, whole in itself.
    #[must_use]
    pub fn page(&self) -> String {
        let title = escape(&self.title);
        let columns = &self.columns[..self.columns.len().min(MOST_COLUMNS)];
        let rows = &self.rows[..self.rows.len().min(MOST_ROWS)];
        let mut page = format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
             content=\"width=device-width, initial-scale=1\">\n<meta http-equiv=\"Content-Security-Policy\" \
             content=\"{POLICY}\">\n<title>{title}</title>\n<style>\n{PAGE_STYLE}{STYLE}"
        );
        for i in 0..columns.len() {
            // Writing to a string cannot fail.
            let _ = write!(
                page,
                "#up{i}:checked~.clips>*{{order:var(--o{i})}}#down{i}:checked~.clips>*{{order:calc(0 - var(--o{i}))}}\
                 #down{i}:checked~.clips>.n{i}{{order:1}}\
                 #up{i}:checked~.orders label[for=up{i}],#down{i}:checked~.orders label[for=down{i}]{{\
                 background:var(--c0);color:var(--card)}}"
            );
        }
        let _ = write!(
            page,
            "</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n<dl class=\"tiles\">\n"
        );
        for (name, value, words) in &self.summary {
            let value = value.map_or_else(|| "none".to_owned(), short);
            let _ = writeln!(
                page,
                "<div><dt>{}</dt><dd>{value}<small>{}</small></dd></div>",
                escape(name),
                escape(words)
            );
        }
        let _ = writeln!(page, "</dl>\n<h2>Clips <small>{}</small></h2>", rows.len());
        orders(&mut page, columns);
        page.push_str("<div class=\"clips\">\n");
        let places: Vec<Vec<usize>> = (0..columns.len()).map(|column| places(rows, column)).collect();
        for (number, row) in rows.iter().enumerate() {
            let order: Vec<usize> = places.iter().map(|places| places[number]).collect();
            article(&mut page, row, columns, &order, number < MOST_PICTURES);
        }
        page.push_str("</div>\n");
        if rows.len() < self.rows.len() || rows.len() > MOST_PICTURES {
            let _ = writeln!(
                page,
                "<p class=\"soft\">{} clips in all; the first {MOST_PICTURES} have pictures, the first {MOST_ROWS} are shown.</p>",
                self.rows.len()
            );
        }
        page.push_str("</main>\n</body>\n</html>\n");
        page
    }
}

/// Place of each row when the best figure comes first; rows without one come last either way.
fn places(rows: &[Row], column: usize) -> Vec<usize> {
    let value = |row: &Row| row.values.get(column).copied().flatten();
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by(|&a, &b| match (value(&rows[a]), value(&rows[b])) {
        (Some(a), Some(b)) => a.total_cmp(&b),
        (Some(_), None) => std::cmp::Ordering::Less,
        (None, Some(_)) => std::cmp::Ordering::Greater,
        (None, None) => std::cmp::Ordering::Equal,
    });
    let mut places = vec![0; rows.len()];
    for (place, row) in order.into_iter().enumerate() {
        places[row] = place;
    }
    places
}

/// The switches: one that is on from the start, two for each figure.
fn orders(page: &mut String, columns: &[Column]) {
    if columns.is_empty() {
        return;
    }
    let mut labels = String::new();
    for (i, column) in columns.iter().enumerate() {
        let name = escape(&column.name);
        let (first, second) = if column.lower_is_better {
            ("best first", "worst first")
        } else {
            ("worst first", "best first")
        };
        let checked = if i == 0 { " checked" } else { "" };
        let (up, down) = if column.lower_is_better {
            (checked, "")
        } else {
            ("", checked)
        };
        let _ = write!(
            page,
            "<input type=\"radio\" name=\"order\" id=\"up{i}\"{up}><input type=\"radio\" name=\"order\" id=\"down{i}\"{down}>"
        );
        let _ = write!(
            labels,
            "<span>{name}<label for=\"up{i}\">{first}</label><label for=\"down{i}\">{second}</label></span>"
        );
    }
    let _ = writeln!(page, "<div class=\"orders\">{labels}</div>");
}

fn article(page: &mut String, row: &Row, columns: &[Column], order: &[usize], pictures: bool) {
    let style: Vec<String> = order
        .iter()
        .enumerate()
        .map(|(i, place)| format!("--o{i}:{place}"))
        .collect();
    // A row without a figure stays behind all others in both directions.
    let none: Vec<String> = (0..columns.len())
        .filter(|&i| row.values.get(i).copied().flatten().is_none())
        .map(|i| format!("n{i}"))
        .collect();
    let _ = write!(
        page,
        "<article class=\"{}\" style=\"{}\"><header><b>{}</b>",
        none.join(" "),
        style.join(";"),
        escape(&row.name)
    );
    for (column, value) in columns.iter().zip(&row.values) {
        let value = value.map_or_else(|| "none".to_owned(), short);
        let _ = write!(page, "<span>{} <b>{value}</b></span>", escape(&column.name));
    }
    page.push_str("</header>");
    if let Some(prompt) = &row.prompt {
        let _ = write!(page, "<p>{}</p>", escape(prompt));
    }
    if pictures && !(row.look.frames.is_empty() && row.look.wave.is_empty()) {
        page.push_str("<div class=\"look\">");
        for frame in &row.look.frames {
            let _ = write!(
                page,
                "<img alt=\"\" src=\"data:image/jpeg;base64,{}\">",
                base64(frame)
            );
        }
        page.push_str(&drawn(&row.look.wave));
        page.push_str("</div>");
    }
    for note in &row.notes {
        let _ = write!(page, "<p class=\"soft\">{}</p>", escape(note));
    }
    page.push_str("</article>\n");
}

/// A waveform as strokes.
fn drawn(wave: &[(f32, f32)]) -> String {
    if wave.is_empty() {
        return String::new();
    }
    let mut path = String::new();
    for (x, (low, high)) in wave.iter().enumerate() {
        // At least a hair of silence can be seen.
        let (top, bottom) = (47.0 - 46.0 * high, 49.0 - 46.0 * low);
        let _ = write!(path, "M{x} {top:.0}V{bottom:.0}");
    }
    format!(
        "<svg viewBox=\"0 0 {} 96\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"waveform\"><path class=\"l c0\" \
         d=\"{path}\"/></svg>",
        wave.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, values: &[Option<f64>]) -> Row {
        Row {
            name: name.to_owned(),
            values: values.to_vec(),
            ..Row::default()
        }
    }

    #[test]
    fn rows_know_their_places_in_each_order() {
        let rows = [
            row("a", &[Some(0.3), None]),
            row("b", &[None, Some(2.0)]),
            row("c", &[Some(-1.0), Some(1.0)]),
        ];
        assert_eq!(places(&rows, 0), [1, 2, 0]);
        assert_eq!(places(&rows, 1), [2, 1, 0]);
        assert_eq!(places(&rows, 7), [0, 1, 2]);
    }

    #[test]
    fn the_page_stands_alone_and_escapes_what_it_shows() {
        let video = Video::new(vec![200; 3 * 20 * 10 * 5], 20, 10, 5.0).unwrap();
        let sound = Sound::new((0..1000).map(|i| (i as f32 * 0.1).sin()).collect(), 2, 8000).unwrap();
        let look = Look::of(Some(&video), Some(&sound));
        assert_eq!((look.frames.len(), look.wave.len()), (4, 240));
        assert!(look.frames[0].starts_with(b"\xff\xd8"));
        let gallery = Gallery {
            title: "<b>".to_owned(),
            summary: vec![("fvd".to_owned(), None, "2 clips".to_owned())],
            columns: vec![
                Column {
                    name: "clap".to_owned(),
                    lower_is_better: false,
                },
                Column {
                    name: "kl".to_owned(),
                    lower_is_better: true,
                },
            ],
            rows: vec![
                Row {
                    prompt: Some("a <script>".to_owned()),
                    look,
                    notes: vec!["clap: no prompt".to_owned()],
                    ..row("one", &[Some(0.25), None])
                },
                row("two", &[None, Some(1.0)]),
            ],
        };
        let page = gallery.page();
        assert!(!page.contains("<script") && page.contains("a &lt;script&gt;"));
        assert!(!page.contains("http://") && !page.contains("https://"));
        assert_eq!(page.matches("data:image/jpeg").count(), 4);
        assert!(page.contains("style=\"--o0:0;--o1:1\"") && page.contains("style=\"--o0:1;--o1:0\""));
        assert!(page.contains("id=\"down0\" checked") && page.contains("aria-label=\"waveform\""));
        assert!(page.contains("0.25") && page.contains("no prompt"));
        let empty = Gallery::default().page();
        assert!(empty.ends_with("</html>\n") && !empty.contains("radio"));
    }

    #[test]
    fn odd_clips_have_a_look() {
        assert_eq!(Look::of(None, None), Look::default());
        let wide = Video::new(vec![0; 3 * 5000], 5000, 1, 5.0).unwrap();
        assert_eq!(Look::of(Some(&wide), None).frames.len(), 1);
        let short = Sound::new(vec![0.5; 3], 1, 8000).unwrap();
        assert_eq!(Look::of(None, Some(&short)).wave, [(0.0, 0.5); 3]);
    }
}
