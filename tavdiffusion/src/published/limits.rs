//! What no configuration of a published network exceeds: checked before anything is built.

use candle_core::{Result, bail};

/// Resolutions of a network.
pub(super) const MOST_BLOCKS: usize = 16;
/// Layers of a block, and transformer blocks of a layer.
pub(super) const MOST_LAYERS: usize = 64;
/// Frames of a clip that there are places for: tables of them are made before any weight is read.
pub(super) const MOST_FRAMES: usize = 1 << 10;
/// Channels, heads and widths.
pub(super) const MOST_CHANNELS: usize = 1 << 16;
/// Sides of kernels, and strides.
pub(super) const MOST_TAPS: usize = 1 << 10;

/// Refuses a size of zero, or beyond `most`.
pub(super) fn within(field: &str, found: usize, most: usize) -> Result<()> {
    match (1..=most).contains(&found) {
        true => Ok(()),
        false => bail!("{field} is {found}, expected 1 to {most}"),
    }
}

/// Refuses what is added to a variance and is no positive number.
pub(super) fn positive(field: &str, found: f64) -> Result<()> {
    match found > 0.0 && found.is_finite() {
        true => Ok(()),
        false => bail!("{field} is {found}, expected a number above zero"),
    }
}

/// Refuses channels that do not split into groups.
pub(super) fn in_groups(field: &str, channels: usize, groups: usize) -> Result<()> {
    match groups > 0 && channels.is_multiple_of(groups) {
        true => Ok(()),
        false => bail!("{field} is {channels}, expected a multiple of norm_num_groups {groups}"),
    }
}

/// Refuses a list of the wrong length.
pub(super) fn as_long(field: &str, found: usize, expected: usize) -> Result<()> {
    match found == expected {
        true => Ok(()),
        false => bail!("{field} has {found} entries, expected {expected} as in block_out_channels"),
    }
}
