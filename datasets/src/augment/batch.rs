//! Batches: pictures side by side, by all threads.

use fulgur_kernels::philox::Philox;
use rayon::prelude::*;

use super::mix::Mix;
use super::view::Scale;
use super::{Augment, View, crop};
use crate::labelled::{Labelled, LabelledError};
use crate::media::Picture;

/// A picture that is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Which picture of the set.
    pub picture: usize,
    /// Number of the draw in the run; all chance is a function of it.
    pub number: u64,
}

/// The class of a picture, or of two that were mixed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Its own class.
    pub class: usize,
    /// The class of what was mixed in; its own where nothing was.
    pub other: usize,
    /// Weight of its own class; the other has the rest.
    pub weight: f32,
}

/// Pictures and classes.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Values, normalised: `[B, C, H, W]`.
    pub pixels: Vec<f32>,
    /// B, C, H and W.
    pub shape: [usize; 4],
    /// Their classes; empty where a picture of the batch has none.
    pub targets: Vec<Target>,
}

impl Batch {
    /// Probabilities of the classes `[B, classes]`, of which `smoothing` is spread over all; classes beyond `classes` get nothing.
    pub fn soft_targets(&self, classes: usize, smoothing: f32) -> Vec<f32> {
        let floor = smoothing / classes.max(1) as f32;
        let mut soft = vec![floor; self.targets.len() * classes];
        for (row, target) in soft.chunks_exact_mut(classes.max(1)).zip(&self.targets) {
            for (class, weight) in [(target.class, target.weight), (target.other, 1.0 - target.weight)] {
                if let Some(value) = row.get_mut(class) {
                    *value += (1.0 - smoothing) * weight;
                }
            }
        }
        soft
    }
}

impl View {
    /// The middles of these pictures, without chance.
    ///
    /// # Errors
    /// A setting of the view is out of range, or a picture cannot be decoded.
    pub fn batch(&self, pictures: &Labelled, chosen: &[usize]) -> Result<Batch, LabelledError> {
        let samples: Vec<Sample> = chosen
            .iter()
            .map(|&picture| Sample { picture, number: 0 })
            .collect();
        Augment::default().batch(self, pictures, &samples, 0)
    }
}

impl Augment {
    /// A batch for training. The first and the second sample are mixed with each other, the third and the fourth, and so on; the last
    /// of an odd batch stays itself. The chance of a pair is that of its first sample.
    ///
    /// # Errors
    /// A setting is out of range, or a picture cannot be decoded.
    pub fn batch(
        &self,
        view: &View,
        pictures: &Labelled,
        samples: &[Sample],
        seed: u64,
    ) -> Result<Batch, LabelledError> {
        self.check()?;
        view.check()?;
        let sides = [view.height, view.width];
        let size = view.height * view.width * view.channels;
        let scale = Scale::of(view);
        let mut pixels = vec![0.0; samples.len() * size];
        let labels: Option<Vec<usize>> = samples
            .iter()
            .map(|sample| pictures.label(sample.picture))
            .collect();
        let mut targets: Vec<Target> = labels
            .unwrap_or_default()
            .into_iter()
            .map(|class| Target {
                class,
                other: class,
                weight: 1.0,
            })
            .collect();
        pixels
            .par_chunks_mut(size)
            .zip(samples)
            .try_for_each(|(values, sample)| {
                let mut noise = Philox::named(seed, &format!("augment/{}", sample.number));
                let picture = self.picture(view, pictures.picture(sample.picture)?, &mut noise)?;
                scale.apply(&picture, values);
                if let Some(erasing) = &self.erasing {
                    erasing.apply(values, sides, &mut noise);
                }
                Ok::<(), LabelledError>(())
            })?;
        let mixes: Vec<Mix> = samples
            .chunks_exact(2)
            .map(|pair| {
                let mut noise = Philox::named(seed, &format!("augment/mix/{}", pair[0].number));
                Mix::draw(self, sides, &mut noise)
            })
            .collect();
        pixels
            .par_chunks_exact_mut(2 * size)
            .zip(&mixes)
            .for_each(|(values, mix)| {
                let (first, second) = values.split_at_mut(size);
                mix.apply(first, second, sides);
            });
        for (pair, mix) in targets.chunks_exact_mut(2).zip(&mixes) {
            let weight = mix.kept(sides);
            let classes = [pair[0].class, pair[1].class];
            pair[0] = Target {
                class: classes[0],
                other: classes[1],
                weight,
            };
            pair[1] = Target {
                class: classes[1],
                other: classes[0],
                weight,
            };
        }
        Ok(Batch {
            pixels,
            shape: [samples.len(), view.channels, view.height, view.width],
            targets,
        })
    }

    /// One RGB picture in the size of the view, as bytes, before it is normalised.
    fn picture(&self, view: &View, picture: Picture, noise: &mut Philox) -> Result<Picture, LabelledError> {
        let mut picture = match &self.crop {
            Some(crop) => {
                let [left, top, width, height] = crop.draw(picture.width, picture.height, noise);
                let part = picture.cropped(left, top, width, height)?;
                part.resized(view.width, view.height, view.filter)?
            }
            None => view.own_middle(picture)?,
        };
        if self.pad > 0 {
            crop::shift(&mut picture, self.pad, noise);
        }
        if f64::from(noise.uniform()) < self.flip {
            crop::flip(&mut picture);
        }
        Ok(match &self.randaugment {
            Some(randaugment) => randaugment.apply(picture, noise),
            None => picture,
        })
    }
}
