//! Drawing for reports: text, lines, rectangles, pictures, waveforms and spectrograms, and the panel of a clip.
//!
//! Everything is clipped to the canvas, so that any coordinates are fine.
//!
//! ```
//! use fulgur_datasets::draw::{Area, Canvas, WHITE};
//! let mut canvas = Canvas::new(64, 32, [0; 3]);
//! canvas.text(2, 2, "hello", WHITE, 1);
//! canvas.outline(Area { x: 0, y: 0, width: 64, height: 32 }, WHITE);
//! assert_eq!(canvas.into_picture().pixels.len(), 64 * 32 * 3);
//! ```

use font8x8::legacy::BASIC_LEGACY;
use realfft::RealFftPlanner;
use realfft::num_complex::Complex32;

use crate::media::Picture;

/// Red, green and blue.
pub type Colour = [u8; 3];

/// White.
pub const WHITE: Colour = [255; 3];
/// A grey that stays in the background.
pub const GREY: Colour = [110; 3];
/// The colour of marks on a time axis.
pub const MARK: Colour = [80, 230, 255];

/// Width and height of a character at scale 1, in pixels.
pub const GLYPH: usize = 8;

/// Window of a spectrogram, in seconds.
const WINDOW_S: f64 = 0.032;
/// Lowest frequency shown, in Hz; the highest is half the sampling rate.
const LOWEST_HZ: f64 = 60.0;
/// Levels drawn darkest and brightest, in dB relative to a sine of full scale.
const LEVELS_DB: (f32, f32) = (-80.0, -15.0);
/// Dark to bright, evenly spaced.
const HEAT: [Colour; 7] = [
    [2, 2, 10],
    [40, 14, 84],
    [101, 26, 128],
    [168, 46, 120],
    [229, 80, 82],
    [252, 156, 74],
    [252, 244, 178],
];

/// A rectangle on a canvas, in pixels; it may lie partly or wholly outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Left edge.
    pub x: i32,
    /// Upper edge.
    pub y: i32,
    /// Width.
    pub width: usize,
    /// Height.
    pub height: usize,
}

/// A picture to draw on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Canvas {
    width: usize,
    height: usize,
    /// RGB bytes [height, width, 3].
    pixels: Vec<u8>,
}

impl Canvas {
    /// A canvas of `width` by `height` pixels (at least 1 by 1) in one colour.
    pub fn new(width: usize, height: usize, colour: Colour) -> Self {
        let (width, height) = (width.max(1), height.max(1));
        Self {
            width,
            height,
            pixels: colour.repeat(width * height),
        }
    }

    /// Width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// The picture that was drawn, RGB.
    pub fn into_picture(self) -> Picture {
        Picture {
            pixels: self.pixels,
            width: self.width,
            height: self.height,
            channels: 3,
        }
    }

    /// Sets one pixel.
    pub fn set(&mut self, x: i32, y: i32, colour: Colour) {
        let (Ok(x), Ok(y)) = (usize::try_from(x), usize::try_from(y)) else {
            return;
        };
        if x < self.width && y < self.height {
            let at = 3 * (y * self.width + x);
            self.pixels[at..at + 3].copy_from_slice(&colour);
        }
    }

    /// Fills `area`.
    pub fn fill(&mut self, area: Area, colour: Colour) {
        for y in 0..area.height as i32 {
            for x in 0..area.width as i32 {
                self.set(area.x + x, area.y + y, colour);
            }
        }
    }

    /// Draws the outermost pixels of `area`.
    pub fn outline(&mut self, area: Area, colour: Colour) {
        let (right, lower) = (area.x + area.width as i32 - 1, area.y + area.height as i32 - 1);
        self.line((area.x, area.y), (right, area.y), colour);
        self.line((area.x, lower), (right, lower), colour);
        self.line((area.x, area.y), (area.x, lower), colour);
        self.line((right, area.y), (right, lower), colour);
    }

    /// Draws a line from `from` to `to`, both (x, y), ends included.
    pub fn line(&mut self, from: (i32, i32), to: (i32, i32), colour: Colour) {
        let (dx, dy) = (to.0 - from.0, to.1 - from.1);
        let steps = dx.abs().max(dy.abs()).max(1);
        for step in 0..=steps {
            let along = |start: i32, delta: i32| {
                start + (f64::from(delta) * f64::from(step) / f64::from(steps)).round() as i32
            };
            self.set(along(from.0, dx), along(from.1, dy), colour);
        }
    }

