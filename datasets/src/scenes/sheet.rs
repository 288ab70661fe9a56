//! Contact sheets of scenes.

use super::compose::Composer;
use super::{Motion, Scene};
use crate::draw::{Canvas, ClipView, clip_panel, grid};
use crate::media::Picture;

/// Frames shown of each clip.
const SHOWN: usize = 12;

impl Composer {
    /// A sheet of scenes in `columns`: caption, frames in a row, waveform and spectrogram on one time axis, with a
    /// line at every contact. RGB.
    pub fn sheet(&self, scenes: &[Scene], columns: usize) -> Picture {
        let panels: Vec<Canvas> = scenes.iter().map(|scene| self.panel(scene)).collect();
        grid(&panels, columns).into_picture()
    }

    fn panel(&self, scene: &Scene) -> Canvas {
        let clip = &self.options.clip;
        let (frames, sound) = (self.render_frames(scene), self.render_sound(scene));
        let hits = scene.actors.iter().flat_map(|actor| &actor.hits);
        let marks: Vec<f64> = hits.map(|hit| hit.time_s).collect();
        let motions: Vec<&str> = scene
            .actors
            .iter()
            .map(|actor| Motion::name(actor.motion))
            .collect();
        let title = format!(
            "{} {} [{}]: {}",
            scene.split.name(),
            scene.index,
            motions.join(", "),
            scene.caption.text
        );
        let view = ClipView {
            title: &title,
            frames: &frames,
            width: clip.width,
            height: clip.height,
            sound: &sound,
            sample_rate: clip.sample_rate,
            marks: &marks,
        };
        clip_panel(&view, SHOWN)
    }
}
