//! The tower of pictures.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::config::Sizes;
use crate::encoders::transformer::{Map, Names, Norm, Transformer, patches, small};

/// Patches, class token and positions, blocks, and a norm behind them.
#[derive(Clone, Debug)]
pub struct Vision {
    stem: Map,
    class: Tensor,
    positions: Tensor,
    trunk: Transformer,
    last: Norm,
    side: usize,
    patch: usize,
    compute: DType,
}

impl Vision {
    /// Takes the tensors below `vision_model`.
    ///
    /// # Errors
    /// Tensors that are missing or of another shape.
    pub(super) fn new(sizes: &Sizes, compute: DType, vb: &VarBuilder) -> Result<Self> {
        let (width, patch) = (sizes.vision.width, sizes.patch);
        let embeddings = vb.pp("embeddings");
        let weight = small((width, 3, patch, patch), "patch_embedding.weight", &embeddings)?;
        let bias = small(width, "patch_embedding.bias", &embeddings)?;
        let places = (sizes.side / patch).pow(2) + 1;
        Ok(Self {
            stem: Map::of(&weight, compute)?.with_bias(bias),
            class: small((1, 1, width), "class_embedding", &embeddings)?,
            positions: small((1, places, width), "position_embedding", &embeddings)?,
            trunk: Transformer::new(&sizes.vision, Names::Joined, compute, &vb.pp("encoder.layers"))?,
            last: Norm::new(width, sizes.vision.eps, &vb.pp("post_layernorm"))?,
            side: sizes.side,
            patch,
            compute,
        })
    }

    /// Pictures `[B, 3, side, side]` in f32 to states `[B, P, d_v]` in f32.
    ///
    /// # Errors
    /// Pictures of another size.
    pub fn forward(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let side = self.side;
        if pixel_values.rank() != 4 || pixel_values.dims()[1..] != [3, side, side] {
            candle_core::bail!(
                "pixel_values of {:?}, expected [B, 3, {side}, {side}]",
                pixel_values.dims()
            );
        }
        let (batch, width) = (pixel_values.dim(0)?, self.class.dim(2)?);
        let patches = patches(&pixel_values.unsqueeze(2)?, [1, self.patch, self.patch])?;
        let tokens = self
            .stem
            .forward(&patches.to_dtype(self.compute)?)?
            .to_dtype(DType::F32)?;
        let class = self.class.broadcast_as((batch, 1, width))?;
        let stream = Tensor::cat(&[&class, &tokens], 1)?.broadcast_add(&self.positions)?;
        self.last
            .forward(&self.trunk.forward(&stream, false, None)?, DType::F32)
    }
}