    /// Writes `text` with its upper left corner at (x, y), each pixel of a character drawn `scale` wide and high;
    /// characters outside ASCII become question marks. Returns the width in pixels.
    pub fn text(&mut self, x: i32, y: i32, text: &str, colour: Colour, scale: usize) -> usize {
        let mut width = 0;
        for character in text.chars() {
            let glyph = BASIC_LEGACY
                .get(character as usize)
                .unwrap_or(&BASIC_LEGACY[b'?' as usize]);
            for (row, bits) in glyph.iter().enumerate() {
                for column in (0..GLYPH).filter(|column| bits >> column & 1 == 1) {
                    let pixel = Area {
                        x: x + (width + column * scale) as i32,
                        y: y + (row * scale) as i32,
                        width: scale,
                        height: scale,
                    };
                    self.fill(pixel, colour);
                }
            }
            width += GLYPH * scale;
        }
        width
    }

    /// Writes `text` in lines of at most `columns` characters, broken at spaces; at most `lines` lines, the last
    /// ended with dots if something is left.
    pub fn paragraph(&mut self, x: i32, y: i32, text: &str, colour: Colour, columns: usize, lines: usize) {
        let wrapped = wrap(text, columns);
        for (i, line) in wrapped.iter().take(lines).enumerate() {
            let more = i + 1 == lines && wrapped.len() > lines;
            let kept: String = line.chars().take(columns.saturating_sub(2)).collect();
            let shown = if more { format!("{kept}..") } else { line.clone() };
            self.text(x, y + (i * (GLYPH + 2)) as i32, &shown, colour, 1);
        }
    }

    /// Draws RGB bytes [height, width, 3] into `area`, each pixel the nearest of the picture. Bytes that do not
    /// fit the size are not drawn.
    pub fn blit(&mut self, area: Area, rgb: &[u8], width: usize, height: usize) {
        if rgb.len() != width * height * 3 || rgb.is_empty() {
            return;
        }
        for y in 0..area.height {
            for x in 0..area.width {
                let at = 3 * (y * height / area.height * width + x * width / area.width);
                self.set(
                    area.x + x as i32,
                    area.y + y as i32,
                    [rgb[at], rgb[at + 1], rgb[at + 2]],
                );
            }
        }
    }

    /// Draws the lowest to highest sample of every column over the whole length of `samples` (-1..1).
    pub fn waveform(&mut self, area: Area, samples: &[f32], colour: Colour) {
        let half = area.height as f32 / 2.0;
        let row = |value: f32| area.y + (half - value.clamp(-1.0, 1.0) * (half - 1.0)) as i32;
        for column in 0..area.width {
            let first = column * samples.len() / area.width;
            let end = ((column + 1) * samples.len() / area.width).max(first + 1);
            let Some(part) = samples.get(first..end.min(samples.len())) else {
                continue;
            };
            let low = part.iter().copied().fold(f32::INFINITY, f32::min);
            let high = part.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            if low <= high {
                let x = area.x + column as i32;
                self.line((x, row(high)), (x, row(low)), colour);
            }
        }
    }

    /// Draws the spectrogram of mono `samples`: time across, frequency up on a logarithmic scale, loudness as heat.
    pub fn spectrogram(&mut self, area: Area, samples: &[f32], sample_rate: u32) {
        let window = ((WINDOW_S * f64::from(sample_rate)) as usize).max(16);
        let size = window.next_power_of_two();
        let transform = RealFftPlanner::<f32>::new().plan_fft_forward(size);
        let weights: Vec<f32> = (0..window)
            .map(|i| 0.5 - 0.5 * (std::f32::consts::TAU * (i as f32 + 0.5) / window as f32).cos())
            .collect();
        let full_scale = weights.iter().sum::<f32>() / 2.0;
        let highest = f64::from(sample_rate) / 2.0;
        let bin = |row: usize| {
            let up = 1.0 - row as f64 / area.height as f64;
            LOWEST_HZ * (highest / LOWEST_HZ).powf(up) / f64::from(sample_rate) * size as f64
        };
        let mut spectrum = vec![Complex32::default(); size / 2 + 1];
        for column in 0..area.width {
            let middle = ((column as f64 + 0.5) / area.width as f64 * samples.len() as f64) as usize;
            let mut input = vec![0.0; size];
            for (i, weight) in weights.iter().enumerate() {
                let at = (middle + i).checked_sub(window / 2);
                input[i] = weight * at.and_then(|at| samples.get(at)).copied().unwrap_or(0.0);
            }
            // Lengths come from the plan itself, so that the transform cannot fail.
            if transform.process(&mut input, &mut spectrum).is_err() {
                return;
            }
            for row in 0..area.height {
                let (high, low) = (bin(row), bin(row + 1));
                let first = (low.round() as usize).min(size / 2);
                let end = (high.round() as usize).clamp(first, size / 2);
                let peak = spectrum[first..=end].iter().map(|c| c.norm()).fold(0.0, f32::max);
                let level = 20.0 * (peak / full_scale).max(1e-9).log10();
                let share = (level - LEVELS_DB.0) / (LEVELS_DB.1 - LEVELS_DB.0);
                self.set(area.x + column as i32, area.y + row as i32, heat(share));
            }
        }
    }
}

