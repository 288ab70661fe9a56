//! A clip on one page: its frames in a row above its waveform and spectrogram, on one time axis.
//!
//! Whether sound and picture match is a question of moments; a sheet lets the eye check them.

use fulgur_datasets::draw::{Area, Canvas, Colour, GLYPH};
use fulgur_datasets::media::{Picture, Sound, Video};
use image::RgbImage;
use image::imageops::{self, FilterType};

/// Width of a sheet in pixels.
const WIDTH: usize = 1280;
const LEFT: usize = 56;
const AXIS: usize = WIDTH - LEFT - 24;
const GAP: usize = 12;
/// Height of the row of frames in pixels; frames of this height are shown as they are.
pub const FRAME_HEIGHT: usize = 116;
const WAVE_HEIGHT: usize = 100;
const SPECTROGRAM_HEIGHT: usize = 180;
const TICK: usize = 6;
const TITLE_SCALE: usize = 2;
/// Most steps on the time axis.
const STEPS: f64 = 12.0;
/// Lowest frequency of a spectrogram, in Hz; the highest is half the sampling rate.
const LOWEST_HZ: f64 = 60.0;

const PAPER: Colour = [255, 255, 255];
const PANEL: Colour = [240, 241, 244];
const INK: Colour = [30, 32, 36];
const FAINT: Colour = [110, 114, 122];
const WAVE: Colour = [36, 99, 176];

/// Draws a sheet; a part that the clip does not have is a panel that says so.
///
/// Each frame shows what is on the screen in the middle of the time that it covers on the axis. Samples are averaged
/// over the channels; the waveform is enlarged to its peak, which stands beside it.
///
/// ```
/// use fulgur::datasets::media::{Sound, Video};
///
/// let video = Video::new(vec![128; 12 * 8 * 8 * 3], 8, 8, 12.0)?;
/// let sound = Sound::new(vec![0.1; 16_000], 1, 16_000)?;
/// let picture = fulgur::sheet::draw("a grey second", Some(&video), Some(&sound));
/// assert!(picture.width > picture.height);
/// # Ok::<(), fulgur::datasets::media::MediaError>(())
/// ```
#[must_use]
pub fn draw(title: &str, video: Option<&Video>, sound: Option<&Sound>) -> Picture {
    let panel = |above: usize, height: usize| Area {
        x: LEFT as i32,
        y: above as i32,
        width: AXIS,
        height,
    };
    let frames_area = panel(GAP + GLYPH * TITLE_SCALE + GAP, FRAME_HEIGHT);
    let wave_area = panel(below(frames_area) + GAP, WAVE_HEIGHT);
    let spectrogram_area = panel(below(wave_area) + GAP, SPECTROGRAM_HEIGHT);
    let axis_top = below(spectrogram_area);
    let mut canvas = Canvas::new(WIDTH, axis_top + TICK + GAP / 2 + GLYPH + GAP, PAPER);

    let seconds = seconds(video, sound);
    let columns = (WIDTH - 2 * GAP) / (GLYPH * TITLE_SCALE);
    canvas.text(
        GAP as i32,
        GAP as i32,
        &shortened(title, columns),
        INK,
        TITLE_SCALE,
    );
    for area in [frames_area, wave_area, spectrogram_area] {
        canvas.fill(area, PANEL);
    }
    match video.filter(|video| video.frame_count > 0) {
        Some(video) => frames(&mut canvas, frames_area, video, seconds),
        None => missing(&mut canvas, frames_area, "no picture"),
    }
    match sound.filter(|sound| !sound.is_empty()) {
        Some(sound) => {
            let mono = sound.mono();
            waveform(&mut canvas, wave_area, &mono, seconds);
            spectrogram(&mut canvas, spectrogram_area, &mono, seconds);
        }
        None => {
            missing(&mut canvas, wave_area, "no sound");
            missing(&mut canvas, spectrogram_area, "no sound");
        }
    }
    time_axis(&mut canvas, axis_top, seconds);
    canvas.into_picture()
}

/// The row under an area.
fn below(area: Area) -> usize {
    area.y as usize + area.height
}

/// The time that the axis covers.
fn seconds(video: Option<&Video>, sound: Option<&Sound>) -> f64 {
    let picture_s = video
        .and_then(|video| Some(video.times_s.last()? + 1.0 / video.fps))
        .unwrap_or(0.0);
    let longest = picture_s.max(sound.map_or(0.0, Sound::duration_s));
    if longest.is_finite() && longest > 0.0 {
        longest
    } else {
        1.0
    }
}

