//! From latents to frames and samples; each decoder is loaded, used and freed.

use candle_core::{DType, Device, Tensor};

use super::codecs::{Pictures, Sounds};
use super::places::{Piece, Places};
use crate::codec::{MelCodec, VideoCodec, Vocoder};
use crate::error::Error;
use crate::published::{AutoencoderKl, Half, HifiGan, Tiles};

/// Places of a latent that tiles share, as a part of their side.
const SHARED: usize = 4;

/// RGB bytes `[N, F, H, W, 3]` of the latents `[N, C, f, h, w]` of clips, a picture or a clip at a time. `tile` is the side of tiles in
/// pixels. `on_frame` hears how many frames are done, and ends the work with `None` by returning false.
pub(super) fn pictures(
    places: &Places,
    latents: &Tensor,
    tile: Option<usize>,
    compute: DType,
    device: &Device,
    on_frame: &mut dyn FnMut(usize) -> bool,
) -> Result<Option<Vec<Vec<u8>>>, Error> {
    let dir = places.require(Piece::Vae, "pictures")?;
    let (clips, _, count, ..) = latents.dims5()?;
    let mut all = Vec::with_capacity(clips);
    let own = match Pictures::read(places)? {
        Pictures::Patches(config) => Some((VideoCodec::load(dir, device)?, config.patch[0])),
        Pictures::Kl(_) => None,
    };
    if let Some((codec, stride)) = own {
        for clip in 0..clips {
            let latent = latents
                .narrow(0, clip, 1)?
                .permute((0, 2, 3, 4, 1))?
                .contiguous()?;
            all.push(bytes(&codec.decode(&latent)?)?);
            if !on_frame((clip + 1) * count * stride) {
                return Ok(None);
            }
        }
        return Ok(Some(all));
    }
    let vae = AutoencoderKl::load(dir, &[Half::Decoder], compute, device)?;
    let config = vae.config();
    let tiles = tile.map(|pixels| {
        let side = pixels / config.factor();
        Tiles {
            side,
            overlap: side / SHARED,
        }
    });
    for clip in 0..clips {
        let mut frames = Vec::new();
        for frame in 0..count {
            let latent = latents.narrow(0, clip, 1)?.narrow(2, frame, 1)?.squeeze(2)?;
            let latent = (latent.contiguous()? / config.scaling_factor)?.to_dtype(compute)?;
            let picture = match tiles {
                Some(tiles) => vae.decode_in_tiles(&latent, tiles)?,
                None => vae.decode(&latent)?,
            };
            frames.extend(bytes(&picture.permute((0, 2, 3, 1))?)?);
            if !on_frame(clip * count + frame + 1) {
                return Ok(None);
            }
        }
        all.push(frames);
    }
    Ok(Some(all))
}

/// Values in [-1, 1], channels last, as bytes.
fn bytes(values: &Tensor) -> candle_core::Result<Vec<u8>> {
    values
        .to_dtype(DType::F32)?
        .affine(127.5, 127.5)?
        .clamp(0f32, 255f32)?
        .round()?
        .to_dtype(DType::U8)?
        .flatten_all()?
        .to_vec1()
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
    let values: Vec<f32> = pixels.iter().map(|&byte| f32::from(byte) / 127.5 - 1.0).collect();
    let picture = Tensor::from_vec(values, (1, height, width, 3), device)?;
    if let Pictures::Patches(config) = Pictures::read(places)? {
        let codec = VideoCodec::load(dir, device)?;
        if !codec.has_encoder() {
            return Err(Error::model(
                dir,
                "found no encoder, expected one for a picture to start from",
            ));
        }
        let still = picture.unsqueeze(1)?;
        let frames = still
            .broadcast_as((1, config.patch[0], height, width, 3))?
            .contiguous()?;
        return Ok(codec.encode(&frames)?.permute((0, 4, 1, 2, 3))?.contiguous()?);
    }
    let vae = AutoencoderKl::load(dir, &[Half::Encoder], compute, device)?;
    let picture = picture.permute((0, 3, 1, 2))?.contiguous()?.to_dtype(compute)?;
    let mean = vae.encode(&picture)?.mean.to_dtype(DType::F32)?;
    Ok((mean * vae.config().scaling_factor)?.unsqueeze(2)?)
}

/// The first `samples` samples of each of the latents `[N, C, T, bands]` of sounds.
pub(super) fn samples(
    places: &Places,
    latents: &Tensor,
    samples: usize,
    compute: DType,
    device: &Device,
) -> Result<Vec<Vec<f32>>, Error> {
    let dir = places.require(Piece::AudioVae, "sounds")?;
    let place = places.require(Piece::Vocoder, "sounds")?;
    let waves = match Sounds::read(places)? {
        Sounds::Patches(_) => {
            let latents = latents.permute((0, 2, 3, 1))?.contiguous()?;
            let mel = MelCodec::load(dir, device)?.decode(&latents)?;
            Vocoder::load(place, device)?.forward(&mel)?
        }
        Sounds::Kl(_) => {
            let mel = {
                let vae = AutoencoderKl::load(dir, &[Half::Decoder], compute, device)?;
                let latents = (latents / vae.config().scaling_factor)?.to_dtype(compute)?;
                vae.decode(&latents)?.to_dtype(DType::F32)?.squeeze(1)?
            };
            // Small beside the others, and heard where it is rounded.
            HifiGan::load(place, DType::F32, device)?.forward(&mel)?
        }
    };
    let mut rows = waves.clamp(-1f32, 1f32)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    for row in &mut rows {
        row.resize(samples, 0.0);
    }
    Ok(rows)
}