/// The colour of `share` (0 dark, 1 bright).
pub fn heat(share: f32) -> Colour {
    let at = share.clamp(0.0, 1.0) * (HEAT.len() - 1) as f32;
    let lower = (at as usize).min(HEAT.len() - 2);
    let part = at - lower as f32;
    std::array::from_fn(|c| {
        let (a, b) = (f32::from(HEAT[lower][c]), f32::from(HEAT[lower + 1][c]));
        (a + (b - a) * part).round() as u8
    })
}

/// `text` in lines of at most `columns` characters, broken at spaces where that is possible.
pub fn wrap(text: &str, columns: usize) -> Vec<String> {
    let columns = columns.max(1);
    let mut lines: Vec<String> = vec![String::new()];
    let mut used = 0;
    for word in text.split_whitespace() {
        let characters: Vec<char> = word.chars().collect();
        for (i, piece) in characters.chunks(columns).enumerate() {
            let gap = usize::from(used > 0 && i == 0);
            if used > 0 && (i > 0 || used + gap + piece.len() > columns) {
                lines.push(String::new());
                used = 0;
            }
            if let Some(line) = lines.last_mut() {
                if used > 0 {
                    line.push(' ');
                    used += 1;
                }
                line.extend(piece);
                used += piece.len();
            }
        }
    }
    lines
}

/// What the panel of a clip shows.
#[derive(Clone, Copy, Debug)]
pub struct ClipView<'a> {
    /// Written on top.
    pub title: &'a str,
    /// RGB bytes [frames, height, width, 3].
    pub frames: &'a [u8],
    /// Width of a frame in pixels.
    pub width: usize,
    /// Height of a frame in pixels.
    pub height: usize,
    /// Mono samples that last as long as the frames.
    pub sound: &'a [f32],
    /// Samples per second.
    pub sample_rate: u32,
    /// Instants to mark on the time axis, in seconds.
    pub marks: &'a [f64],
}

const GAP: usize = 4;
const WAVE_HEIGHT: usize = 36;
const HEAT_HEIGHT: usize = 64;
const TITLE_LINES: usize = 2;
const DARK: Colour = [18, 18, 22];

/// One clip on one time axis: title, `shown` frames in a row (the middle one of each equal part of the clip),
/// waveform, spectrogram, and the marks across all three. Width: `shown` frames.
pub fn clip_panel(view: &ClipView<'_>, shown: usize) -> Canvas {
    let shown = shown.max(1);
    let (frame_bytes, width) = (view.width * view.height * 3, (shown * view.width).max(1));
    let title_height = TITLE_LINES * (GLYPH + 2) + 2;
    let axis = title_height + view.height;
    let height = axis + 2 + WAVE_HEIGHT + HEAT_HEIGHT + GAP;
    let mut canvas = Canvas::new(width, height, DARK);
    canvas.paragraph(2, 2, view.title, WHITE, width / GLYPH, TITLE_LINES);
    let count = view.frames.len().checked_div(frame_bytes).unwrap_or(0);
    for slot in 0..shown.min(count * shown) {
        let frame = (2 * slot + 1) * count / (2 * shown);
        let area = Area {
            x: (slot * view.width) as i32,
            y: title_height as i32,
            width: view.width,
            height: view.height,
        };
        let pixels = &view.frames[frame * frame_bytes..(frame + 1) * frame_bytes];
        canvas.blit(area, pixels, view.width, view.height);
    }
    let wave = Area {
        x: 0,
        y: axis as i32 + 2,
        width,
        height: WAVE_HEIGHT,
    };
    let heat = Area {
        y: wave.y + WAVE_HEIGHT as i32,
        height: HEAT_HEIGHT,
        ..wave
    };
    let middle = wave.y + WAVE_HEIGHT as i32 / 2;
    canvas.line((0, middle), (width as i32 - 1, middle), GREY);
    canvas.waveform(wave, view.sound, [240, 200, 90]);
    canvas.spectrogram(heat, view.sound, view.sample_rate);
    let duration_s = view.sound.len() as f64 / f64::from(view.sample_rate.max(1));
    for mark in view.marks.iter().filter(|_| duration_s > 0.0) {
        let x = (mark / duration_s * width as f64) as i32;
        canvas.line((x, axis as i32 - 4), (x, height as i32 - GAP as i32 - 1), MARK);
    }
    canvas
}

