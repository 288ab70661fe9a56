//! From latents to frames and samples; each decoder is loaded, used and freed.

use candle_core::{DType, Device, Tensor};

use super::places::{Piece, Places};
use crate::error::Error;
use crate::published::{AutoencoderKl, Half, HifiGan, Tiles};

/// Places of a latent that tiles share, as a part of their side.
const SHARED: usize = 4;

/// RGB bytes `[F, H, W, 3]` of the latent `[1, C, F, h, w]` of a clip, a frame at a time. `tile` is the side of tiles in pixels. `on_frame`
/// ends the work with `None` by returning false.
pub(super) fn pictures(
    places: &Places,
    latent: &Tensor,
    tile: Option<usize>,
    compute: DType,
    device: &Device,
    on_frame: &mut dyn FnMut(usize) -> bool,
) -> Result<Option<Vec<u8>>, Error> {
    let dir = places.require(Piece::Vae, "pictures")?;
    let vae = AutoencoderKl::load(dir, &[Half::Decoder], compute, device)?;
    let config = vae.config();
    let tiles = tile.map(|pixels| {
        let side = pixels / config.factor();
        Tiles {
            side,
            overlap: side / SHARED,
        }
    });
    let (_, _, frames, height, width) = latent.dims5()?;
    let mut bytes = Vec::with_capacity(frames * height * width * 3 * config.factor().pow(2));
    for frame in 0..frames {
        let latent = (latent.narrow(2, frame, 1)?.squeeze(2)?.contiguous()? / config.scaling_factor)?;
        let latent = latent.to_dtype(compute)?;
        let picture = match tiles {
            Some(tiles) => vae.decode_in_tiles(&latent, tiles)?,
            None => vae.decode(&latent)?,
        };
        bytes.extend(
            picture
                .to_dtype(DType::F32)?
                .affine(127.5, 127.5)?
                .clamp(0f32, 255f32)?
                .round()?
                .to_dtype(DType::U8)?
                .squeeze(0)?
                .permute((1, 2, 0))?
                .flatten_all()?
                .to_vec1::<u8>()?,
        );
        if !on_frame(frame + 1) {
            return Ok(None);
        }
    }
    Ok(Some(bytes))
}

/// The latent `[1, C, 1, h, w]` of a picture, RGB bytes `[height, width, 3]`: the mean of its distribution, scaled as what is denoised.
pub(super) fn encoded(
    places: &Places,
    pixels: &[u8],
    [height, width]: [usize; 2],
    compute: DType,
    device: &Device,
) -> Result<Tensor, Error> {
    let dir = places.require(Piece::Vae, "pictures")?;
    let vae = AutoencoderKl::load(dir, &[Half::Encoder], compute, device)?;
    let values: Vec<f32> = pixels.iter().map(|&byte| f32::from(byte) / 127.5 - 1.0).collect();
    let picture = Tensor::from_vec(values, (1, height, width, 3), device)?
        .permute((0, 3, 1, 2))?
        .contiguous()?
        .to_dtype(compute)?;
    let mean = vae.encode(&picture)?.mean.to_dtype(DType::F32)?;
    Ok((mean * vae.config().scaling_factor)?.unsqueeze(2)?)
}

/// The first `samples` samples of the latent `[1, C, T, bands]` of a sound.
pub(super) fn samples(
    places: &Places,
    latent: &Tensor,
    samples: usize,
    compute: DType,
    device: &Device,
) -> Result<Vec<f32>, Error> {
    let dir = places.require(Piece::AudioVae, "sounds")?;
    let mel = {
        let vae = AutoencoderKl::load(dir, &[Half::Decoder], compute, device)?;
        let latent = (latent / vae.config().scaling_factor)?.to_dtype(compute)?;
        vae.decode(&latent)?.to_dtype(DType::F32)?.squeeze(1)?
    };
    // Small beside the others, and heard where it is rounded.
    let vocoder = HifiGan::load(places.require(Piece::Vocoder, "sounds")?, DType::F32, device)?;
    let wave = vocoder.forward(&mel)?.squeeze(0)?.clamp(-1f32, 1f32)?;
    let mut samples_made = wave.to_vec1::<f32>()?;
    samples_made.resize(samples, 0.0);
    Ok(samples_made)
}
