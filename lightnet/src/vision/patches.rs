//! Pictures as rows of patches.

use candle_core::{Result, Tensor, bail};

use crate::position::Grid;

/// The patches of `pixels` `[B, C, H, W]`, row by row, `[B, H/p W/p, C p p]`, and where they are.
///
/// The values of a patch are in the order of the weights of a convolution, channel, row, column, so that a linear map of a patch is
/// that convolution with a stride of the patch.
///
/// # Errors
/// Sides that are not multiples of `patch`, or no picture at all.
pub fn unfold(pixels: &Tensor, patch: usize) -> Result<(Tensor, Grid)> {
    let (batch, channels, height, width) = pixels.dims4()?;
    let fits = |side: usize| side > 0 && patch > 0 && side.is_multiple_of(patch);
    if batch * channels == 0 || !fits(height) || !fits(width) {
        bail!("pictures are {height} x {width}, expected sides that are multiples of patches of {patch}");
    }
    let (rows, columns) = (height / patch, width / patch);
    let patches = pixels
        .reshape(vec![batch, channels, rows, patch, columns, patch])?
        .permute(vec![0, 2, 4, 1, 3, 5])?
        .contiguous()?
        .reshape((batch, rows * columns, channels * patch * patch))?;
    Ok((patches, Grid::new(&[rows, columns])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_patch_holds_its_pixels_channel_by_channel() -> Result<()> {
        // Two channels of 4 x 6, patches of 2: the value of a pixel is its place in the picture.
        let pixels = Tensor::arange(0u32, 48, &Device::Cpu)?.reshape((1, 2, 4, 6))?;
        let (patches, grid) = unfold(&pixels, 2)?;
        assert_eq!(grid, Grid::new(&[2, 3]));
        let patches = patches.squeeze(0)?.to_vec2::<u32>()?;
        assert_eq!(patches[1], [2, 3, 8, 9, 26, 27, 32, 33]);
        assert_eq!(patches[5], [16, 17, 22, 23, 40, 41, 46, 47]);
        let line = unfold(&pixels, 3).unwrap_err().to_string();
        assert!(line.contains("pictures are 4 x 6"), "{line}");
        Ok(())
    }
}