/// As many frames as fit side by side, each in the middle of its share of the axis.
fn frames(canvas: &mut Canvas, area: Area, video: &Video, seconds: f64) {
    let (width, height) = (video.width as f64, video.height as f64);
    let wanted = (width / height * area.height as f64).clamp(1.0, area.width as f64);
    let count = (area.width as f64 / wanted)
        .floor()
        .clamp(1.0, video.frame_count as f64);
    let slot = area.width as f64 / count;
    let scale = (slot / width).min(area.height as f64 / height);
    let shown_width = (width * scale).floor().max(1.0) as usize;
    let shown_height = (height * scale).floor().max(1.0) as usize;
    for number in 0..count as usize {
        let middle = (number as f64 + 0.5) * slot;
        let Some(index) = on_screen(video, middle / area.width as f64 * seconds) else {
            continue;
        };
        let pixels = video.frame(index).to_vec();
        let Some(frame) = RgbImage::from_raw(video.width as u32, video.height as u32, pixels) else {
            continue;
        };
        let scaled = imageops::resize(
            &frame,
            shown_width as u32,
            shown_height as u32,
            FilterType::Triangle,
        );
        let place = Area {
            x: area.x + (middle - shown_width as f64 / 2.0) as i32,
            y: area.y + (area.height - shown_height.min(area.height)) as i32 / 2,
            width: shown_width,
            height: shown_height,
        };
        canvas.blit(place, scaled.as_raw(), shown_width, shown_height);
    }
}

/// The frame that is on the screen at a time, if any.
fn on_screen(video: &Video, time: f64) -> Option<usize> {
    let index = video
        .times_s
        .partition_point(|start| *start <= time)
        .checked_sub(1)?;
    let end = video
        .times_s
        .get(index + 1)
        .copied()
        .unwrap_or(video.times_s[index] + 1.0 / video.fps);
    (time <= end).then_some(index)
}

/// The part of an area that a sound covers; sounds begin at zero.
fn covered(area: Area, mono: &Sound, seconds: f64) -> Area {
    let share = (mono.duration_s() / seconds).min(1.0);
    Area {
        width: ((area.width as f64 * share).round() as usize).max(1),
        ..area
    }
}

fn waveform(canvas: &mut Canvas, area: Area, mono: &Sound, seconds: f64) {
    let peak = mono
        .samples
        .iter()
        .filter(|sample| sample.is_finite())
        .fold(0.0f32, |peak, sample| peak.max(sample.abs()));
    let gain = if peak > 0.0 { 1.0 / peak } else { 0.0 };
    let enlarged: Vec<f32> = mono.samples.iter().map(|sample| sample * gain).collect();
    canvas.waveform(covered(area, mono, seconds), &enlarged, WAVE);
    label(canvas, area.y, &format!("{peak:.2}"));
    label(canvas, area.y + (area.height - GLYPH) as i32 / 2, "0");
}

fn spectrogram(canvas: &mut Canvas, area: Area, mono: &Sound, seconds: f64) {
    canvas.spectrogram(covered(area, mono, seconds), &mono.samples, mono.sample_rate);
    let top_hz = f64::from(mono.sample_rate) / 2.0;
    for (hz, text) in [
        (100.0, "100"),
        (300.0, "300"),
        (1000.0, "1k"),
        (3000.0, "3k"),
        (10_000.0, "10k"),
    ] {
        let up = (hz / LOWEST_HZ).ln() / (top_hz / LOWEST_HZ).ln();
        if (0.0..0.93).contains(&up) {
            let y = area.y + ((1.0 - up) * area.height as f64) as i32;
            canvas.line((area.x - TICK as i32, y), (area.x - 1, y), FAINT);
            label(canvas, y - GLYPH as i32 / 2, text);
        }
    }
    label(canvas, area.y, "Hz");
}

fn time_axis(canvas: &mut Canvas, top: usize, seconds: f64) {
    let (top, left) = (top as i32, LEFT as i32);
    canvas.line((left, top), (left + AXIS as i32 - 1, top), FAINT);
    let step = tick_step(seconds);
    let digits = (-step.log10()).ceil().max(0.0) as usize;
    let last = (seconds / step + 1e-9).floor() as usize;
    for tick in 0..=last {
        let time = tick as f64 * step;
        let x = left + (time / seconds * (AXIS - 1) as f64).round() as i32;
        canvas.line((x, top), (x, top + TICK as i32), FAINT);
        let text = format!("{time:.digits$}{}", if tick == last { " s" } else { "" });
        let half = (text.len() * GLYPH / 2) as i32;
        let begin = (x - half).min((WIDTH - text.len() * GLYPH) as i32 - 2);
        canvas.text(begin, top + (TICK + GAP / 2) as i32, &text, INK, 1);
    }
}

/// The smallest of 1, 2, 5 times a power of ten that gives few enough steps.
fn tick_step(seconds: f64) -> f64 {
    let rough = seconds / STEPS;
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= rough);
    factor.unwrap_or(10.0) * power
}

