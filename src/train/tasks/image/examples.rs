//! The pictures of a part of the set as the network learns them: bytes of pixels, or latents that were encoded once.

use std::sync::atomic::AtomicBool;

use candle_core::{Device, Tensor};
use fulgur_datasets::labelled::{Labelled, Part};
use fulgur_tavdiffusion::codec::PictureCodec;
use rayon::prelude::*;

use super::captions::Texts;
use super::options::Space;
use crate::train::TaskResult;
use crate::train::tasks::check_stop;
use crate::train::tasks::pictures::MOST_BYTES;

/// Pictures that are encoded at once.
const TOGETHER: usize = 64;

/// What the network learns, one picture behind the other.
enum Values {
    /// Bytes of pixels.
    Pixels(Vec<u8>),
    /// Standardised latents, and those of the mirror images where pictures are mirrored: a codec does not see both alike.
    Latents {
        plain: Vec<f32>,
        mirrored: Option<Vec<f32>>,
    },
}

/// Pictures of a part of the set with what steers them.
pub(super) struct Examples {
    values: Values,
    space: Space,
    pub(super) labels: Vec<Option<usize>>,
    /// Numbers of their captions.
    pub(super) captions: Vec<usize>,
}

/// How pictures become latents.
pub(super) struct Encoding<'a> {
    pub(super) codec: &'a PictureCodec,
    pub(super) device: &'a Device,
    /// Whether mirror images are wanted too.
    pub(super) flip: bool,
    /// Ends the work when it is set.
    pub(super) stop: &'a AtomicBool,
}

