//! Sheets for the eye: what was made for a prompt and what was found in it, and clips beside their nearest training clips.

use fulgur_datasets::draw::{Area, Canvas, ClipView, Colour, GLYPH, WHITE, clip_panel, grid};
use fulgur_datasets::media::Picture;
use fulgur_datasets::scenes::ClipSpec;

use super::figures::{Found, Truth};
use super::jury::Jury;
use super::neighbours::Nearest;
use crate::train::tasks::clips::HostClip;

/// Frames shown of a clip.
const SHOWN: usize = 12;
const LINE: usize = GLYPH + 4;
const DARK: Colour = [18, 18, 22];

/// One generated clip: prompt, what was found, frames, waveform and spectrogram, with marks where the contact is seen
/// and the onset is heard.
pub(super) fn panel(prompt: &str, clip: &HostClip, truth: &Truth, found: &Found, jury: &Jury) -> Canvas {
    let spec = jury.spec();
    let title = format!("{prompt} | {}", findings(truth, found, jury));
    let marks: Vec<f64> = [found.verdict.contact_s, found.onset_s]
        .into_iter()
        .flatten()
        .collect();
    let view = ClipView {
        title: &title,
        frames: &clip.frames,
        width: spec.width,
        height: spec.height,
        sound: &clip.samples,
        sample_rate: spec.sample_rate,
        marks: &marks,
    };
    clip_panel(&view, SHOWN)
}

/// What was found, in words: "sees bell, hears dog not bell, drop_left, 43 ms apart".
fn findings(truth: &Truth, found: &Found, jury: &Jury) -> String {
    let (things, motions) = jury.names();
    let named = |names: &[String], found: Option<usize>, wanted: usize| {
        let name = |class: usize| names.get(class).map_or("?", String::as_str).to_owned();
        match found {
            Some(class) if class == wanted => name(class),
            Some(class) => format!("{} not {}", name(class), name(wanted)),
            None => format!("nothing not {}", name(wanted)),
        }
    };
    let verdict = &found.verdict;
    let apart = match (verdict.contact_s, found.onset_s) {
        (Some(seen), Some(heard)) => format!("{:.0} ms apart", (seen - heard).abs() * 1000.0),
        (None, Some(_)) => "no contact".to_owned(),
        (Some(_), None) => "no onset".to_owned(),
        (None, None) => "no contact, no onset".to_owned(),
    };
    format!(
        "sees {}, hears {}, {}, {apart}",
        named(things, verdict.picture.first().copied(), truth.thing),
        named(things, Some(verdict.sound), truth.thing),
        named(motions, Some(verdict.motion), truth.motion),
    )
}

/// Panels below one another in two columns.
pub(super) fn contact_sheet(panels: &[Canvas]) -> Picture {
    grid(panels, 2).into_picture()
}

/// A generated clip, its nearest training clip, and how near a real clip of the same prompt comes to its own.
pub(super) struct Pair<'a> {
    pub(super) prompt: &'a str,
    pub(super) generated: &'a [u8],
    pub(super) nearest: Nearest,
    pub(super) training: &'a HostClip,
    pub(super) real: Nearest,
}

/// Pairs below one another, frames of the generated clip above those of the training clip.
pub(super) fn neighbour_sheet(pairs: &[Pair<'_>], spec: &ClipSpec) -> Picture {
    let rows: Vec<Canvas> = pairs.iter().map(|pair| pair_panel(pair, spec)).collect();
    grid(&rows, 1).into_picture()
}

fn pair_panel(pair: &Pair<'_>, spec: &ClipSpec) -> Canvas {
    let shown = SHOWN.min(spec.frames());
    let width = shown * spec.width;
    let strip = LINE + spec.height;
    let mut canvas = Canvas::new(width, 2 * strip + 2, DARK);
    let caption = pair
        .training
        .scene
        .as_ref()
        .map_or("", |scene| scene.caption.text.as_str());
    let lines = [
        format!("generated: {}", pair.prompt),
        format!(
            "nearest training clip, {:.3} away (a real clip of this prompt: {:.3}): {caption}",
            pair.nearest.distance, pair.real.distance
        ),
    ];
    for (i, (line, frames)) in lines
        .iter()
        .zip([pair.generated, &pair.training.frames])
        .enumerate()
    {
        let top = i * (strip + 2);
        canvas.paragraph(2, top as i32 + 2, line, WHITE, width / GLYPH, 1);
        for slot in 0..shown {
            let frame = (2 * slot + 1) * spec.frames() / (2 * shown);
            let bytes = spec.width * spec.height * 3;
            let area = Area {
                x: (slot * spec.width) as i32,
                y: (top + LINE) as i32,
                width: spec.width,
                height: spec.height,
            };
            let pixels = frames.get(frame * bytes..(frame + 1) * bytes).unwrap_or(&[]);
            canvas.blit(area, pixels, spec.width, spec.height);
        }
    }
    canvas
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_training_clip_stands_below_the_generated_one() {
        let spec = ClipSpec {
            width: 32,
            height: 24,
            duration_s: 1.0,
            ..ClipSpec::default()
        };
        let bytes = 32 * 24 * 3;
        let generated: Vec<u8> = (0..12u8).flat_map(|i| vec![20 * i; bytes]).collect();
        let training = HostClip {
            frames: vec![255; 12 * bytes],
            mask: Vec::new(),
            samples: Vec::new(),
            scene: None,
        };
        let near = |distance| Nearest {
            index: 0,
            distance,
            share: None,
        };
        let pair = Pair {
            prompt: "a bell rings",
            generated: &generated,
            nearest: near(0.25),
            training: &training,
            real: near(0.5),
        };
        let sheet = neighbour_sheet(&[pair], &spec);
        let pixel = |x: usize, y: usize| &sheet.pixels[3 * (y * sheet.width + x)..][..3];
        assert_eq!((sheet.width, sheet.height), (12 * 32, 2 * (LINE + 24) + 2));
        for slot in 0..12 {
            let x = slot * 32 + 16;
            assert_eq!(pixel(x, LINE + 12), [20 * slot as u8; 3]);
            assert_eq!(pixel(x, 2 * LINE + 24 + 2 + 12), [255; 3]);
        }
    }
}