/// A label left of a panel.
fn label(canvas: &mut Canvas, y: i32, text: &str) {
    let right = (LEFT - TICK - 3) as i32;
    canvas.text(right - (text.len() * GLYPH) as i32, y, text, FAINT, 1);
}

/// What stands in a panel that has nothing to show.
fn missing(canvas: &mut Canvas, area: Area, text: &str) {
    let x = area.x + (area.width - text.len() * GLYPH) as i32 / 2;
    canvas.text(x, area.y + (area.height - GLYPH) as i32 / 2, text, FAINT, 1);
}

/// A text of at most `columns` characters, with three dots where something is left out.
fn shortened(text: &str, columns: usize) -> String {
    if text.chars().count() <= columns {
        return text.to_owned();
    }
    text.chars()
        .take(columns.saturating_sub(3))
        .chain("...".chars())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A film of black frames, four of them white from `bright` on, and a sound that begins at the same moment.
    fn flash(bright: usize) -> (Video, Sound) {
        let (frame_count, bytes) = (48, 32 * 32 * 3);
        let mut frames = vec![0; frame_count * bytes];
        frames[bright * bytes..(bright + 4) * bytes].fill(255);
        let mut samples = vec![0.0; 4 * 16_000];
        let onset = bright * 16_000 / 12;
        samples[onset..onset + 4000].copy_from_slice(&[0.5, -0.5].repeat(2000));
        (
            Video::new(frames, 32, 32, 12.0).unwrap(),
            Sound::new(samples, 1, 16_000).unwrap(),
        )
    }

    /// The first column of the axis whose pixel in row `y` has this colour.
    fn first_column(sheet: &Picture, y: usize, colour: Colour) -> usize {
        let pixel = |x: usize| &sheet.pixels[(y * sheet.width + x) * 3..][..3];
        (0..AXIS)
            .find(|column| pixel(LEFT + column) == colour)
            .expect("the colour is somewhere in the row")
    }

    #[test]
    fn picture_and_sound_of_one_moment_stand_above_each_other() {
        let (video, sound) = flash(24);
        let sheet = draw("a flash", Some(&video), Some(&sound));
        let frames_y = GAP + GLYPH * TITLE_SCALE + GAP + FRAME_HEIGHT / 2;
        let wave_y = frames_y + FRAME_HEIGHT / 2 + GAP + WAVE_HEIGHT / 4;
        let onset = first_column(&sheet, wave_y, WAVE);
        assert!(onset.abs_diff(AXIS / 2) <= 2, "onset at column {onset} of {AXIS}");
        // Ten frames stand side by side, so that each covers a tenth of the axis.
        let white = first_column(&sheet, frames_y, [255; 3]);
        assert!(
            white.abs_diff(AXIS / 2) <= AXIS / 10,
            "flash at column {white} of {AXIS}"
        );
    }

    #[test]
    fn a_sound_that_ends_early_leaves_the_rest_empty() {
        let (video, mut sound) = flash(24);
        sound.samples = [0.25, -0.25].repeat(8000);
        let sheet = draw("short", Some(&video), Some(&sound));
        let y = GAP + GLYPH * TITLE_SCALE + GAP + FRAME_HEIGHT + GAP + 4;
        let end = (0..AXIS).rev().find(|column| {
            (y..y + WAVE_HEIGHT - 8)
                .any(|y| sheet.pixels[(y * sheet.width + LEFT + column) * 3..][..3] == WAVE)
        });
        assert!(end.unwrap().abs_diff(AXIS / 4) <= 2, "{end:?}");
    }

    #[test]
    fn any_part_may_be_missing_or_odd() {
        let (video, sound) = flash(3);
        let wide = Video::new(vec![7; 3 * 4000 * 2 * 3], 4000, 2, 0.5).unwrap();
        let tall = Video::new(vec![7; 3 * 2 * 4000 * 3], 2, 4000, 30.0).unwrap();
        let empty = Sound::new(Vec::new(), 2, 44_100).unwrap();
        let low = Sound::new(vec![f32::NAN; 50], 1, 100).unwrap();
        for (video, sound) in [
            (None, None),
            (Some(&video), None),
            (None, Some(&sound)),
            (Some(&wide), Some(&empty)),
            (Some(&tall), Some(&low)),
        ] {
            assert_eq!(draw(&"x".repeat(500), video, sound).width, WIDTH);
        }
    }

    #[test]
    fn ticks_are_round_and_few() {
        for (seconds, step) in [(4.0, 0.5), (1.0, 0.1), (0.3, 0.05), (10.0, 1.0), (596.0, 50.0)] {
            assert!(
                (tick_step(seconds) / step - 1.0).abs() < 1e-9,
                "{seconds}: {}",
                tick_step(seconds)
            );
        }
    }
}
