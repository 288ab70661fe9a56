//! ImageBind as a joint encoder of texts, frames, clips and sounds.

use fulgur_datasets::media::{Sound, Video};

use super::super::{EncodeError, Encoder};
use super::{ImageBindEncoder, NAME};
use crate::metrics::joint::JointEncoder;

impl JointEncoder for ImageBindEncoder {
    fn name(&self) -> &str {
        NAME
    }

    fn frames(&self, frames: &[&[u8]], width: usize, height: usize) -> Result<Vec<Vec<f32>>, EncodeError> {
        Encoder::frames(self, frames, width, height)
    }

    fn text(&self, text: &str) -> Result<Vec<f32>, EncodeError> {
        let (vector, _) = self.texts(&[text])?.swap_remove(0);
        Ok(vector)
    }

    fn sound(&self, sound: &Sound) -> Result<Vec<f32>, EncodeError> {
        Encoder::sound(self, sound)
    }

    fn video(&self, video: &Video) -> Result<Vec<f32>, EncodeError> {
        Self::video(self, video)
    }
}