/// Canvases of any size in a grid of `columns`, row by row, on a dark ground; each column is as wide as the widest.
pub fn grid(cells: &[Canvas], columns: usize) -> Canvas {
    let columns = columns.clamp(1, cells.len().max(1));
    let width = cells.iter().map(Canvas::width).max().unwrap_or(1);
    let height = cells.iter().map(Canvas::height).max().unwrap_or(1);
    let rows = cells.len().div_ceil(columns).max(1);
    let mut whole = Canvas::new(
        columns * (width + GAP) - GAP,
        rows * (height + GAP) - GAP,
        [60; 3],
    );
    for (i, cell) in cells.iter().enumerate() {
        let area = Area {
            x: (i % columns * (width + GAP)) as i32,
            y: (i / columns * (height + GAP)) as i32,
            width: cell.width,
            height: cell.height,
        };
        whole.blit(area, &cell.pixels, cell.width, cell.height);
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lit(canvas: &Canvas, x: usize, y: usize) -> bool {
        canvas.pixels[3 * (y * canvas.width + x)..][..3] != [0; 3]
    }

    #[test]
    fn drawing_outside_is_clipped() {
        let mut canvas = Canvas::new(10, 10, [0; 3]);
        canvas.line((-50, 5), (50, 5), WHITE);
        canvas.text(-4, -4, "far\u{e9}", WHITE, 3);
        canvas.fill(
            Area {
                x: 8,
                y: 8,
                width: 50,
                height: 50,
            },
            WHITE,
        );
        assert!(lit(&canvas, 0, 5) && lit(&canvas, 9, 5) && lit(&canvas, 9, 9));
    }

    #[test]
    fn a_letter_has_its_shape() {
        let mut canvas = Canvas::new(8, 8, [0; 3]);
        assert_eq!(canvas.text(0, 0, "-", WHITE, 1), GLYPH);
        let rows: Vec<usize> = (0..8).filter(|&y| (0..8).any(|x| lit(&canvas, x, y))).collect();
        assert_eq!(rows, [3], "a dash is one row");
    }

    #[test]
    fn text_is_wrapped_at_spaces_and_inside_long_words() {
        assert_eq!(wrap("a dog barks loudly", 10), ["a dog", "barks", "loudly"]);
        assert_eq!(wrap("abcdefgh ij", 4), ["abcd", "efgh", "ij"]);
        assert_eq!(wrap("", 4), [""]);
    }

    #[test]
    fn a_spectrogram_shows_a_tone_at_its_height_and_time() {
        let rate = 16_000;
        let sound: Vec<f32> = (0..rate)
            .map(|i| {
                let tone = 0.5 * (std::f32::consts::TAU * 1000.0 * i as f32 / rate as f32).sin();
                if i < rate / 2 { 0.0 } else { tone }
            })
            .collect();
        let mut canvas = Canvas::new(100, 60, [0; 3]);
        let area = Area {
            x: 0,
            y: 0,
            width: 100,
            height: 60,
        };
        canvas.spectrogram(area, &sound, rate as u32);
        let bright = |x: usize, y: usize| {
            let at = 3 * (y * 100 + x);
            canvas.pixels[at..at + 3]
                .iter()
                .map(|&part| u32::from(part))
                .sum::<u32>()
        };
        let brightest = (0..60).max_by_key(|&y| bright(80, y)).unwrap();
        let expected = 60.0 * (1.0 - (1000.0f64 / 60.0).ln() / (8000.0f64 / 60.0).ln());
        assert!(
            (brightest as f64 - expected).abs() < 2.5,
            "row {brightest}, expected {expected}"
        );
        assert!(bright(20, brightest) < 40);
    }

    #[test]
    fn a_panel_puts_the_mark_at_its_time() {
        let frames = vec![90; 8 * 16 * 16 * 3];
        let sound = vec![0.0; 16_000];
        let view = ClipView {
            title: "half",
            frames: &frames,
            width: 16,
            height: 16,
            sound: &sound,
            sample_rate: 16_000,
            marks: &[0.5],
        };
        let panel = clip_panel(&view, 4);
        assert_eq!(panel.width(), 64);
        let lower = panel.height() - GAP - 2;
        let marked: Vec<usize> = (0..64)
            .filter(|&x| panel.pixels[3 * (lower * 64 + x)..][..3] == MARK)
            .collect();
        assert_eq!(marked, [32]);
    }
}
