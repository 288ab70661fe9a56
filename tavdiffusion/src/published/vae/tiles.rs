//! Large pictures out of tiles that overlap: memory grows with a tile, not with the picture.
//!
//! Where two tiles overlap, one fades into the other. Norms and attention see a tile at a time, so that the result is near that of the
//! whole, not the same.

use candle_core::{Result, Tensor, bail};

use super::AutoencoderKl;

/// Sides of tiles in places of the latent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Side of a tile.
    pub side: usize,
    /// Places that neighbours share at least; less than half of the side.
    pub overlap: usize,
}

impl Tiles {
    /// Where tiles start along an axis of so many places, the last at its end.
    fn starts(self, length: usize) -> Vec<usize> {
        if length <= self.side {
            return vec![0];
        }
        let last = length - self.side;
        let mut starts: Vec<usize> = (0..last).step_by(self.side - self.overlap).collect();
        starts.push(last);
        starts
    }

    fn check(self) -> Result<()> {
        match self.side > 2 * self.overlap {
            true => Ok(()),
            false => bail!(
                "tiles: an overlap of {} and a side of {}, expected less than half of it",
                self.overlap,
                self.side
            ),
        }
    }
}

impl AutoencoderKl {
    /// As [`Self::decode`], a tile at a time, for latents `[B, C, h, w]`.
    ///
    /// # Errors
    /// As before, or tiles that overlap by half of their side or more.
    pub fn decode_in_tiles(&self, latent: &Tensor, tiles: Tiles) -> Result<Tensor> {
        tiles.check()?;
        let (_, _, height, width) = latent.dims4()?;
        let factor = self.config().factor();
        let (rows, columns) = (tiles.starts(height), tiles.starts(width));
        let (tall, wide) = (tiles.side.min(height), tiles.side.min(width));
        let mut strips = Vec::with_capacity(rows.len());
        for &top in &rows {
            let strip = latent.narrow(2, top, tall)?;
            let pictures = columns
                .iter()
                .map(|&left| self.decode(&strip.narrow(3, left, wide)?))
                .collect::<Result<Vec<_>>>()?;
            strips.push(faded(pictures, &columns, wide, factor, 3)?);
        }
        faded(strips, &rows, tall, factor, 2)
    }
}

/// Pictures that start at `starts` along `axis`, each of `side` places, as one: `factor` values a place.
fn faded(pictures: Vec<Tensor>, starts: &[usize], side: usize, factor: usize, axis: usize) -> Result<Tensor> {
    let mut whole: Option<Tensor> = None;
    for (i, picture) in pictures.into_iter().enumerate() {
        whole = Some(match whole {
            None => picture,
            Some(before) => {
                let shared = (starts[i - 1] + side - starts[i]) * factor;
                fade(&before, &picture, shared, axis)?
            }
        });
    }
    match whole {
        Some(whole) => Ok(whole),
        None => bail!("tiles: none"),
    }
}

/// Two pictures that share so many values along `axis`.
fn fade(before: &Tensor, after: &Tensor, shared: usize, axis: usize) -> Result<Tensor> {
    let alone = before.dim(axis)? - shared;
    let rest = after.dim(axis)? - shared;
    let first = before.narrow(axis, 0, alone)?;
    let last = after.narrow(axis, shared, rest)?;
    if shared == 0 {
        return Tensor::cat(&[&first.contiguous()?, &last.contiguous()?], axis);
    }
    let mut shape = vec![1; before.rank()];
    shape[axis] = shared;
    let ramp: Vec<f32> = (0..shared)
        .map(|i| (i + 1) as f32 / (shared + 1) as f32)
        .collect();
    let ramp = Tensor::from_vec(ramp, shape, before.device())?.to_dtype(before.dtype())?;
    let (out, into) = (
        before.narrow(axis, alone, shared)?,
        after.narrow(axis, 0, shared)?,
    );
    let mixed = (&out + (into - &out)?.broadcast_mul(&ramp)?)?;
    Tensor::cat(&[&first.contiguous()?, &mixed, &last.contiguous()?], axis)
}

#[cfg(test)]
mod tests {
    use super::super::{AutoencoderKlConfig, Half};
    use super::*;
    use crate::testing::{apart, normal, perturb};
    use candle_core::Device;
    use fulgur_lightnet::params::Params;

    #[test]
    fn tiles_cover_an_axis() {
        let tiles = Tiles { side: 6, overlap: 2 };
        assert_eq!(tiles.starts(5), [0]);
        assert_eq!(tiles.starts(6), [0]);
        assert_eq!(tiles.starts(7), [0, 1]);
        assert_eq!(tiles.starts(10), [0, 4]);
        assert_eq!(tiles.starts(15), [0, 4, 8, 9]);
    }

    #[test]
    fn tiles_fade_into_each_other() -> Result<()> {
        let config: AutoencoderKlConfig = serde_json::from_str(
            r#"{"block_out_channels": [4, 8], "norm_num_groups": 2, "latent_channels": 3}"#,
        )
        .map_err(candle_core::Error::wrap)?;
        let params = Params::random(12, &Device::Cpu);
        let autoencoder = AutoencoderKl::new(&config, &[Half::Decoder], &params.builder())?;
        perturb(&params, 0.1)?;
        let latent = normal("latent", &[1, 3, 5, 9])?;
        let whole = autoencoder.decode(&latent)?;
        let tiles = Tiles { side: 9, overlap: 2 };
        assert!(apart(&autoencoder.decode_in_tiles(&latent, tiles)?, &whole)? < 1e-6);

        let tiles = Tiles { side: 5, overlap: 2 };
        let found = autoencoder.decode_in_tiles(&latent, tiles)?;
        assert_eq!(found.dims(), whole.dims());
        // Tiles start at 0, 3 and 4: the first is alone up to 3, the last from 8 on.
        let first = autoencoder.decode(&latent.narrow(3, 0, 5)?)?;
        let last = autoencoder.decode(&latent.narrow(3, 4, 5)?)?;
        let part = |x: &Tensor, from: usize, len: usize| x.narrow(3, from, len)?.contiguous();
        assert!(apart(&part(&found, 0, 6)?, &part(&first, 0, 6)?)? < 1e-6);
        assert!(apart(&part(&found, 16, 2)?, &part(&last, 8, 2)?)? < 1e-6);
        // In between it is neither, but of their size.
        assert!(apart(&part(&found, 7, 2)?, &part(&first, 7, 2)?)? > 1e-6);
        let odd = Tiles { side: 4, overlap: 2 };
        assert!(autoencoder.decode_in_tiles(&latent, odd).is_err());
        Ok(())
    }
}