impl Examples {
    /// Reads a part of the set; `encoding` is there where latents are learnt.
    ///
    /// # Errors
    /// Pictures that cannot be read, too many of them, latents that are not finite, or a stop.
    pub(super) fn read(
        set: &Labelled,
        part: Part,
        space: Space,
        encoding: Option<&Encoding<'_>>,
        texts: &mut Texts,
    ) -> TaskResult<Self> {
        let chosen = set.part(part);
        let values = match encoding {
            None => {
                let bytes = space.frame.read(set, &chosen);
                Values::Pixels(bytes.map_err(|error| format!("[image]: {error}"))?)
            }
            Some(encoding) => encoding.latents(set, &chosen, space)?,
        };
        let number = |&index: &usize| texts.number(set.caption(index).unwrap_or_default());
        Ok(Self {
            captions: chosen.iter().map(number).collect(),
            labels: chosen.iter().map(|&index| set.label(index)).collect(),
            values,
            space,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.labels.len()
    }

    /// What the network sees of these pictures, mirrored where `mirrored` says so: `[B, h, w, C]`.
    pub(super) fn values(&self, chosen: &[usize], mirrored: &[bool]) -> TaskResult<Tensor> {
        let size = self.space.values();
        let mut all = vec![0f32; chosen.len() * size];
        let pictures = all.par_chunks_mut(size).zip(chosen).zip(mirrored);
        pictures.for_each(|((to, &index), &turned)| match &self.values {
            Values::Pixels(bytes) => {
                let own = &bytes[index * size..][..size];
                self.space.frame.unit(own, turned, to);
            }
            Values::Latents { plain, mirrored } => {
                let from = mirrored.as_ref().filter(|_| turned).unwrap_or(plain);
                to.copy_from_slice(&from[index * size..][..size]);
            }
        });
        let [height, width] = self.space.size;
        let shape = (chosen.len(), height, width, self.space.channels);
        Ok(Tensor::from_vec(all, shape, &Device::Cpu)?)
    }
}

impl Encoding<'_> {
    /// Latents of these pictures; not more than [`TOGETHER`] of them are in memory as pixels.
    fn latents(&self, set: &Labelled, chosen: &[usize], space: Space) -> TaskResult<Values> {
        let (size, count) = (space.values(), chosen.len());
        let sides = if self.flip { 2 } else { 1 };
        let bytes = count
            .saturating_mul(size)
            .saturating_mul(sides * size_of::<f32>());
        if bytes > MOST_BYTES {
            return Err(format!(
                "[image]: set: found latents of {count} pictures in {bytes} bytes, expected at most {MOST_BYTES}"
            )
            .into());
        }
        let mut plain = Vec::with_capacity(count * size);
        let mut mirrored = self.flip.then(|| Vec::with_capacity(count * size));
        for chosen in chosen.chunks(TOGETHER) {
            check_stop(self.stop, "encoding pictures")?;
            let pixels = space.frame.read(set, chosen)?;
            plain.extend(self.encode(&pixels, space, false)?);
            if let Some(mirrored) = &mut mirrored {
                mirrored.extend(self.encode(&pixels, space, true)?);
            }
        }
        Ok(Values::Latents { plain, mirrored })
    }

    fn encode(&self, pixels: &[u8], space: Space, mirrored: bool) -> TaskResult<Vec<f32>> {
        let (frame, size) = (space.frame, space.frame.values());
        let count = pixels.len() / size;
        let mut values = vec![0f32; count * size];
        values
            .par_chunks_mut(size)
            .zip(pixels.par_chunks(size))
            .for_each(|(to, from)| frame.unit(from, mirrored, to));
        let [height, width] = frame.size;
        let pictures = Tensor::from_vec(values, (count, height, width, frame.channels), self.device)?;
        let latents: Vec<f32> = self.codec.encode(&pictures)?.flatten_all()?.to_vec1()?;
        if !latents.iter().all(|value| value.is_finite()) {
            return Err("[image]: codec: found latents that are not finite".into());
        }
        Ok(latents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::tasks::pictures::Frame;
    use fulgur_datasets::labelled::Item;
    use fulgur_datasets::media::Picture;
    use fulgur_lightnet::params::Params;
    use fulgur_tavdiffusion::codec::VideoCodecConfig;

    /// A set that would not fit is refused before anything is read, encoded or allocated; so is what a broken codec makes.
    #[test]
    fn latents_beyond_memory_or_number_are_refused() {
        let item = Item {
            picture: Picture::new(vec![9; 3 * 16], 4, 4, 3).unwrap(),
            label: Some(0),
            caption: None,
            key: "a".to_owned(),
        };
        let set = Labelled::in_memory("test", vec!["a".to_owned()], vec![item]).unwrap();
        let config = VideoCodecConfig {
            patch: [1, 2, 2],
            latent_channels: 3,
            encoder: [12, 1],
            decoder: [12, 1],
            fine: [12, 1],
        };
        let params = Params::random(6, &Device::Cpu);
        let codec = PictureCodec::new(&config, &params.builder()).unwrap();
        let stop = AtomicBool::new(false);
        let encoding = |flip| Encoding {
            codec: &codec,
            device: &Device::Cpu,
            flip,
            stop: &stop,
        };
        let space = |side: usize| Space {
            frame: Frame {
                size: [side; 2],
                channels: 3,
            },
            size: [side / 2; 2],
            channels: 3,
            factor: Some(2),
        };
        // 12 MiB of each picture, and as much of its mirror image.
        let count = MOST_BYTES / (12 << 20) / 2 + 1;
        let refused = encoding(true).latents(&set, &vec![0; count], space(2048));
        let line = refused.err().unwrap().to_string();
        assert!(
            line.starts_with(&format!("[image]: set: found latents of {count} pictures in ")),
            "{line}"
        );
        assert!(encoding(true).latents(&set, &[0], space(4)).is_ok());
        let spread = &params.vars()["latent.std"];
        spread.set(&spread.zeros_like().unwrap()).unwrap();
        let line = encoding(false).latents(&set, &[0], space(4)).err().unwrap();
        assert_eq!(
            line.to_string(),
            "[image]: codec: found latents that are not finite"
        );
    }
}
